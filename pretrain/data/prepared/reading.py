"""How prepared data looks to the rest of this room: files with units, and the runs of a unit."""

import contextlib
import glob
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.cache import CachedFile, open_file
from pretrain.data.errors import DataError
from pretrain.data.prepared import speedrun
from pretrain.data.prepared.layout import (
    DOCUMENTS_SUFFIX,
    INDEX_FILE,
    TOKENS_SUFFIX,
    DocumentTable,
    Index,
    Origin,
    Shard,
    TokenizerNeeds,
    is_prepared,
    load_index,
    map_array,
    map_open,
    map_open_table,
    parse_index,
)
from pretrain.data.prepared.runs import TokenRun, token_runs
from pretrain.data.sources import size_of
from pretrain.data.split import Split, chosen
from pretrain.data.units import DataFile, Unit

TokenBytes = Callable[[], npt.NDArray[np.uint32]]
"""Returns the UTF-8 bytes of each token of the run's tokenizer."""

_NOTHING = np.empty(0, np.uint64)
_NO_DOCUMENTS = DocumentTable(_NOTHING, _NOTHING, _NOTHING)


@dataclass(frozen=True, slots=True)
class CachedShard(CachedFile):
    """The tokens of a remote shard that is read through a cache, where its other files do not lie next to it."""

    documents: DataFile | None = None
    index: DataFile | None = None


@dataclass(frozen=True, slots=True)
class TokenFile:
    """A file of tokens."""

    path: str
    bytes: int
    units: tuple[int, ...]
    """Documents of each unit of a prepared folder, tokens of each unit of a `.bin` shard."""
    sha256: str


@dataclass(frozen=True, slots=True)
class TokenSource:
    """What the path of a source with prepared data stands for."""

    files: tuple[TokenFile, ...]
    names: tuple[str, ...]
    licences: tuple[str, ...]
    tokenizer: TokenizerNeeds
    origin: Origin | None = None
    """What a prepared folder was made from."""


def holds_tokens(path: str) -> bool:
    """Return whether a file or pattern names prepared tokens, which are not text."""
    return path.endswith((TOKENS_SUFFIX, speedrun.SUFFIX))


def token_source(path: str) -> TokenSource | None:
    """Describe a source of prepared data; None if its path stands for text.

    Args:
        path: as in the config: a prepared folder, or a `.bin` shard or a pattern of such shards.

    Raises:
        DataError: the data is incomplete or damaged.

    """
    if is_prepared(path):
        return _prepared_source(path, load_index(path))
    if path.endswith(speedrun.SUFFIX):
        names = sorted(glob.glob(path, recursive=True)) if not Path(path).is_file() else [path]
        if not names:
            raise DataError(f"{path}: no such file, and no file matches it as a pattern")
        files = tuple(_speedrun_file(name) for name in names)
        return TokenSource(files, (), (), speedrun.NEEDS)
    if path.endswith(TOKENS_SUFFIX):
        raise DataError(f"{path}: name the prepared folder that holds this shard, not the shard")
    return None


def _prepared_source(path: str, index: Index) -> TokenSource:
    width = np.dtype(index.dtype).itemsize
    files = []
    for shard in index.shards:
        name = str(Path(path) / f"{shard.name}{TOKENS_SUFFIX}")
        _check_sizes(name, shard, index.dtype)
        digest = hashlib.sha256(f"{shard.tokens_sha256} {shard.documents_sha256}".encode()).hexdigest()
        files.append(TokenFile(name, shard.tokens * width, shard.units, digest))
    names, licences = tuple(index.source.get("sources", ())), tuple(index.source.get("licences", ()))
    needs = TokenizerNeeds(index.tokenizer_sha256, index.eos_id, None)
    return TokenSource(tuple(files), names, licences, needs, index.origin)


def _check_sizes(path: str, shard: Shard, dtype: str) -> None:
    map_array(Path(path), dtype, 0, total=shard.tokens)
    map_array(Path(path).with_suffix(DOCUMENTS_SUFFIX), "<u8", 0, total=3 * shard.documents)


def _speedrun_file(path: str) -> TokenFile:
    with open_file(DataFile(path)) as file:
        size = size_of(file)
        units = speedrun.unit_tokens(file, path)
        file.seek(0)
        digest = hashlib.sha256(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read(1 << 20))
    digest.update(str(size).encode())
    return TokenFile(path, size, units, digest.hexdigest())


