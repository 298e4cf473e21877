"""Rows of one read unit: (row, text) from a parquet row group or a file of JSON lines.

Rows are counted from 0 within the unit, in the file's order. A unit that is part `k` of `n` holds every n-th row of
its file or row group, beginning with row `k`. Files are read in batches, never as a whole.
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from pretrain.data.errors import DataError

JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
SUFFIXES = (".parquet", *JSON_SUFFIXES)

# Compressed bytes read at a time: bounds what a zstd file may expand to in memory.
_CHUNK_BYTES = 1 << 17
_MAX_BATCH_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Unit:
    """What a lane reads at a time: every `parts`-th row, from row `part` on, of a file or of a row group of it."""

    path: str
    text_field: str
    row_group: int | None  # None: a file of JSON lines
    rows: int | None  # of the row group; None: not known
    part: int
    parts: int


def read_unit(unit: Unit, first_row: int, batch_bytes: int) -> Iterator[tuple[int, str]]:
    """Yield (row, text) of a unit from `first_row` on, holding about `batch_bytes` of text in memory.

    Raises:
        DataError: the file is missing or damaged, or a row holds no valid text.

    """
    if unit.row_group is None:
        yield from _json_rows(unit, first_row)
    else:
        yield from _parquet_rows(unit, first_row, batch_bytes)


# --- parquet ---------------------------------------------------------------------------------------------------


def open_parquet(path: str, text_field: str) -> pq.ParquetFile:
    """Open a parquet file and see that its text column can be read.

    Raises:
        DataError: the file is missing or damaged, lacks the column, or the column holds something else than text.

    """
    try:
        # Column chunks are read through a small buffer: they may be larger than the memory for all lanes together.
        file = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet: {error}") from error
    schema = file.schema_arrow
    if text_field not in schema.names:
        file.close()
        raise DataError(
            f"{path}: has no column {text_field!r}; its columns are {', '.join(schema.names) or 'none'}: "
            "set text_field to the one that holds the text"
        )
    kind = schema.field(text_field).type
    if not _is_text(kind.value_type if pa.types.is_dictionary(kind) else kind):
        file.close()
        raise DataError(f"{path}: column {text_field!r} holds {kind}, expected string")
    return file


def _is_text(kind: Any) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _parquet_rows(unit: Unit, first_row: int, batch_bytes: int) -> Iterator[tuple[int, str]]:
    """Rows of a row group, read by column; rows before `first_row` are decoded but never become Python objects."""
    wanted = unit.part + first_row * unit.parts  # row of the row group
    base = 0  # row of the row group that the batch begins with
    with open_parquet(unit.path, unit.text_field) as file:
        batches = file.iter_batches(
            _rows_per_batch(file, unit, batch_bytes),
            row_groups=[unit.row_group],
            columns=[unit.text_field],
            use_threads=False,
        )
        while (batch := _next_batch(batches, unit)) is not None:
            end = base + batch.num_rows
            if wanted < end:
                rows = range(wanted - base, batch.num_rows, unit.parts)
                for text in _texts(batch.column(0), rows, unit, base):
                    yield wanted // unit.parts, text
                    wanted += unit.parts
            base = end


def _next_batch(batches: Iterator[pa.RecordBatch], unit: Unit) -> pa.RecordBatch | None:
    try:
        return next(batches, None)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{unit.path}: row group {unit.row_group} is damaged: {error}") from error


def _rows_per_batch(file: pq.ParquetFile, unit: Unit, batch_bytes: int) -> int:
    group = file.metadata.row_group(unit.row_group)
    chunk = group.column(file.schema_arrow.get_field_index(unit.text_field))
    bytes_per_row = max(1, chunk.total_uncompressed_size // max(1, group.num_rows))
    return max(1, min(_MAX_BATCH_ROWS, batch_bytes // bytes_per_row))


def _texts(column: pa.Array, rows: range, unit: Unit, base: int) -> list[str]:
    """The chosen rows of a batch as Python strings, each of them checked."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    column = column.slice(rows.start) if rows.step == 1 else column.take(pa.array(rows))
    if column.null_count == 0:
        try:
            return column.to_pylist()
        except UnicodeDecodeError:
            pass  # found again below, one by one, to name the row
    for row, value in zip(rows, column, strict=True):
        where = f"{unit.path}: row {base + row} of row group {unit.row_group} (both counted from 0)"
        try:
            if value.as_py() is None:
                raise DataError(f"{where} holds no text in {unit.text_field!r}: remove such rows from the file")
        except UnicodeDecodeError as error:
            raise DataError(f"{where} is not valid UTF-8: {error}") from error
    raise AssertionError("a batch that failed as a whole has a faulty row")


# --- JSON lines ------------------------------------------------------------------------------------------------


def _json_rows(unit: Unit, first_row: int) -> Iterator[tuple[int, str]]:
    """Lines of a file; blank ones count as rows without text. Those before `first_row` are read, not parsed."""
    wanted = unit.part + first_row * unit.parts
    for number, line in enumerate(read_lines(unit.path)):
        if number == wanted:
            text = parse_line(line, f"{unit.path}: line {number + 1}", unit.text_field)
            if text is not None:
                yield wanted // unit.parts, text
            wanted += unit.parts


def read_lines(path: str) -> Iterator[bytes]:
    """Yield the lines of a plain, gzip or zstd file as bytes.

    Raises:
        DataError: the file is missing, unreadable, damaged or cut short.

    """
    try:
        raw = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    number = 0
    with raw, _decompressed(raw, Path(path).suffix) as lines:
        while line := _next_line(lines, f"{path}: damaged after line {number}"):
            yield line
            number += 1


def _next_line(lines: IO[bytes], problem: str) -> bytes:
    try:
        return lines.readline()
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{problem}: {error}") from error


def parse_line(line: bytes, where: str, text_field: str) -> str | None:
    """The text of a JSON line; None for a blank one.

    Raises:
        DataError: the line is no UTF-8, no JSON object, or its text is missing, no string or no valid Unicode.

    """
    if not line.strip():
        return None
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not valid UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} holds a JSON {type(row).__name__}, expected an object with a key {text_field!r}")
    if text_field not in row:
        keys = ", ".join(row) or "none"
        raise DataError(f"{where} has no key {text_field!r}; its keys are {keys}: set text_field to the text's")
    text = row[text_field]
    if not isinstance(text, str):
        raise DataError(f"{where}: {text_field!r} holds {type(text).__name__}, expected a string")
    try:
        text.encode()  # JSON escapes can spell half a surrogate pair, which no encoding can write
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {text_field!r} is not valid Unicode: {error}") from error
    return text


def _decompressed(raw: IO[bytes], suffix: str) -> IO[bytes]:
    if suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if suffix == ".zst":
        return io.BufferedReader(_ZstdFile(raw), _CHUNK_BYTES)
    return raw


class _ZstdFile(io.RawIOBase):
    """The contents of a zstd file of one or more frames.

    zstandard's own stream reader takes a file that was cut short for a complete one; this raises EOFError.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._chunks = _zstd_chunks(raw)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk)
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def _zstd_chunks(raw: IO[bytes]) -> Iterator[bytes]:
    # Files written with `zstd --long` need windows beyond the library's default limit.
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = decompressor.decompressobj()
    while chunk := raw.read(_CHUNK_BYTES):
        while chunk:
            if frame.eof:
                frame = decompressor.decompressobj()
            yield frame.decompress(chunk)
            chunk = frame.unused_data
    if not frame.eof:
        raise EOFError("the zstd file ends in the middle of a frame")
