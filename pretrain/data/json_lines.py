"""Files of JSON lines, plain or compressed: the whole file is a read unit, and one key holds the text."""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from typing import IO, Any, BinaryIO

import zstandard

from pretrain.data.errors import DataError
from pretrain.data.sources import size_of
from pretrain.data.units import TextRecipe, Unit

# Compressed bytes read at a time: bounds what a zstd file may expand to in memory.
_CHUNK_BYTES = 1 << 17


class JsonLinesText:
    """The texts of an open file of JSON lines; implements `pretrain.data.formats.TextFile`.

    Args:
        file: the open file. It stays open when this object is dropped.
        path: its name; its suffix tells the compression.
        recipe: how a row becomes text.

    """

    def __init__(self, file: BinaryIO, path: str, recipe: TextRecipe) -> None:
        self._file, self._path, self._text_field = file, path, recipe.text_field

    def row_groups(self) -> None:
        """Return None: the rows are not counted, and there are no row groups."""

    def values(self, column: str, limit: int) -> set[str]:
        """Return nothing: that would take reading the whole file."""
        return set()

    def rows(self, unit: Unit, first_row: int, batch_bytes: int) -> Iterator[tuple[int, str]]:
        """Yield (row, text) of a unit; see `pretrain.data.formats.read_unit`.

        Blank lines count as rows without text. Lines before `first_row` are read but not parsed.
        """
        wanted = unit.part + first_row * unit.parts
        for number, line in enumerate(self._lines()):
            if number == wanted:
                if number == 0:
                    line = line.removeprefix(codecs.BOM_UTF8)
                text = parse_line(line, f"{self._path}: line {number + 1}", self._text_field)
                if text is not None:
                    yield wanted // unit.parts, text
                wanted += unit.parts

    def last_texts(self, units: list[Unit], sample_bytes: int) -> Iterator[str]:
        """Yield the texts of the last bytes; none of a compressed file, whose end cannot be read on its own."""
        if not self._path.endswith(".jsonl"):
            return
        start = max(0, self._file.seek(0, io.SEEK_END) - sample_bytes)
        self._file.seek(start)
        if start:
            start += len(self._file.readline())  # most likely the end of a line
        for line in self._file:
            content = line if start else line.removeprefix(codecs.BOM_UTF8)
            text = parse_line(content, f"{self._path}: the line at byte {start}", self._text_field)
            start += len(line)
            if text is not None:
                yield text

    def _lines(self) -> Iterator[bytes]:
        if not size_of(self._file) and not self._path.endswith(".jsonl"):
            raise DataError(f"{self._path}: damaged after line 0: the file is empty, which a compressed file never is")
        lines = _decompressed(self._file, self._path)
        number = 0
        while line := _next_line(lines, f"{self._path}: damaged after line {number}"):
            yield line
            number += 1


def _next_line(lines: IO[bytes], problem: str) -> bytes:
    try:
        return lines.readline()
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{problem}: {error}") from error


def parse_line(line: bytes, where: str, text_field: str) -> str | None:
    """Return the text of a JSON line; None for a blank one.

    Raises:
        DataError: the line is not UTF-8 or not a JSON object, or its text is missing, not a string or not valid
            Unicode.

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


def _decompressed(raw: BinaryIO, path: str) -> IO[bytes]:
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=raw))
    if path.endswith(".zst"):
        return io.BufferedReader(_ZstdFile(raw), _CHUNK_BYTES)
    return raw


class _ZstdFile(io.RawIOBase):
    """The contents of a zstd file of one or more frames.

    zstandard's own stream reader treats a file that was cut short as complete; this class raises EOFError.
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
