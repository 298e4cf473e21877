"""Find a model on the Hub or in the Hugging Face cache, and download what an evaluation needs of it.

A missing or gated model, a Hub that fails, and no network are reported separately within `ANSWER_SECONDS`. What is
downloaded is of one commit, and without code unless that may run.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    HfApi,
    constants,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    DisabledRepoError,
    FileMetadataError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    IncompleteSnapshotError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from eval.errors import EvalError
from pretrain.processes.redaction import redact

T = TypeVar("T")

ANSWER_SECONDS = 4.0
"""How long the Hub may take to say whether it has something; together with the imports, less than 10 seconds."""
_PAUSES = (0.5, 1.0, 2.0)
"""Seconds before each further attempt if the Hub fails."""
_FAILURES = (429, 500, 502, 503, 504)
_ANY_DATA_SET = "Rowan/hellaswag"
_early: list[Callable[[], str | Exception]] = []
"""What waits for the answer to `ask_early`, if somebody asked."""

_CONFIG = "config.json"
CONFIG_FILES = (_CONFIG, "generation_config.json", "adapter_config.json", "aurora.json")
TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
CODE_FILES = ("*.py",)
# In the order in which transformers looks for them. Weights in pieces have an index.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Snapshot:
    """A model's files, all of one commit."""

    folder: Path
    commit: str
    note: str
    """Why the cache was used and not the Hub; empty if the Hub answered."""


@dataclass(frozen=True)
class _Silence:
    """Why the Hub could not say anything about a model."""

    text: str


def find_snapshot(name: str, revision: str | None, *, with_code: bool) -> Snapshot:
    """Return the files of a model of the Hub at `$HF_ENDPOINT`, downloading those that are not in the cache.

    Args:
        name: its id.
        revision: branch, tag or commit; None for "main".
        with_code: whether to download Python code as well.

    Raises:
        EvalError: there is no such model or revision, access is not granted, or it is neither in the cache nor can it
            be had from the Hub now.
    """
    answer = _ask(name, revision)
    if isinstance(answer, _Silence):
        return _cached(name, revision, answer)
    with _explained(name, revision):
        return _download(name, revision, answer, with_code)


def check_available(name: str, revision: str | None) -> None:
    """Check that a model can be had, by its config alone.

    Raises:
        EvalError: as `find_snapshot`.
    """
    # At the same time, so that a Hub which answers one question and not the other is not waited for twice.
    for answer in (_ask_about(name, revision), _asked(lambda: _look_at_config(name, revision))):
        outcome = answer()
        if isinstance(outcome, Exception):
            _cached(name, revision, _silence(name, revision, outcome))
            return


@contextmanager
def _explained(name: str, revision: str | None) -> Iterator[None]:
    """Turn what goes wrong in a download into an `EvalError`."""
    try:
        yield
    except GatedRepoError as error:
        raise EvalError(_gated(name)) from error
    except EvalError:
        raise
    except Exception as error:  # a broken connection, a strange answer, a full disk
        number = None if isinstance(error, (HfHubHTTPError, ConnectionError)) else getattr(error, "errno", None)
        reason = os.strerror(number) if number else f"the Hub at {_endpoint()} {_reason(error)}"
        raise EvalError(f"cannot download {_label(name, revision)}: {reason}") from error


def weight_files(folder: Path) -> list[str]:
    """Return the names of the weight files that transformers loads from a folder; empty if there are none.

    Raises:
        EvalError: the index of weights in pieces cannot be read.
    """
    name = next((name for name in WEIGHTS if (folder / name).is_file()), None)
    if name is None or not name.endswith(".json"):
        return [name] if name else []
    return _pieces(folder / name)


def outcome_within(seconds: float, work: Callable[[], T]) -> T | Exception:
    """Return what `work` returns or raises, or a `TimeoutError` if it takes longer."""
    return _started(seconds, work)()


