"""A JSON array of any length, divided into its elements without loading or parsing the whole."""

import re
from collections.abc import Iterator
from typing import IO

_CHUNK_BYTES = 1 << 18
_OUTSIDE = re.compile(rb'["\[\]{},]')
# The rest of a string, or as much of it as is there: up to its closing quote, or to a backslash at the very end.
_INSIDE = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)


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
        ArrayError: the array does not end, or something other than blanks follows its end.

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
        begin = place = 0
        if escaped:
            place, escaped = 1, False
        while place < len(chunk):
            if inside:
                match = _INSIDE.match(chunk, place)
                place = match.end() if match else place
                if place < len(chunk):
                    escaped = chunk[place] == ord("\\")  # at the end: what it escapes is in the next chunk
                    inside = escaped
                    place += 1
                continue
            found = _OUTSIDE.search(chunk, place)
            if found is None:
                break
            place = found.end()
            if found[0] == b'"':
                inside = True
            elif found[0] in (b"[", b"{"):
                depth += 1
            elif found[0] in (b"]", b"}"):
                depth -= 1
                if depth == 0:
                    yield b"", chunk[begin : found.start()]
                    yield b"]", b""
                    _expect_the_end(chunk[place:], stream)
                    return
            elif depth == 1:
                yield b"", chunk[begin : found.start()]
                yield b",", b""
                begin = place
        yield b"", chunk[begin:]
    raise ArrayError("the file ends in the middle of the array")


def _expect_the_end(rest: bytes, stream: IO[bytes]) -> None:
    while rest:
        if rest.strip():
            raise ArrayError(f"{rest.strip()[:40]!r} follows the end of the array")
        rest = stream.read(_CHUNK_BYTES)
