"""JSON files, plain or compressed: lines of one object each, or one array of objects. The whole file is a read unit."""

import codecs
import io
import json
from collections.abc import Iterator
from functools import cached_property
from typing import BinaryIO

from pretrain.data.bad_rows import BadRow
from pretrain.data.compression import DAMAGE, compression_of, open_contents, plain_suffix
from pretrain.data.errors import DamagedFileError, DataError
from pretrain.data.json_array import ArrayError, elements
from pretrain.data.json_fields import JsonRecipe, RowError
from pretrain.data.units import TextRecipe, Unit

# The next line is looked for in blocks, not line by line, if at least this many are to be skipped.
_MANY_LINES = 64
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, b"{\0", b"\0{", b"[\0", b"\0[")
_BLANKS = b" \t\r\n"

_Row = tuple[int, bytes | None, int, int]
"""Number and bytes of a row, None if it is too long; of lines, also where the line after the previous row of the unit
begins, and where the line after this one does."""


class JsonText:
    """The texts of an open JSON file; implements `pretrain.data.formats.TextFile`.

    A file `.json` may hold one array; whether it does, its first character tells. All other files hold lines.

    Args:
        file: the open file. It stays open when this object is dropped.
        path: its name; its suffixes tell the kind and the compression.
        recipe: which rows are read and how they become text.

    """

    def __init__(self, file: BinaryIO, path: str, recipe: TextRecipe) -> None:
        self._file, self._path, self._limits = file, path, recipe
        self._recipe = JsonRecipe(recipe)
        self.row_bytes = (0, 0)
        """See `TextFile`; zeros in a compressed file and in an array, which are always read from their beginning."""

    def row_groups(self) -> None:
        """Return None: the rows are not counted, and there are no row groups."""

    def values(self, column: str, limit: int) -> set[str]:
        """Return nothing: that would take reading the whole file."""
        return set()

    def field_names(self) -> list[str]:
        """Return the keys of the first row that is an object; see `TextFile`."""
        for _, content, *_ in self._rows(0, 1):
            try:
                row = _parse(content or b"")
            except RowError:
                continue
            if isinstance(row, dict):
                return list(row)
        return []

    def rows(
        self, unit: Unit, first_row: int, batch_bytes: int, first_byte: int = 0
    ) -> Iterator[tuple[int, str | BadRow]]:
        """Yield the rows of a unit; see `TextFile`.

        Blank lines count as rows without text. Rows before `first_row` are read but not parsed, or not even read if
        `first_byte` says where the line after the previous row of the unit begins.
        """
        first = unit.part + first_row * unit.parts
        for number, content, *places in self._rows(first, unit.parts, first_byte):
            if self._has_places:
                self.row_bytes = places[0], places[1]
            text = self._text(content, f"{self._kind} {number + 1}")
            if text is not None:
                yield number // unit.parts, text

    def last_texts(self, units: list[Unit], sample_bytes: int) -> Iterator[str | BadRow]:
        """Yield the texts of the last bytes; none of a compressed file or an array, whose end cannot be read alone."""
        if compression_of(self._path) or self._kind == "element":
            return
        start = max(0, self._file.seek(0, io.SEEK_END) - sample_bytes)
        self._file.seek(start)
        if start:
            start += len(self._file.readline())  # most likely the end of a line
        for line in self._file:
            text = self._text(line.removeprefix(codecs.BOM_UTF8), f"the line at byte {start}")
            start += len(line)
            if text is not None:
                yield text

    @cached_property
    def _kind(self) -> str:
        """What a row of the file is: a `line` or an `element`."""
        return "element" if self._is_array() else "line"

    def _is_array(self) -> bool:
        return plain_suffix(self._path) == ".json" and _first_character(self._open()) == b"["

    @cached_property
    def _has_places(self) -> bool:
        return compression_of(self._path) is None and self._kind == "line"

    def _is_line(self, byte: int) -> bool:
        """Return whether a line other than the first may begin at a byte, or the file ends there."""
        if byte <= 0 or not self._has_places:
            return False
        if byte == self._file.seek(0, io.SEEK_END):
            return True
        self._file.seek(byte - 1)
        return self._file.read(1) == b"\n"

    def _open(self, first_byte: int = 0) -> io.BufferedReader:
        return open_contents(self._file, self._path, self._limits.max_zstd_window_bytes, first_byte)

    def _rows(self, first: int, step: int, first_byte: int = 0) -> Iterator[_Row]:
        """Yield every `step`-th row from `first` on.

        Args:
            first: number of the first row in the file.
            step: distance to the next one.
            first_byte: where the line after row `first - step` begins; ignored if no line can begin there.

        """
        number, kind = 0, "line"
        try:
            kind = self._kind
            most = self._limits.max_document_bytes
            if kind == "element":
                rows = _array_elements(self._open(), first, step, most)
            else:
                start = (first - step + 1, first_byte) if self._is_line(first_byte) else (0, 0)
                rows = _Lines(self._open(start[1]), *start).rows(first, step, most)
            for row in rows:
                number, content, *_ = row
                if number == 0 and content and content.startswith(_UTF16):
                    raise DataError(
                        f"{self._path}: is encoded in UTF-16, expected UTF-8: convert it, for example with "
                        "`iconv -f UTF-16 -t UTF-8`"
                    )
                yield row
                number += 1
        except DAMAGE as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise DataError(f"{self._path}: cannot be read: {error}") from error
            raise DamagedFileError(
                f"{self._path}: damaged after {kind} {number}: {error}; fetch or write it again", self._path
            ) from error
        except ArrayError as error:
            raise DamagedFileError(
                f"{self._path}: damaged after {kind} {number}: {error}; fetch or write it again", self._path
            ) from error

    def _text(self, content: bytes | None, place: str) -> str | BadRow | None:
        """Return the text of a row; None for a blank line."""
        where = f"{self._path}: {place}"
        if content is None:
            most = self._limits.max_document_bytes >> 20
            problem = f"{where} is longer than the {most} MiB of data.max_document_mib"
            return BadRow(self._path, place, problem)
        if not content.strip() and self._kind == "line":
            return None
        try:
            return self._recipe.text(_parse(content))
        except RowError as error:
            return BadRow(self._path, place, f"{where}{error}")


