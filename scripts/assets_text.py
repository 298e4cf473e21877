"""Turn raw text from packages into documents: R data, paragraphs, chapters, pieces. Pure functions, no files.

R data file --read_rdb--> lines --chapters--> (slug, lines) --reflow--> text --cut--> documents
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Final, NamedTuple, TypeVar

T = TypeVar("T")


class Document(NamedTuple):
    """One row of a corpus file: `id` is `<source>/<work or chapter>/<piece>`, `text` is never empty."""

    id: str
    source: str
    licence: str
    text: str


# --- R data ------------------------------------------------------------------------------------------

_STRSXP: Final = 16
_CHARSXP: Final = 9
_TYPE_MASK: Final = 0xFF
_ATTRIBUTE_FLAGS: Final = 0x700  # is-object, has-attributes, has-tag: none of them on a bare vector
_LATIN1: Final = 1 << (2 + 12)
_BYTES: Final = 1 << (1 + 12)


def read_rdb(data: bytes) -> list[list[str]]:
    """Return every character vector of a lazy-load database (`Rdata.rdb`), in file order.

    The file is a run of records: the uncompressed length as a big-endian u32, then a zlib stream that
    holds one serialised R object. Raises ValueError where a record is anything else.
    """
    vectors: list[list[str]] = []
    offset = 0
    while offset < len(data):
        if offset + 4 > len(data):
            raise ValueError(f"R data file: {len(data) - offset} stray bytes at offset {offset}")
        (expected,) = struct.unpack_from(">I", data, offset)
        stream = zlib.decompressobj()
        try:
            # One byte more than announced, so that a wrong length shows without unpacking a bomb.
            record = stream.decompress(data[offset + 4 :], expected + 1)
        except zlib.error as error:
            raise ValueError(f"R data file: damaged record at offset {offset}: {error}") from error
        if len(record) != expected or not stream.eof:
            raise ValueError(f"R data file: the record at offset {offset} does not hold {expected} bytes")
        vectors.append(read_character_vector(record))
        offset = len(data) - len(stream.unused_data)
    return vectors


def read_character_vector(record: bytes) -> list[str]:
    """Decode one R object serialised as XDR, version 3, that must be a plain character vector.

    Layout ("R Internals", Serialization Formats): `X\\n`, three i32 (format version, writer, oldest
    reader), the native encoding (length, name), then the vector: flags, length and, for each string,
    flags, length and bytes. Raises ValueError on another type, on NA, and on bytes left over.
    """
    if record[:2] != b"X\n":
        raise ValueError(f"R object: expected the XDR mark b'X\\n', got {record[:2]!r}")
    reader = _Reader(record, 2)
    version, _writer, _oldest_reader = reader.ints(3)
    if version != 3:
        raise ValueError(f"R object: expected serialisation version 3, got {version}")
    (name_length,) = reader.ints(1)
    if reader.take(name_length) != b"UTF-8":
        raise ValueError("R object: expected the native encoding UTF-8")
    flags, length = reader.ints(2)
    if flags & _TYPE_MASK != _STRSXP or flags & _ATTRIBUTE_FLAGS:
        raise ValueError(f"R object: expected a character vector without attributes, got flags {flags:#x}")
    if length < 0:
        raise ValueError(f"R object: expected fewer than 2**31 strings, got length {length}")
    strings = [_read_string(reader) for _ in range(length)]
    if reader.offset != len(record):
        raise ValueError(f"R object: {len(record) - reader.offset} bytes left over after {length} strings")
    return strings


def _read_string(reader: _Reader) -> str:
    flags, length = reader.ints(2)
    if flags & _TYPE_MASK != _CHARSXP or flags & (_LATIN1 | _BYTES):
        raise ValueError(f"R object: expected an ASCII or UTF-8 string, got flags {flags:#x}")
    return reader.take(length).decode("utf-8")  # UnicodeDecodeError is a ValueError


class _Reader:
    def __init__(self, data: bytes, offset: int) -> None:
        self.data = data
        self.offset = offset

    def take(self, length: int) -> bytes:
        if length < 0 or self.offset + length > len(self.data):
            raise ValueError(f"R object: cannot read {length} bytes at offset {self.offset}")
        self.offset += length
        return self.data[self.offset - length : self.offset]

    def ints(self, number: int) -> tuple[int, ...]:
        return struct.unpack(f">{number}i", self.take(4 * number))


# --- lines to paragraphs -----------------------------------------------------------------------------

_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]")
# One mark on each side; runs of underscores are blanks to fill in or rules of a table.
_EMPHASIS: Final = re.compile(r"(?<!_)_([^_]+)_(?!_)")


def normalise(text: str) -> str:
    r"""Unix line ends; no control characters but `\n` and `\t` (the sources hold one stray \x02)."""
    return _CONTROL.sub(" ", text.replace("\r\n", "\n").replace("\r", "\n"))


def reflow(lines: Sequence[str]) -> str:
    """Join hard-wrapped lines: each paragraph becomes one line, and an empty line separates paragraphs.

    Verse keeps its lines: an indented block in which no line after the first begins with a small letter.
    Runs of blanks become one, and `_emphasis_` loses its typewriter marks.
    """
    paragraphs = [_reflow_block(block) for block in _blocks(lines)]
    return "\n\n".join(_EMPHASIS.sub(r"\1", paragraph) for paragraph in paragraphs)


def _blocks(lines: Sequence[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            block.append(line)
        elif block:
            yield block
            block = []


def _reflow_block(block: list[str]) -> str:
    lines = [" ".join(line.split()) for line in block]
    indented = all(line[0].isspace() for line in block)
    is_verse = indented and not any(_starts_small(line) for line in lines[1:])
    return ("\n" if is_verse else " ").join(lines)


def _starts_small(line: str) -> bool:
    return next((letter.islower() for letter in line if letter.isalpha()), False)


def unflatten(line: str) -> list[str]:
    """Part an indented line that a packager made by replacing line ends with blanks.

    Where the lines of a stanza, each indented by k blanks, were joined by one blank, runs of exactly
    k + 1 blanks mark the old line ends. A line that is not indented comes back as it is.
    """
    indent = len(line) - len(line.lstrip(" "))
    if indent < 2:
        return [line]
    parts = re.split(rf"(?<! ) {{{indent + 1}}}(?! )", line.strip(" "))
    return [" " * indent + part for part in parts]


# --- novels to chapters ------------------------------------------------------------------------------

_HEADING: Final = re.compile(r"(?P<kind>chapter|volume) (?P<number>\d+|[IVXLC]+)", re.IGNORECASE)
_ROMAN: Final = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100}


def chapters(lines: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Cut a novel at its chapter headings into (slug, lines, heading included).

    What stands before the first heading (the title page) is left out; a `VOLUME` heading opens the
    chapter that follows it. Slugs: `chapter-3`, or `volume-2-chapter-3` where the book has volumes.
    Raises ValueError where numbers do not run 1, 2, 3, ...: a heading was missed or invented.
    """
    found: list[tuple[str, list[str]]] = []
    volume = chapter = 0
    opening: list[str] = []
    for line in lines:
        heading = _HEADING.fullmatch(line.strip())
        if heading is None:
            if opening:
                opening.append(line)
            elif found:
                found[-1][1].append(line)
            continue
        number = _number(heading["number"])
        is_volume = heading["kind"].lower() == "volume"
        # Some editions count the chapters through all volumes, others begin again in each.
        expected = {volume + 1} if is_volume else {chapter + 1} | ({1} if opening else set())
        if number not in expected:
            raise ValueError(f"heading {line.strip()!r}: expected number {min(expected)}")
        if is_volume and opening:
            raise ValueError(f"heading {line.strip()!r}: the volume before it has no chapters")
        if is_volume:
            volume, opening = number, [line]
            continue
        chapter = number
        slug = f"volume-{volume}-chapter-{chapter}" if volume else f"chapter-{chapter}"
        found.append((slug, [*opening, line]))
        opening = []
    if not found or opening:
        raise ValueError("the last volume has no chapters" if opening else "no chapter heading found")
    return found


