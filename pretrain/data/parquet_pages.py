"""Pages of a parquet file: how many rows can be decoded at once in bounded memory.

A column chunk is a run of pages, each behind a header that states its size. A few bytes of a file can stand for
gigabytes: a page of zeros, a value of a dictionary that comes back in every row, or values that repeat the one before
(`DELTA_BYTE_ARRAY`). pyarrow has no limit for any of these, so the headers are looked at first, where the sizes in the
footer leave room for it. The layout of a header is that of `parquet.thrift`, in Thrift's compact protocol.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

T = TypeVar("T")

MAX_BATCH_BYTES = 256 << 20
"""About the most memory that the decoded values of a batch may take."""

_MAX_BATCH_ROWS = 4096
_MAX_VALUES = 1 << 27  # of lists, in a row group
# Text is compressed to a tenth at most; a chunk that is compressed more than this needs a look at its pages.
_SUSPICIOUS_RATIO = 30
_DICTIONARY_PAGE = 2
_BOOLEANS, _NUMBERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = (1, 2), (3, 4, 5, 6), 7, 8, (9, 10), 12
_MAX_HEADER_BYTES = 16 << 20  # pyarrow's own limit
_MAX_DEPTH = 8


class PageError(Exception):
    """A row group cannot be decoded in bounded memory; the message continues a sentence that begins with its name."""


@dataclass(frozen=True, slots=True)
class Page:
    """What the header of a page states."""

    is_dictionary: bool
    bytes: int
    """Its size after decompression."""
    values: int


def rows_at_once(file: BinaryIO, group: Any, leaves: Iterable[int], batch_bytes: int, max_page_bytes: int) -> int:
    """Return how many rows of a row group to decode in a batch.

    Args:
        file: the open file.
        group: the row group's metadata.
        leaves: the primitive columns that are read.
        batch_bytes: about how large a batch of average rows is to be.
        max_page_bytes: a page that is larger, and compressed as no text is, is refused.

    Raises:
        PageError: a page is too large, or a row group holds too many values of a list.

    """
    chunks = [group.column(leaf) for leaf in leaves]
    size = sum(chunk.total_uncompressed_size for chunk in chunks)
    rows = min(_MAX_BATCH_ROWS, batch_bytes // max(1, size // max(1, group.num_rows)))
    largest = sum(_largest_per_row(file, chunk, group.num_rows, max_page_bytes) for chunk in chunks)
    return max(1, min(rows, int(MAX_BATCH_BYTES // max(1, largest))))


def _largest_per_row(file: BinaryIO, chunk: Any, rows: int, max_page_bytes: int) -> float:
    """The most bytes per row that any part of a column chunk takes; 0 if that cannot be much."""
    name, repeated = chunk.path_in_schema, chunk.num_values / max(1, rows)
    if chunk.num_values > max(_MAX_VALUES, rows):
        raise PageError(f"holds {chunk.num_values:,} values in column {name!r}, more than the {_MAX_VALUES:,} expected")
    total = chunk.total_uncompressed_size
    suspicious = total > MAX_BATCH_BYTES and total > _SUSPICIOUS_RATIO * chunk.total_compressed_size
    repeats = "DELTA_BYTE_ARRAY" in chunk.encodings
    largest = 0.0
    for page in _pages(file, chunk):
        if page.bytes > max_page_bytes and (suspicious or page.bytes > total):
            raise PageError(
                f"holds a page of {page.bytes / 2**20:,.0f} MiB in column {name!r}, more than "
                f"{max_page_bytes >> 20:,} MiB (4 times data.max_document_mib), and compressed to less than a "
                f"{_SUSPICIOUS_RATIO}th: write the file again with smaller pages, or raise data.max_document_mib"
            )
        if page.is_dictionary and chunk.physical_type != "BYTE_ARRAY":
            continue
        # Any row may hold all of a dictionary, or repeat all that stands before it in its page.
        whole = page.is_dictionary or repeats
        largest = max(largest, page.bytes * (1 if whole else 1 / max(1, page.values)) * max(1, repeated))
        if not (suspicious or repeats):
            break  # the first page is the dictionary, if there is one
    return largest


def _pages(file: BinaryIO, chunk: Any) -> Iterator[Page]:
    """Read the headers of a column chunk's pages, up to one that is damaged, which decoding will report."""
    place = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        place = min(place, chunk.dictionary_page_offset)
    end = place + chunk.total_compressed_size
    while place < end:
        file.seek(place)
        try:
            header = _read_struct(file, place + _MAX_HEADER_BYTES)
            kind, size, compressed = (_typed(header, field, int) for field in (1, 2, 3))
            parts = (_typed(header, field, dict) for field in (7 if kind == _DICTIONARY_PAGE else 5, 8))
            values = _typed(next(filter(None, parts), {}), 1, int)
        except _HeaderError:
            return
        if compressed < 0:
            return
        yield Page(kind == _DICTIONARY_PAGE, size, values)
        place = file.tell() + compressed


def _typed(found: dict[int, Any], field: int, kind: type[T]) -> T:
    """Return a field of a struct; zero or empty if it is missing. A damaged header has fields of other types."""
    value = found.get(field, kind())
    if not isinstance(value, kind):
        raise _HeaderError
    return value


class _HeaderError(Exception):
    """A header is not of Thrift's compact protocol, or not that of a page."""


def _read_struct(file: BinaryIO, end: int, depth: int = 0) -> dict[int, Any]:
    """Read a struct: numbers and structs by the number of their field; what else it holds is skipped."""
    found: dict[int, Any] = {}
    field = 0
    while head := _read(file, 1, end)[0]:
        step, kind = head >> 4, head & 15
        field = field + step if step else _signed(_varint(file, end))
        value = _value(file, kind, end, depth + 1)
        if value is not None:
            found[field] = value
    return found


def _value(file: BinaryIO, kind: int, end: int, depth: int) -> Any:
    """Read a value of a struct or a list; None for what is skipped."""
    if depth > _MAX_DEPTH:
        raise _HeaderError
    if kind in _BOOLEANS:
        return None
    if kind in _NUMBERS:
        return _read(file, 1, end)[0] if kind == _NUMBERS[0] else _signed(_varint(file, end))
    if kind == _STRUCT:
        return _read_struct(file, end, depth)
    if kind == _DOUBLE:
        _read(file, 8, end)
    elif kind == _BINARY:
        _read(file, _varint(file, end), end)
    elif kind in _LISTS:
        head = _read(file, 1, end)[0]
        for _ in range(_varint(file, end) if head >> 4 == 15 else head >> 4):
            # In a list, a boolean has a byte of its own.
            _value(file, _NUMBERS[0] if head & 15 in _BOOLEANS else head & 15, end, depth + 1)
    else:  # no header holds a map
        raise _HeaderError
    return None


def _read(file: BinaryIO, count: int, end: int) -> bytes:
    if file.tell() + count > end:
        raise _HeaderError
    content = file.read(count)
    if len(content) < count:
        raise _HeaderError
    return content


def _varint(file: BinaryIO, end: int) -> int:
    number = 0
    for shift in range(0, 70, 7):
        byte = _read(file, 1, end)[0]
        number |= (byte & 127) << shift
        if byte < 128:
            return number
    raise _HeaderError


def _signed(number: int) -> int:
    """Undo the zigzag encoding of a signed number."""
    return number >> 1 ^ -(number & 1)