def _parse(content: bytes) -> object:
    try:
        text = content.decode()
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # an integer of more digits than Python converts, which JSON allows
            return json.loads(text, parse_int=_number)
    except UnicodeDecodeError as error:
        raise RowError(f" is not valid UTF-8: {error}") from error
    except (ValueError, RecursionError) as error:
        raise RowError(f" is not valid JSON: {error}") from error


def _number(digits: str) -> int | float:
    try:
        return int(digits)
    except ValueError:
        return float(digits)  # infinity, which is larger than any number that a condition can name


def _first_character(stream: io.BufferedReader) -> bytes:
    """Return the first byte that is neither blank nor of a byte order mark, leaving the stream before it."""
    if stream.peek()[: len(codecs.BOM_UTF8)] == codecs.BOM_UTF8:
        stream.read(len(codecs.BOM_UTF8))
    while block := stream.peek():
        rest = block.lstrip(_BLANKS)
        stream.read(len(block) - len(rest))
        if rest:
            return rest[:1]
    return b""


def _array_elements(stream: io.BufferedReader, first: int, step: int, most: int) -> Iterator[_Row]:
    _first_character(stream)
    for number, content in enumerate(elements(stream, most)):
        if number >= first and (number - first) % step == 0:
            yield number, content, 0, 0


class _Lines:
    """The lines of a stream that begins with line `number` at byte `byte` of the file."""

    def __init__(self, stream: io.BufferedReader, number: int, byte: int) -> None:
        self._stream, self._number, self._byte = stream, number, byte

    def rows(self, first: int, step: int, most: int) -> Iterator[_Row]:
        """Yield every `step`-th line from line `first` on; None for the bytes of one that is longer than `most`."""
        self._skip(first - step + 1 - self._number)
        while True:
            begin = self._byte
            if self._number < first:
                self._skip(first - self._number)
            line = self._stream.readline(most + 1)
            if not line:
                return
            self._byte += len(line)
            long = len(line) > most
            while long and line and not line.endswith(b"\n"):
                line = self._stream.readline(most)
                self._byte += len(line)
            line = line.removeprefix(codecs.BOM_UTF8)  # of the file, or of one that was joined to it
            yield first, None if long else line, begin, self._byte
            self._number = first + 1
            if step == 1 and line.isspace():
                first += self._skip_blank_lines()
            first += step

    def _skip(self, count: int) -> None:
        """Move `count` lines on, or to the end."""
        end = self._number + count
        while end - self._number >= _MANY_LINES:
            block = self._stream.peek()
            if not block:
                return
            ends = block.count(b"\n")
            if self._number + ends >= end:
                break  # the block may hold the beginning of the line at the end
            self._stream.read(len(block))
            self._byte += len(block)
            self._number += ends
        while self._number < end and self._skip_line():
            self._number += 1

    def _skip_line(self) -> bool:
        found = line = self._stream.readline(1 << 20)
        self._byte += len(line)
        while line and not line.endswith(b"\n"):
            line = self._stream.readline(1 << 20)
            self._byte += len(line)
        return bool(found)

    def _skip_blank_lines(self) -> int:
        """Move past blank lines, of which a compressed file can hold any number; return how many there were."""
        skipped = 0
        while block := self._stream.peek():
            blanks = block[: len(block) - len(block.lstrip(_BLANKS))]
            end = blanks.rfind(b"\n") + 1
            self._stream.read(end)
            self._byte += end
            skipped += blanks.count(b"\n")
            if end < len(block):
                break
        self._number += skipped
        return skipped