def _number(numeral: str) -> int:
    if numeral.isdigit():
        return int(numeral)
    values = [_ROMAN[letter] for letter in numeral.upper()]
    return sum(-value if value < max(values[i:]) else value for i, value in enumerate(values))


# --- texts to documents ------------------------------------------------------------------------------

# Ends of paragraphs, of sentences (three small letters or digits keep "Mr." and "U.S." out), of words.
_BOUNDARIES: Final = (
    re.compile(r"\n\n"),
    re.compile(r"(?<=[a-z0-9]{3}[.!?])[\"'”’)\]]*\s+(?=[\"'“‘(\[]?[A-Z])"),
    re.compile(r"\s+"),
)


def cut(text: str, max_bytes: int) -> list[str]:
    """Cut `text` into pieces of about equal size, each of at most `max_bytes` of UTF-8.

    The cuts fall between paragraphs; inside a paragraph that is too long by itself between sentences,
    then words, then code points. Nothing is lost but the blanks at a cut. Blank text gives no piece.
    """
    if max_bytes < 4:
        raise ValueError(f"max_bytes: expected at least 4 (one code point), got {max_bytes}")
    text = text.strip()
    if not text:
        return []
    atoms = list(_atoms(text, max_bytes, level=0))
    for parts in count(-(-utf8_length(text) // max_bytes)):
        pieces = ["".join(group).strip() for group in partition(atoms, parts, utf8_length)]
        if all(utf8_length(piece) <= max_bytes for piece in pieces):
            return [piece for piece in pieces if piece]
    raise AssertionError("unreachable: atoms fit by construction")


def _atoms(text: str, max_bytes: int, level: int) -> Iterator[str]:
    """Yield the parts of `text`, its blanks included, in order; each one fits when stripped."""
    if level == len(_BOUNDARIES):
        step = max_bytes // 4
        yield from (text[start : start + step] for start in range(0, len(text), step))
        return
    ends = [match.end() for match in _BOUNDARIES[level].finditer(text)]
    for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
        part = text[start:end]
        if utf8_length(part.strip()) > max_bytes:
            yield from _atoms(part, max_bytes, level + 1)
        elif part:
            yield part


def partition(items: Sequence[T], parts: int, size: Callable[[T], int]) -> list[list[T]]:
    """Group neighbours into at most `parts` runs of about equal total size; no run is empty."""
    total = sum(map(size, items))
    groups: dict[int, list[T]] = {}
    before = 0
    for item in items:
        # The run in which the middle of the item lies; integers, so that every machine agrees.
        middle = 2 * before + size(item)
        groups.setdefault(middle * parts // (2 * total), []).append(item)
        before += size(item)
    return list(groups.values())


def utf8_length(text: str) -> int:
    """Return the length of `text` in bytes of UTF-8."""
    return len(text.encode())
