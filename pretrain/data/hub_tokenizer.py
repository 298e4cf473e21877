"""Tokenizers on the Hugging Face Hub: `hf://ORG/NAME@REVISION`, optionally followed by the path of a file.

A revision that is not a commit is pinned to one, by the lock or when the tokenizer is fetched. Copies lie in the cache
of huggingface_hub, as other programs leave them there, and in the mirror; requests are those for data, which are
repeated in one place (`pretrain.data.sources.retries`).
"""

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from pretrain.config.data import DataConfig
from pretrain.config.tokenizer import TokenizerConfig
from pretrain.data.described import CatalogFile, CatalogSource, remote_digest
from pretrain.data.errors import DataError, DataUnavailableError
from pretrain.data.lock import RESOLVE, load_lock, locked_source
from pretrain.data.mirror import fetch_file, mirror_path
from pretrain.data.sources.hub import HubPath, commit_of, describe_hub, is_commit
from pretrain.data.sources.retries import set_retry_minutes
from pretrain.files import replace_text, replacing
from pretrain.processes.redaction import redact

_PREFIX = "hf://"
_PATH = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w./-]+?))?(?:/([\w./-]+\.json))?")
_DEFAULT_BRANCH = "main"


class HubFile(NamedTuple):
    """A file of a repository in one revision."""

    repository: str
    revision: str | None
    """None: the default branch."""
    file: str

    @property
    def path(self) -> HubPath:
        """Its path on the Hub."""
        return HubPath(self.repository, self.revision, self.file, kind="models")


def parse(path: str) -> HubFile | None:
    """Take the path of a tokenizer apart; None if it is a local path.

    Raises:
        DataError: the path begins like one on the Hub, but is not complete.

    """
    if not path.startswith(_PREFIX):
        return None
    found = _PATH.fullmatch(path)
    if found is None:
        raise DataError(
            f"tokenizer.path {redact(path)}: expected hf://ORG/NAME@REVISION or hf://ORG/NAME@REVISION/FILE.json, for "
            "example hf://EleutherAI/gpt-neox-20b@c292233c833e336628618a88a648727eb3dff0a7"
        )
    return HubFile(found[1], found[2], found[3] or "tokenizer.json")


def local_file(path: str, data: DataConfig | None = None) -> Path:
    """Return where the file of a tokenizer is on this machine, without using the network.

    Args:
        path: `tokenizer.path`.
        data: names the lock and the mirror, if there are any.

    Raises:
        DataError: it is on the Hub and has not been fetched yet.

    """
    hub = parse(path)
    if hub is None:
        return Path(path)
    commit = _known_commit(path, hub, data)
    if found := _copy(hub if commit is None else hub._replace(revision=commit), data):
        return found
    raise DataError(
        f"tokenizer.path {path}: is not on this machine: fetch it once with `aurora data resolve` or `aurora train`"
    )


def fetch(config: TokenizerConfig, data: DataConfig | None = None) -> TokenizerConfig:
    """Download a tokenizer that is on the Hub, unless it is here; return a config that names the local file.

    Args:
        config: names the tokenizer.
        data: names the lock, which pins the revision, and the mirror, and says how long to wait for the Hub.

    Raises:
        DataError: it cannot be fetched, or the lock or the mirror lacks it.
        DataUnavailableError: the Hub did not answer for longer than `data.retry_minutes`.

    """
    hub = parse(config.path)
    if hub is None:
        return config
    pinned = _pin(config.path, hub, data)
    found = _copy(pinned, data)
    if found is None and data is not None and data.mirror is not None:
        raise DataError(
            f"{data.mirror}: the mirror lacks the tokenizer {pinned.path}: run `aurora data resolve` and `aurora data "
            "fetch` with this config again, or remove data.mirror"
        )
    if found is None:
        found = _snapshot(pinned)
        fetch_file(_described(pinned), found)
    return config.model_copy(update={"path": str(found)})


def resolve(config: TokenizerConfig, data: DataConfig) -> CatalogSource | None:
    """Describe a tokenizer on the Hub for the lock, with the commit that its revision stands for now; fetch it as well.

    Args:
        config: names the tokenizer.
        data: says how long to wait for the Hub.

    Returns:
        The description; None for a local tokenizer.

    Raises:
        DataError: see `fetch`.

    """
    hub = parse(config.path)
    if hub is None:
        return None
    pinned = _pin(config.path, hub, data.model_copy(update={"lock": None}))
    file = _described(pinned)
    if _copy(pinned, None) is None:
        fetch_file(file, _snapshot(pinned))
    return locked_source(config.path, str(pinned.path), [file], pinned.revision, ())


