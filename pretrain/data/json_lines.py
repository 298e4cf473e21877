"""JSON files, plain or compressed: lines of one object each, or one array of objects. The whole file is a read unit."""

import codecs
import io
import json
from collections.abc import Iterator
from functools import cached_property
from typing import IO, BinaryIO

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

    def row_groups(self) -> None:
        """Return None: the rows are not counted, and there are no row groups."""

    def values(self, column: str, limit: int) -> set[str]:
        """Return nothing: that would take reading the whole file."""
        return set()

    def field_names(self) -> list[str]:
        """Return the keys of the first row that is an object; see `TextFile`."""
        for _, content in self._rows(0, 1):
            try:
                row = _parse(content or b"")
            except RowError:
                continue
            if isinstance(row, dict):
                return list(row)
        return []

    def rows(self, unit: Unit, first_row: int, batch_bytes: int) -> Iterator[tuple[int, str | BadRow]]:
        """Yield the rows of a unit; see `pretrain.data.formats.read_unit`.

        Blank lines count as rows without text. Rows before `first_row` are read but not parsed.
        """
        for number, content in self._rows(unit.part + first_row * unit.parts, unit.parts):
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
            content = line if start else line.removeprefix(codecs.BOM_UTF8)
            text = self._text(content, f"the line at byte {start}")
            start += len(line)
            if text is not None:
                yield text

    @cached_property
    def _kind(self) -> str:
        """What a row of the file is: a `line` or an `element`."""
        return "element" if self._is_array() else "line"

    def _is_array(self) -> bool:
        return plain_suffix(self._path) == ".json" and _first_character(self._open()) == b"["

    def _open(self) -> io.BufferedReader:
        return open_contents(self._file, self._path, self._limits.max_zstd_window_bytes)

    def _rows(self, first: int, step: int) -> Iterator[tuple[int, bytes | None]]:
        """Yield the number and the bytes of every `step`-th row from `first` on; None for a row that is too long."""
        number, kind = 0, "line"
        try:
            kind = self._kind
            read = _array_elements if kind == "element" else _lines
            for number, content in read(self._open(), first, step, self._limits.max_document_bytes):
                if number == 0 and content and content.startswith(_UTF16):
                    raise DataError(
                        f"{self._path}: is encoded in UTF-16, expected UTF-8: convert it, for example with "
                        "`iconv -f UTF-16 -t UTF-8`"
                    )
                yield number, content
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


def _array_elements(stream: io.BufferedReader, first: int, step: int, most: int) -> Iterator[tuple[int, bytes | None]]:
    _first_character(stream)
    for number, content in enumerate(elements(stream, most)):
        if number >= first and (number - first) % step == 0:
            yield number, content


def _lines(stream: io.BufferedReader, first: int, step: int, most: int) -> Iterator[tuple[int, bytes | None]]:
    number = _skip_lines(stream, first)
    while line := stream.readline(most + 1):
        long = len(line) > most
        while line and not line.endswith(b"\n") and long:
            line = stream.readline(most)
        if number == 0:
            line = line.removeprefix(codecs.BOM_UTF8)
        yield number, None if long else line
        number += 1 + _skip_lines(stream, step - 1)
        if step == 1 and line.isspace():
            number += _skip_blank_lines(stream)


def _skip_lines(stream: io.BufferedReader, count: int) -> int:
    """Move `count` lines on, or to the end; return how many there were."""
    skipped = 0
    while count - skipped >= _MANY_LINES:
        block = stream.peek()
        if not block:
            return skipped
        ends = block.count(b"\n")
        if skipped + ends > count:
            break
        stream.read(len(block))
        skipped += ends
    while skipped < count and _skip_line(stream):
        skipped += 1
    return skipped


def _skip_blank_lines(stream: io.BufferedReader) -> int:
    """Move past blank lines, of which a compressed file can hold any number; return how many there were."""
    skipped = 0
    while block := stream.peek():
        blanks = block[: len(block) - len(block.lstrip(_BLANKS))]
        end = blanks.rfind(b"\n") + 1
        stream.read(end)
        skipped += blanks.count(b"\n")
        if end < len(block):
            break
    return skipped


def _skip_line(stream: IO[bytes]) -> bool:
    found = line = stream.readline(1 << 20)
    while line and not line.endswith(b"\n"):
        line = stream.readline(1 << 20)
    return bool(found)