def _started(seconds: float, work: Callable[[], T]) -> Callable[[], T | Exception]:
    """Start `work`; return what waits for its outcome, as `outcome_within`, until so many seconds after the start."""
    outcomes: list[T | Exception] = []

    def attempt() -> None:
        try:
            outcomes.append(work())
        except Exception as error:
            outcomes.append(error)

    # In a thread, since looking up a host name has no time limit of its own.
    thread = threading.Thread(target=attempt, daemon=True)
    deadline = time.monotonic() + seconds
    thread.start()

    def wait() -> T | Exception:
        thread.join(max(0.0, deadline - time.monotonic()))
        return outcomes[0] if outcomes else TimeoutError(f"no answer within {seconds:g} seconds")

    return wait


def _endpoint() -> str:
    return redact(constants.ENDPOINT)


def _gated(name: str) -> str:
    return f"{name} is gated: request access at {_endpoint()}/{name}, then set HF_TOKEN or run `hf auth login`"


def _no_config(name: str) -> str:
    return f"{name} is not a model that transformers can load: it has no {_CONFIG}"


def _label(name: str, revision: str | None) -> str:
    return f"{name}@{revision}" if revision else name


def _ask(name: str, revision: str | None) -> ModelInfo | _Silence:
    """Ask the Hub for a model's commit and list of files.

    Raises:
        EvalError: the Hub says that there is none, or that access is not granted.
    """
    answer = _ask_about(name, revision)()
    return answer if isinstance(answer, ModelInfo) else _silence(name, revision, answer)


def _ask_about(name: str, revision: str | None) -> Callable[[], ModelInfo | Exception]:
    return _asked(lambda: HfApi().model_info(name, revision=revision, timeout=ANSWER_SECONDS))


def _look_at_config(name: str, revision: str | None) -> object:
    """Ask for the size of a model's config, which only those get who have access."""
    return get_hf_file_metadata(hf_hub_url(name, _CONFIG, revision=revision), timeout=ANSWER_SECONDS)


def _silence(name: str, revision: str | None, answer: Exception) -> _Silence:
    """Return why the Hub says nothing about a model.

    Raises:
        EvalError: it does: there is no such model or revision, or access is not granted.
    """
    where = f"the Hub at {_endpoint()}"
    if isinstance(answer, GatedRepoError):
        raise EvalError(_gated(name)) from answer
    if isinstance(answer, RevisionNotFoundError):
        raise EvalError(f"{name} has no revision {revision!r} on {where}; give a branch, a tag or a commit") from answer
    if isinstance(answer, RepositoryNotFoundError):
        raise EvalError(
            f"{name} is neither a local folder nor a model on {where} (or it is private and no token is set)"
        ) from answer
    if isinstance(answer, RemoteEntryNotFoundError):
        raise EvalError(_no_config(name)) from answer
    return _Silence(f"{where} {_reason(answer)}")


def ask_early() -> None:
    """Ask the Hub in the background whether it says anything, for `early_silence`.

    A Hub that does not answer is then waited for while libraries are imported, and not after that.
    """
    _early[:] = [_started(ANSWER_SECONDS, lambda: silence_about(_ANY_DATA_SET))]


def early_silence(*, keep: bool = False) -> str:
    """Return why the Hub says nothing, once after each `ask_early`; empty if it does, or was not asked.

    Args:
        keep: whether the answer is for the next caller as well.
    """
    answer = _early[0]() if _early else ""
    if not keep:
        _early.clear()
    return f"the Hub at {_endpoint()} {_reason(answer)}" if isinstance(answer, Exception) else answer


def silence_about(data_set: str) -> str:
    """Return why the Hub says nothing about a data set within `ANSWER_SECONDS`; empty if it does, were it a refusal."""
    answer = _answer(lambda: HfApi().dataset_info(data_set, timeout=ANSWER_SECONDS))
    if not isinstance(answer, Exception) or isinstance(answer, HFValidationError):
        return ""
    if isinstance(answer, HfHubHTTPError) and answer.response.status_code not in _FAILURES:
        return ""
    return f"the Hub at {_endpoint()} {_reason(answer)}"


