"""The format of a prepared folder.

    index.json                 written last: a folder without it is not complete and is never read
    plan.json                  what is prepared and how; written first
    tokenizer.json             a copy of the tokenizer
    shard-00000.tokens         token ids, little-endian uint16 or uint32: each document, followed by the separator
    shard-00000.documents      uint64 [3, documents], little-endian: see `DocumentTable`
    shard-00001.tokens         ...

A *unit* is a range of consecutive documents of a shard. Like a row group of a parquet file, a lane reads it as a whole.
Its rows are its documents.
"""

import json
import mmap
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.data.errors import DataError
from pretrain.data.split import Hashes
from pretrain.files import read_limited

INDEX_FILE = "index.json"
PLAN_FILE = "plan.json"
TOKENIZER_FILE = "tokenizer.json"
TOKENS_SUFFIX = ".tokens"
DOCUMENTS_SUFFIX = ".documents"
VERSION = 1
_FORMAT = "aurora-prepared"
_MOST_INDEX_BYTES = 1 << 30

Offsets = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True)
class TokenizerNeeds:
    """The tokenizer that the tokens of a source were made with."""

    sha256: str | None
    """Of the `tokenizer.json`; None: not recorded."""
    eos_id: int
    rows: int | None
    """Rows of its vocabulary; None: that of the tokenizer with the digest."""


class DocumentTable(NamedTuple):
    """The documents of a shard or of a part of it; three arrays [documents]."""

    ends: Offsets
    """Index of the first token after each document and its separator."""
    text_bytes: Offsets
    """UTF-8 bytes of all documents up to and including this one."""
    hashes: Hashes
    """`text_hash` of each document, which decides its split."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard, as the index lists it."""

    name: str
    """Name of its files without their suffix."""
    tokens: int
    """Including separators."""
    documents: int
    text_bytes: int
    tokens_sha256: str
    documents_sha256: str
    units: tuple[int, ...]
    """Documents in each unit, in order; a unit may be empty."""


