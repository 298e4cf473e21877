"""What the data of a run is: for its manifest, and to notice on a resume that it changed."""

import hashlib
from pathlib import Path
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pretrain.config.data import DataConfig, SourceConfig
from pretrain.data.errors import DataError
from pretrain.data.sources import source_files

_HASHED_BYTES = 1 << 20
_MAX_NAMES = 64  # a column with more values than this names rows rather than sources


class FileFingerprint(TypedDict):
    """One file."""

    path: str
    """As the config spells it."""
    bytes: int
    rows: int | None
    """Rows of a parquet file; None for JSON lines, which would have to be read."""
    sha256: str
    """Of the first and the last MiB and the size in decimal digits, in this order."""


class SourceFingerprint(TypedDict):
    """One source of the config."""

    path: str
    sources: list[str]
    """The values of a parquet column `source`, sorted; empty if there is none, or more than 64 values."""
    licences: list[str]
    """The values of a parquet column `licence` or `license`, likewise; if there are none, the config's `licence`."""
    bytes: int
    files: list[FileFingerprint]


class DataFingerprint(TypedDict):
    """All sources, in the order of the config."""

    bytes: int
    sources: list[SourceFingerprint]


def fingerprint(config: DataConfig) -> DataFingerprint:
    """Describe the data, equal on every machine as long as the files are.

    Raises:
        DataError: a file is missing or damaged.

    """
    sources = [_source(source) for source in config.sources]
    return DataFingerprint(bytes=sum(source["bytes"] for source in sources), sources=sources)


def _source(source: SourceConfig) -> SourceFingerprint:
    files: list[FileFingerprint] = []
    names: set[str] = set()
    licences: set[str] = set()
    for path in source_files(source):
        rows = None
        try:
            if path.endswith(".parquet"):
                with pq.ParquetFile(path) as file:
                    rows = file.metadata.num_rows
                    names |= _values(file, "source")
                    licences |= _values(file, "licence") | _values(file, "license")
            size, digest = _digest(path)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        files.append(FileFingerprint(path=path, bytes=size, rows=rows, sha256=digest))
    licences = _few(licences) or ({source.licence} if source.licence else set())
    return SourceFingerprint(
        path=source.path,
        sources=sorted(_few(names)),
        licences=sorted(licences),
        bytes=sum(file["bytes"] for file in files),
        files=files,
    )


def _values(file: pq.ParquetFile, column: str) -> set[str]:
    """The distinct strings of a column; none if there is no such column of strings."""
    schema = file.schema_arrow
    if column not in schema.names:
        return set()
    values: set[Any] = set()
    for batch in file.iter_batches(columns=[column], use_threads=False):
        values.update(pc.unique(batch.column(0)).to_pylist())
        if len(values) > _MAX_NAMES:
            break
    return {value for value in values if isinstance(value, str)}


def _few(values: set[str]) -> set[str]:
    return values if len(values) <= _MAX_NAMES else set()


def _digest(path: str) -> tuple[int, str]:
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(_HASHED_BYTES))
        file.seek(max(0, size - _HASHED_BYTES))
        digest.update(file.read())
    digest.update(str(size).encode())
    return size, digest.hexdigest()
