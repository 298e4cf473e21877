"""Tokenizers on the Hugging Face Hub: `hf://ORG/NAME@REVISION`, optionally followed by the path of a file."""

import re
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from pretrain.config.tokenizer import TokenizerConfig
from pretrain.data.errors import DataError
from pretrain.files import replacing

_PREFIX = "hf://"
_PATH = re.compile(r"hf://([\w.-]+/[\w.-]+)@([\w./-]+?)(?:/([\w./-]+\.json))?")


class HubFile(NamedTuple):
    """A file of a repository in one revision."""

    repository: str
    revision: str
    file: str


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
            f"tokenizer.path {path}: expected hf://ORG/NAME@REVISION or hf://ORG/NAME@REVISION/FILE.json, for example "
            "hf://EleutherAI/gpt-neox-20b@c292233c833e336628618a88a648727eb3dff0a7"
        )
    return HubFile(found[1], found[2], found[3] or "tokenizer.json")


def local_file(path: str) -> Path:
    """Return where the file of a tokenizer is on this machine, without using the network.

    Raises:
        DataError: it is on the Hub and has not been fetched yet.

    """
    hub = parse(path)
    return Path(path) if hub is None else _download(path, hub, offline=True)


def fetch(config: TokenizerConfig) -> TokenizerConfig:
    """Download a tokenizer that is on the Hub; return a config that names the local file.

    Raises:
        DataError: it cannot be fetched.

    """
    hub = parse(config.path)
    if hub is None:
        return config
    return config.model_copy(update={"path": str(_download(config.path, hub, offline=False))})


def read(config: TokenizerConfig, copy: Path | None = None) -> bytes | None:
    """Return the contents of a tokenizer that is on the Hub; None for a local one.

    Args:
        config: names the tokenizer.
        copy: the copy that a run has kept, if any, which is used instead of the network.

    Raises:
        DataError: it cannot be fetched.

    """
    if parse(config.path) is None:
        return None
    return (copy or Path(fetch(config).path)).read_bytes()


def stored(config: TokenizerConfig, contents: bytes | None, folder: Path) -> TokenizerConfig:
    """Write contents that `read` returned, perhaps on another machine, into a file; return a config that names it."""
    if contents is None:
        return config
    with replacing(folder / "tokenizer.json") as partial:
        partial.write_bytes(contents)
    return config.model_copy(update={"path": str(folder / "tokenizer.json")})


def _download(path: str, hub: HubFile, *, offline: bool) -> Path:
    where = f"tokenizer.path {path}"
    try:
        found = huggingface_hub.hf_hub_download(
            hub.repository,
            hub.file,
            revision=hub.revision,
            local_files_only=offline,
        )
    except GatedRepoError as error:
        raise DataError(f"{where}: access is restricted: accept the terms on the Hub and set HF_TOKEN") from error
    except LocalEntryNotFoundError as error:
        cure = "fetch it once with `aurora data resolve` or `aurora train`" if offline else "check the connection"
        raise DataError(f"{where}: is not in the cache of huggingface_hub: {cure}") from error
    except (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError) as error:
        kinds = {RepositoryNotFoundError: "repository", RevisionNotFoundError: "revision"}
        missing = next((word for kind, word in kinds.items() if isinstance(error, kind)), "file")
        raise DataError(f"{where}: there is no such {missing} on the Hub") from error
    except Exception as error:  # of the client of HTTP; its message may hold a signed URL
        raise DataError(f"{where}: cannot be fetched: {type(error).__name__}") from error
    return Path(found)