def read_runs(unit: Unit, first_row: int, fraction: float, split: Split, token_bytes: TokenBytes) -> Iterator[TokenRun]:
    """Yield the runs of a unit from `first_row` on: the prepared form of `pretrain.data.formats.read_unit`.

    Rows are documents. Part k of n of a unit is the k-th of n ranges of its documents.

    Args:
        unit: whose file holds prepared tokens.
        first_row: the row to begin with.
        fraction: `data.validation_fraction`.
        split: the documents to read.
        token_bytes: called for shards that do not record the size of their documents.

    Raises:
        DataError: the data is missing, damaged or not what the catalog describes.

    """
    if unit.file.path.endswith(speedrun.SUFFIX):
        with open_file(unit.file) as file:
            tokens, ends = speedrun.read_window(file, unit.file.path, unit.row_group or 0)
        if not len(ends):
            return
        table = speedrun.document_table(tokens, ends, token_bytes())
        wanted = chosen(lambda: speedrun.token_hashes(tokens, ends), fraction, split)
        empty = np.diff(ends, prepend=np.uint64(0)) == 1
        if empty.any():
            wanted = ~empty if wanted is None else wanted & ~empty
    else:
        tokens, table = _unit_of_shard(unit)
        wanted = chosen(lambda: table.hashes, fraction, split)
    count = len(table.ends)
    begin, end = count * unit.part // unit.parts, count * (unit.part + 1) // unit.parts
    yield from token_runs(tokens, table, range(begin + first_row, end), wanted, begin)


def _unit_of_shard(unit: Unit) -> tuple[npt.NDArray[Any], DocumentTable]:
    """Map the tokens and the documents of a unit."""
    number = unit.row_group or 0
    documents, _ = _companions(unit.file)
    dtype, shard, table = _shard_of(unit.file, _stamp(unit.file))
    if shard is None or number >= len(shard.units) or shard.units[number] != unit.rows:
        raise DataError(
            f"{unit.file.path}: is not the shard that the run was started with: restore it, or start a new run"
        )
    begin = sum(shard.units[:number])
    rows = slice(begin, begin + shard.units[number])
    first = int(table.ends[begin - 1]) if begin else 0
    size = int(table.text_bytes[begin - 1]) if begin else 0
    end = int(table.ends[rows.stop - 1]) if rows.stop > begin else first
    if not first <= end <= shard.tokens:
        raise DataError(f"{documents.path}: is damaged: the borders of its documents do not fit")
    with open_file(unit.file) as file:
        tokens = map_open(file, unit.file.path, dtype, end - first, first, shard.tokens)
    return tokens, DocumentTable(
        table.ends[rows] - np.uint64(first), table.text_bytes[rows] - np.uint64(size), table.hashes[rows]
    )


@lru_cache(maxsize=16)
def _shard_of(tokens: DataFile, stamp: object) -> tuple[str, Shard | None, DocumentTable]:
    """Return the dtype, the record and the documents of a shard; no record if it is not in its index.

    Kept because a shard has many units. `stamp` tells apart what a path holds at different times.
    """
    documents, _ = _companions(tokens)
    index = index_of(tokens)
    shard = next((shard for shard in index.shards if shard.name == Path(tokens.path).stem), None)
    if shard is None:
        return index.dtype, None, _NO_DOCUMENTS
    with open_file(documents) as file:
        return index.dtype, shard, map_open_table(file, documents.path, shard.documents)


def _stamp(tokens: DataFile) -> tuple[int, ...]:
    """What changes when the files of a shard on this machine change; those of a remote one do not."""
    found = []
    for file in _companions(tokens):
        with contextlib.suppress(OSError):
            status = os.stat(file.path)
            found += [status.st_ino, status.st_size, status.st_mtime_ns]
    return tuple(found)


def index_of(tokens: DataFile) -> Index:
    """Return the index that lists a shard.

    Raises:
        DataError: it is missing or damaged.

    """
    _, found = _companions(tokens)
    with open_file(found) as file:
        return parse_index(found.path, file.read())


def _companions(tokens: DataFile) -> tuple[DataFile, DataFile]:
    """The documents of a shard, and the index that lists it."""
    if isinstance(tokens, CachedShard) and tokens.documents and tokens.index:
        return tokens.documents, tokens.index
    path = Path(tokens.path)
    return DataFile(str(path.with_suffix(DOCUMENTS_SUFFIX))), DataFile(str(path.with_name(INDEX_FILE)))


def cached_shards(files: Sequence[CachedFile]) -> list[CachedFile]:
    """Tell each shard of a source that is read through a cache where its other files are."""
    by_path = {file.path: file for file in files}

    def complete(file: CachedFile) -> CachedFile:
        if not file.path.endswith(TOKENS_SUFFIX):
            return file
        documents = by_path.get(file.path.removesuffix(TOKENS_SUFFIX) + DOCUMENTS_SUFFIX)
        index = by_path.get(f"{file.path.rpartition('/')[0]}/{INDEX_FILE}")
        return CachedShard(file.path, file.bytes, file.etag, file.sha256, file.cache, documents, index)

    return [complete(file) for file in files]