@dataclass(frozen=True, slots=True)
class Index:
    """What a prepared folder holds."""

    tokenizer_sha256: str
    eos_token: str
    eos_id: int
    dtype: str
    """`uint16` or `uint32`."""
    characters: int
    """Characters of all documents."""
    duplicates_removed: int | None
    """None: duplicates were not looked for."""
    source: dict[str, Any]
    """The source that was prepared, as the manifest of a run would describe it, with its `text_field` and `where`."""
    shards: tuple[Shard, ...]
    bad_rows: Mapping[str, int] = field(default_factory=dict)
    """How many rows of each file were skipped because they could not be used; files without any are absent."""

    @property
    def documents(self) -> int:
        """Number of documents in all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Number of tokens in all shards, including separators."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(shard.text_bytes for shard in self.shards)

    @property
    def origin(self) -> "Origin":
        """Where the text came from."""
        source = self.source
        locked, files = source.get("locked") or {}, source.get("files") or ()
        return Origin(
            path=source["path"],
            pinned=locked.get("pinned"),
            revision=locked.get("revision"),
            licences=tuple(source.get("licences", ())),
            files=int(locked.get("files", len(files))),
            bytes=source["bytes"],
            sha256=locked.get("sha256"),
            text_field=source.get("text_field"),
            where=source.get("where"),
            bad_rows=sum(self.bad_rows.values()),
            duplicates_removed=self.duplicates_removed,
        )

    def to_json(self) -> str:
        """Return the contents of `index.json`."""
        totals = {"tokens": self.tokens, "documents": self.documents, "text_bytes": self.text_bytes}
        return json.dumps({"format": _FORMAT, "version": VERSION, "totals": totals, **asdict(self)}, indent=1) + "\n"


@dataclass(frozen=True, slots=True)
class Origin:
    """The source of text that a prepared folder was made from: its provenance, for the manifest of a run over it."""

    path: str
    """As in the config that was prepared."""
    pinned: str | None
    """Of a remote source: its path with the revision that was found."""
    revision: str | None
    """Of a remote source: its commit, if its store has such a thing."""
    licences: tuple[str, ...]
    files: int
    bytes: int
    """Of the files."""
    sha256: str | None
    """Of a remote source: `CatalogSource.contents`."""
    text_field: str | None
    """None: not recorded."""
    where: str | None
    bad_rows: int
    """How many were skipped."""
    duplicates_removed: int | None
    """None: duplicates were not looked for."""


def is_prepared(path: str) -> bool:
    """Return whether a path is a prepared folder, complete or not."""
    return any(os.path.isfile(os.path.join(path, name)) for name in (INDEX_FILE, PLAN_FILE))


def load_index(folder: str) -> Index:
    """Read the index of a prepared folder.

    Raises:
        DataError: there is none, because the folder was not completed; or it is damaged or of another version.

    """
    path = Path(folder) / INDEX_FILE
    try:
        contents = read_limited(path, _MOST_INDEX_BYTES)
    except FileNotFoundError:
        raise DataError(
            f"{folder}: has no {INDEX_FILE}: either it was not prepared completely, then repeat the command `aurora "
            "data prepare` that began it; or it holds several prepared sources, then name one of its folders"
        ) from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    return parse_index(str(path), contents)


@lru_cache(maxsize=64)
def parse_index(path: str, data: bytes) -> Index:
    """Return what an index says, parsed once: every unit that a lane opens asks for it.

    Args:
        path: of the index, for messages.
        data: the contents of the file.

    Raises:
        DataError: it is damaged or of another version.

    """
    try:
        contents = json.loads(data)
        if contents["format"] != _FORMAT:
            raise DataError(f"{path}: is not the index of prepared data: its format is {contents['format']!r}")
        if contents["version"] != VERSION:
            raise DataError(f"{path}: has version {contents['version']}, this program reads {VERSION}")
        shards = tuple(
            Shard(**{**{key.name: shard[key.name] for key in fields(Shard)}, "units": tuple(shard["units"])})
            for shard in contents["shards"]
        )
        known = [key.name for key in fields(Index) if key.name in contents or key.default_factory is MISSING]
        index = Index(**{**{name: contents[name] for name in known}, "shards": shards})
        index.origin  # noqa: B018 - damaged, it raises here
        if index.dtype not in ("uint16", "uint32"):
            raise DataError(f"{path}: dtype is {index.dtype!r}, expected uint16 or uint32")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read as the index of prepared data: {error!r}") from error
    for shard in index.shards:
        if sum(shard.units) != shard.documents:
            raise DataError(f"{path}: the units of {shard.name} hold {sum(shard.units)} of {shard.documents} documents")
    return index


def map_table(path: Path, documents: int) -> DocumentTable:
    """Map the documents of a shard.

    Raises:
        DataError: the file is missing or has another size.

    """
    return _table(map_array(path, "<u8", 3 * documents))


def map_open_table(file: BinaryIO, path: str, documents: int) -> DocumentTable:
    """Map the documents of a shard from an open file; see `map_table`."""
    return _table(map_open(file, path, "<u8", 3 * documents))


def _table(numbers: Offsets) -> DocumentTable:
    return DocumentTable(*numbers.reshape(3, -1)) if len(numbers) else DocumentTable(numbers, numbers, numbers)


def map_array(path: Path, dtype: str, count: int, first: int = 0, total: int | None = None) -> npt.NDArray[Any]:
    """Map numbers of a file by its path; see `map_open`."""
    try:
        with path.open("rb") as file:
            return map_open(file, str(path), dtype, count, first, total)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def map_open(
    file: BinaryIO, path: str, dtype: str, count: int, first: int = 0, total: int | None = None
) -> npt.NDArray[Any]:
    """Map `count` numbers of an open file, from number `first` on, read-only. The map outlives the open file.

    Args:
        file: the file, which must be on this machine.
        path: its path, for messages.
        dtype: of the numbers.
        count: how many.
        first: the number to begin with.
        total: numbers in the whole file; `first + count` if it is None.

    Raises:
        DataError: the file is missing, or its size is not that of `total` numbers.

    """
    width = np.dtype(dtype).itemsize
    expected = (first + count if total is None else total) * width
    try:
        size = file.seek(0, os.SEEK_END)
        if size != expected:
            raise DataError(f"{path}: has {size} bytes, expected {expected}: the file has changed; restore it")
        if not count:
            return np.empty(0, dtype)
        if not _can_be_mapped(file):  # the cache had no room for it, so it is streamed
            file.seek(first * width)
            return np.frombuffer(file.read(count * width), dtype)
        # Not np.memmap: creating and slicing its objects is several times slower.
        begin = first * width // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        skipped = first * width - begin
        mapped = mmap.mmap(file.fileno(), skipped + count * width, access=mmap.ACCESS_READ, offset=begin)
        return np.frombuffer(mapped, dtype, count, skipped)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _can_be_mapped(file: BinaryIO) -> bool:
    try:
        return file.fileno() >= 0
    except OSError:
        return False
