"""How prepared data looks to the rest of this room: files with units, and the runs of a unit."""

import glob
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.errors import DataError
from pretrain.data.prepared import speedrun
from pretrain.data.prepared.layout import (
    DOCUMENTS_SUFFIX,
    TOKENS_SUFFIX,
    DocumentTable,
    Index,
    Shard,
    is_prepared,
    load_index,
    map_array,
    map_table,
)
from pretrain.data.prepared.runs import TokenRun, token_runs
from pretrain.data.split import Split, chosen
from pretrain.data.units import Unit

TokenBytes = Callable[[], npt.NDArray[np.uint32]]
"""Returns the UTF-8 bytes of each token of the run's tokenizer."""


@dataclass(frozen=True, slots=True)
class TokenizerNeeds:
    """The tokenizer that the tokens of a source were made with."""

    sha256: str | None
    """Of the `tokenizer.json`; None: not recorded."""
    eos_id: int
    rows: int | None
    """Rows of its vocabulary; None: that of the tokenizer with the digest."""


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
        return TokenSource(files, (), (), TokenizerNeeds(None, speedrun.SEPARATOR, speedrun.VOCABULARY))
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
    return TokenSource(tuple(files), names, licences, TokenizerNeeds(index.tokenizer_sha256, index.eos_id, None))


def _check_sizes(path: str, shard: Shard, dtype: str) -> None:
    map_array(Path(path), dtype, 0, total=shard.tokens)
    map_array(Path(path).with_suffix(DOCUMENTS_SUFFIX), "<u8", 0, total=3 * shard.documents)


def _speedrun_file(path: str) -> TokenFile:
    tokens = speedrun.count_tokens(path)
    starts = range(0, tokens, speedrun.UNIT_TOKENS)
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read(1 << 20))
    digest.update(str(size).encode())
    units = tuple(min(speedrun.UNIT_TOKENS, tokens - start) for start in starts)
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
        tokens, ends = speedrun.read_window(unit.file.path, unit.row_group or 0)
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
    path = Path(unit.file.path)
    index = load_index(str(path.parent))
    shard = next((shard for shard in index.shards if shard.name == path.stem), None)
    number = unit.row_group or 0
    if shard is None or number >= len(shard.units) or shard.units[number] != unit.rows:
        raise DataError(f"{path}: is not the shard that the run was started with: restore it, or start a new run")
    begin = sum(shard.units[:number])
    rows = slice(begin, begin + shard.units[number])
    table = map_table(path.with_suffix(DOCUMENTS_SUFFIX), shard.documents)
    first = int(table.ends[begin - 1]) if begin else 0
    size = int(table.text_bytes[begin - 1]) if begin else 0
    end = int(table.ends[rows.stop - 1]) if rows.stop > begin else first
    if not first <= end <= shard.tokens:
        raise DataError(f"{path.with_suffix(DOCUMENTS_SUFFIX)}: is damaged: the borders of its documents do not fit")
    tokens = map_array(path, index.dtype, end - first, first, shard.tokens)
    return tokens, DocumentTable(
        table.ends[rows] - np.uint64(first), table.text_bytes[rows] - np.uint64(size), table.hashes[rows]
    )
