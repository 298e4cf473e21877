"""Prepared data on servers: which files it consists of. It is read from a mirror or a cache, where it can be mapped."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from pretrain.data.described import CatalogFile, CatalogSource, remote_digest
from pretrain.data.errors import DataError
from pretrain.data.lock import locked_source
from pretrain.data.prepared import speedrun
from pretrain.data.prepared.layout import (
    DOCUMENTS_SUFFIX,
    INDEX_FILE,
    TOKENIZER_FILE,
    TOKENS_SUFFIX,
    Index,
    TokenizerNeeds,
    parse_index,
)
from pretrain.data.sources import list_files, open_bytes
from pretrain.data.units import DataFile

_LISTED = (TOKENS_SUFFIX, DOCUMENTS_SUFFIX)
_CONCURRENT = 16
"""Requests at the same time."""


def listed_suffixes(path: str, text: tuple[str, ...]) -> tuple[str, ...]:
    """Return the endings of the files to list for a remote source, so that one listing shows whether it is prepared.

    Args:
        path: as in the config.
        text: those of files of text.

    """
    return (speedrun.SUFFIX,) if path.lower().endswith(speedrun.SUFFIX) else (*text, *_LISTED)


def prepared_source(path: str, listed: Sequence[DataFile]) -> tuple[list[CatalogFile], Index] | None:
    """Return the files of a remote prepared folder and its index; None if the files are not those of one.

    Args:
        path: as in the config: the folder or, where folders cannot be listed (`https://`), its index.json.
        listed: the files that the path stands for.

    Raises:
        DataError: it is incomplete or damaged, or the files cannot be read.

    """
    if not any(file.path.endswith(_LISTED) for file in listed):
        if len(listed) != 1 or listed[0].path.rpartition("/")[2] != INDEX_FILE:
            return None
        if (index := _read_index(listed[0])) is None:
            return None  # a file of text that happens to have this name
        return _files(path, listed[0], index, _siblings(listed[0], index)), index
    indices = [file for file in listed if file.path.endswith(f"/{INDEX_FILE}")]
    if len(indices) != 1:
        problem = "several prepared folders: name one of them" if indices else f"prepared data without {INDEX_FILE}"
        raise DataError(f"{path}: holds {problem}")
    if (index := _read_index(indices[0])) is None:
        raise DataError(f"{indices[0].path}: is not the index of prepared data, but lies among its shards")
    return _files(path, indices[0], index, listed), index


def _read_index(file: DataFile) -> Index | None:
    """Read an index; None if the file is something else."""
    with open_bytes(file) as opened:
        data = opened.read()
    return parse_index(file.path, data) if b'"aurora-prepared"' in data[:1000] else None


def _sizes(index: Index) -> dict[str, tuple[int, str]]:
    """The size and the sha256 of each file that an index names."""
    width = np.dtype(index.dtype).itemsize
    found = {}
    for shard in index.shards:
        found[shard.name + TOKENS_SUFFIX] = shard.tokens * width, shard.tokens_sha256
        found[shard.name + DOCUMENTS_SUFFIX] = 24 * shard.documents, shard.documents_sha256
    return found


def _siblings(index_file: DataFile, index: Index) -> list[DataFile]:
    """Describe the files next to an index that the config names."""
    base = index_file.path.removesuffix(INDEX_FILE)
    if not index_file.path.startswith(("http://", "https://")):
        return list_files(base.rstrip("/"), (".json", *_LISTED))  # in the same revision as the index
    with ThreadPoolExecutor(_CONCURRENT) as pool:
        found = pool.map(lambda name: list_files(base + name, (".json", *_LISTED)), [TOKENIZER_FILE, *_sizes(index)])
        return [file for files in found for file in files]


def _files(path: str, index_file: DataFile, index: Index, listed: Sequence[DataFile]) -> list[CatalogFile]:
    """Describe the files of a folder; only those of tokens have units."""
    base = index_file.path.removesuffix(INDEX_FILE)
    by_name = {file.path.removeprefix(base): file for file in listed}
    units = {shard.name + TOKENS_SUFFIX: shard.units for shard in index.shards}
    found = [_described(index_file, ())]
    if tokenizer := by_name.get(TOKENIZER_FILE):
        found.append(_described(replace(tokenizer, sha256=index.tokenizer_sha256), ()))
    for name, (size, sha256) in _sizes(index).items():
        file = by_name.get(name)
        if file is None:
            raise DataError(f"{path}: lacks {name}, which its index names: copy the whole folder")
        if file.bytes != size or (file.sha256 or sha256) != sha256:
            raise DataError(
                f"{file.path}: is not the file that the index describes (it has {file.bytes} bytes, "
                f"expected {size}): copy the folder again"
            )
        found.append(_described(replace(file, sha256=sha256), units.get(name, ())))
    return found


def _described(file: DataFile, units: tuple[int, ...]) -> CatalogFile:
    digest = remote_digest(file)
    if file.bytes is None or digest is None:
        raise DataError(f"{file.path}: the server states neither a size nor a version (ETag), so it cannot be locked")
    return CatalogFile(file.path, file.bytes, units, digest)


def described_source(
    path: str, pinned: str, revision: str | None, licences: tuple[str, ...], files: Sequence[CatalogFile], index: Index
) -> CatalogSource:
    """Describe a remote prepared folder."""
    needs = TokenizerNeeds(index.tokenizer_sha256, index.eos_id, None)
    source = locked_source(path, pinned, files, revision, index.origin.licences or licences)
    return replace(source, tokenizer=needs)