def _answer(ask: Callable[[], T]) -> T | Exception:
    """What the Hub answers within `ANSWER_SECONDS`; it is asked again while it fails."""
    return _asked(ask)()


def _asked(ask: Callable[[], T]) -> Callable[[], T | Exception]:
    """Start to ask the Hub; return what waits for its answer, as `_answer`."""
    deadline = time.monotonic() + ANSWER_SECONDS

    def ask_again() -> T:
        for pause in _PAUSES:
            try:
                return ask()
            except HfHubHTTPError as error:
                if error.response.status_code not in _FAILURES or time.monotonic() + pause >= deadline:
                    raise
                time.sleep(pause)
        return ask()

    return _started(ANSWER_SECONDS, ask_again)


def _reason(error: BaseException) -> str:
    """What went wrong with the Hub, without the URL, which may be signed."""
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, DisabledRepoError):
        return "has disabled access to it"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        hint = "check the token in HF_TOKEN" if status in (401, 403) else "try again later"
        return f"answered {status} {error.response.reason_phrase}; {hint}"
    if isinstance(error, OfflineModeIsEnabled):
        return "was not contacted because HF_HUB_OFFLINE is set"
    if isinstance(error, TimeoutError) or "Timeout" in type(error).__name__:
        return f"did not answer within {ANSWER_SECONDS:g} seconds; check the network, or try again later"
    if isinstance(error, (ValueError, LookupError, TypeError, AttributeError, FileMetadataError)):
        return f"returned an invalid response ({type(error).__name__})"
    if type(error) is OSError:  # the client's complaint about the size of a file
        return "sent an incomplete file; try again later"
    return "cannot be reached; check the name or the network"


def _cached(name: str, revision: str | None, silence: _Silence) -> Snapshot:
    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except IncompleteSnapshotError as error:  # of files that nobody needs, perhaps
        folder = Path(error.snapshot_path)
    except LocalEntryNotFoundError as error:
        raise EvalError(
            f"{_label(name, revision)} is not a local folder, is not in the Hugging Face cache, and {silence.text}"
        ) from error
    return Snapshot(folder, folder.name, silence.text)


def _download(name: str, revision: str | None, info: ModelInfo, with_code: bool) -> Snapshot:
    folder = _fetch_config(name, revision).parent
    names = [file.rfilename for file in info.siblings or []]
    patterns = (*CONFIG_FILES, *TOKENIZER_FILES, *(CODE_FILES if with_code else ()))
    weights = next((file for file in WEIGHTS if file in names), None)
    if weights is None:
        raise EvalError(f"{name} has no weights: none of {', '.join(WEIGHTS)}")
    for wanted in [*_matching(names, patterns), weights]:
        _fetch(name, wanted, folder.name)
    for piece in weight_files(folder):
        _fetch(name, piece, folder.name)
    return Snapshot(folder, folder.name, "")


def _fetch_config(name: str, revision: str | None) -> Path:
    try:
        # By its branch, so that the cache knows the branch's commit; everything else by that commit.
        return _fetch(name, _CONFIG, revision)
    except RemoteEntryNotFoundError as error:
        raise EvalError(_no_config(name)) from error


def _fetch(name: str, file: str, revision: str | None) -> Path:
    return Path(hf_hub_download(name, file, revision=revision))


def _matching(names: Collection[str], patterns: Collection[str]) -> list[str]:
    """The files of the top folder that match."""
    return sorted(name for name in names if "/" not in name and any(fnmatch(name, pattern) for pattern in patterns))


def _pieces(index: Path) -> list[str]:
    try:
        pieces = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if any(Path(piece).name != piece for piece in pieces):
            raise ValueError("a file of it is not in the same folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EvalError(f"{index} is not a valid index of weights: {error!r}") from error
    return sorted(pieces)
