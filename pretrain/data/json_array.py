"""A JSON array of any length, divided into its elements without loading or parsing the whole."""

import re
from collections.abc import Iterator
from typing import IO

_CHUNK_BYTES = 1 << 18
_BACKSLASH = ord("\\")
_MAX_DEPTH = 100_000  # no parser reads this, and each level takes time
_TOP = re.compile(rb'["\[\]{},]')
_NESTED = re.compile(rb'["\[\]{}]')


class ArrayError(Exception):
    """The array itself is malformed, so that the elements after this place cannot be found."""


def elements(stream: IO[bytes], max_bytes: int) -> Iterator[bytes | None]:
    """Yield the bytes of each element, and None for one that is longer than `max_bytes`.

    An element is whatever stands between two commas of the array, so it may be empty or not be JSON; brackets and
    quotes decide alone.

    Args:
        stream: at the bracket that opens the array.
        max_bytes: bounds what is held in memory.

    Raises:
        ArrayError: the array does not end, something other than blanks follows its end, or it is nested without end.

    """
    if stream.read(1) != b"[":
        raise ArrayError("expected an array")
    pieces: list[bytes] = []
    size = count = 0
    for kind, content in _tokens(stream):
        if kind == b"":
            size += len(content)
            if size <= max_bytes:
                pieces.append(content)
            else:
                pieces.clear()
            continue
        element = b"".join(pieces).strip() if size <= max_bytes else None
        if kind == b"," or count or element != b"":  # `[]` has no element
            yield element
        pieces.clear()
        size, count = 0, count + 1


def _tokens(stream: IO[bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Yield (b"", part of an element), and (b"," or b"]", b"") where an element of the outermost array ends."""
    depth, inside, escaped = 1, False, False
    while chunk := stream.read(_CHUNK_BYTES):
        begin, place = 0, int(escaped)  # what the last chunk escapes is skipped
        escaped = False
        while place < len(chunk):
            if inside:
                place, inside, escaped = _end_of_string(chunk, place)
                continue
            found = (_NESTED if depth > 1 else _TOP).search(chunk, place)
            if found is None:
                break
            place = found.end()
            if found[0] == b'"':
                inside = True
            elif found[0] in (b"[", b"{"):
                depth += 1
                if depth > _MAX_DEPTH:
                    raise ArrayError(f"an element is nested more than {_MAX_DEPTH:,} deep")
            elif found[0] == b",":
                yield b"", chunk[begin : place - 1]
                yield b",", b""
                begin = place
            else:
                depth -= 1
                if depth == 0:
                    yield b"", chunk[begin : place - 1]
                    yield b"]", b""
                    _expect_the_end(chunk[place:], stream)
                    return
        yield b"", chunk[begin:]
    raise ArrayError("the file ends in the middle of the array")


def _end_of_string(chunk: bytes, place: int) -> tuple[int, bool, bool]:
    """Go to the end of a string, or of the chunk; `place` is within the string, and not escaped.

    Returns:
        The place behind it, whether the string continues, and whether the first byte of the next chunk is escaped.

    """
    while True:
        quote = chunk.find(b'"', place)
        end = quote if quote >= 0 else len(chunk)
        first = end
        while first > place and chunk[first - 1] == _BACKSLASH:
            first -= 1
        odd = (end - first) % 2 == 1
        if quote < 0:
            return end, True, odd
        place = quote + 1
        if not odd:
            return place, False, False


def _expect_the_end(rest: bytes, stream: IO[bytes]) -> None:
    while not rest.strip():
        rest = stream.read(_CHUNK_BYTES)
        if not rest:
            return
    raise ArrayError(f"{rest.strip()[:40]!r} follows the end of the array")