def record(config: TokenizerConfig, data: DataConfig, before: Any = None) -> dict[str, str]:
    """Describe the tokenizer of a run for its manifest: `path` and, if it is on the Hub, `pinned` with the commit.

    Args:
        config: names the tokenizer, which has been fetched, or of which the run has kept a copy.
        data: names the lock, if there is one.
        before: what an earlier launch recorded, which holds for the copy.

    """
    hub = parse(config.path)
    if hub is None:
        return {"path": config.path}
    if isinstance(before, dict) and before.get("path") == config.path:
        return before
    return {"path": config.path, "pinned": str(_pin(config.path, hub, data).path)}


def read(config: TokenizerConfig, data: DataConfig, copy: Path | None = None) -> bytes | None:
    """Return the contents of a tokenizer that is on the Hub; None for a local one.

    Args:
        config: names the tokenizer.
        data: see `fetch`.
        copy: the copy that a run has kept, if any, which is used instead of the network.

    Raises:
        DataError: it cannot be fetched.

    """
    if parse(config.path) is None:
        return None
    return (copy or Path(fetch(config, data).path)).read_bytes()


def stored(config: TokenizerConfig, contents: bytes | None, folder: Path) -> TokenizerConfig:
    """Write contents that `read` returned, perhaps on another machine, into a file; return a config that names it."""
    if contents is None:
        return config
    with replacing(folder / "tokenizer.json") as partial:
        partial.write_bytes(contents)
    return config.model_copy(update={"path": str(folder / "tokenizer.json")})


def _pin(path: str, hub: HubFile, data: DataConfig | None) -> HubFile:
    """Return the tokenizer with its commit, for which the Hub is asked if nothing else says it."""
    if data is not None:
        set_retry_minutes(data.retry_minutes)
    commit = _known_commit(path, hub, data)
    return hub._replace(revision=commit or _commit_of(hub.repository, hub.revision))


def _known_commit(path: str, hub: HubFile, data: DataConfig | None) -> str | None:
    """The commit that a revision stands for, as far as this is known without the Hub."""
    if hub.revision and is_commit(hub.revision):
        return hub.revision
    if data is None or data.lock is None:
        return None
    return locked_tokenizer(path, data.lock).revision


def locked_tokenizer(path: str, lock: str) -> CatalogSource:
    """Return what a lock says of a tokenizer on the Hub.

    Raises:
        DataError: the lock cannot be read, or does not hold it.

    """
    if found := load_lock(Path(lock)).source(path):
        return found
    raise DataError(f"{lock}: does not hold the tokenizer {path}: {RESOLVE}")


@functools.cache
def _commit_of(repository: str, revision: str | None) -> str:
    """Ask the Hub for a commit, once in a process, and note it where huggingface_hub looks for it."""
    with _named():
        commit = commit_of(HubPath(repository, revision, "", kind="models"))
    noted = _folder(repository) / "refs" / (revision or _DEFAULT_BRANCH)
    noted.parent.mkdir(parents=True, exist_ok=True)
    replace_text(noted, commit)
    return commit


def _described(pinned: HubFile) -> CatalogFile:
    with _named():
        file = describe_hub(pinned.path)
    digest = remote_digest(file)
    if file.bytes is None or digest is None:
        raise DataError(f"tokenizer.path {pinned.path}: the Hub states neither its size nor its version")
    return CatalogFile(file.path, file.bytes, None, digest)


def _copy(hub: HubFile, data: DataConfig | None) -> Path | None:
    """The copy on this machine, if there is one."""
    if data is not None and data.mirror is not None:
        found = mirror_path(Path(data.mirror), str(hub.path))
        if found.is_file():
            return found
    cached = huggingface_hub.try_to_load_from_cache(hub.repository, hub.file, revision=hub.revision)
    return Path(cached) if isinstance(cached, str) else None


def _snapshot(pinned: HubFile) -> Path:
    """Where huggingface_hub keeps a file of a commit."""
    return _folder(pinned.repository) / "snapshots" / str(pinned.revision) / pinned.file


def _folder(repository: str) -> Path:
    return Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repository, repo_type="model")


@contextmanager
def _named() -> Iterator[None]:
    """Say in an error of the Hub which key of the config it is about."""
    try:
        yield
    except DataUnavailableError:
        raise
    except DataError as error:
        raise DataError(f"tokenizer.path {error}") from None
