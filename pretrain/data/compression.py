"""Compressed files: what a suffix says, and the contents as a stream of bytes, in bounded memory."""

import gzip
import io
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal

import zstandard

from pretrain.data.errors import DataError
from pretrain.data.sources import size_of

Compression = Literal["gzip", "zstd"]

COMPRESSIONS: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd", ".zstd": "zstd"}
"""What the last suffix of a file name says, in lower case."""

DAMAGE = (OSError, EOFError, zlib.error, zstandard.ZstdError)
"""What reading a damaged file raises. An OSError with an `errno` comes from the system instead."""

_BUFFER_BYTES = 1 << 18
# Compressed bytes that are decompressed in one call. zstd can expand each of them to 32 KiB, and has no limit for the
# output of a call, so this bounds the memory.
_ZSTD_STEP_BYTES = 1 << 12
_ZSTD_HEADER_BYTES = 18  # the longest frame header


def compression_of(path: str) -> Compression | None:
    """Return how a file is compressed, by its name; None if it is not."""
    return next((kind for suffix, kind in COMPRESSIONS.items() if path.lower().endswith(suffix)), None)


def plain_suffix(path: str) -> str:
    """Return the suffix of a file name below that of the compression, in lower case: `.json` of `a.JSON.gz`."""
    name = path.lower()
    if compression_of(name):
        name = name.rpartition(".")[0]
    return "." + name.rpartition(".")[2]


def open_contents(file: BinaryIO, path: str, max_window_bytes: int, first_byte: int = 0) -> io.BufferedReader:
    """Return the contents of an open file from `first_byte` on; dropping the result leaves `file` open.

    gzip files may have several members and zstd files several frames. Reading raises one of `DAMAGE` if the file is
    damaged, a file that was cut short included.

    Args:
        file: the open file.
        path: its name, which says how it is compressed.
        max_window_bytes: the largest zstd window that is accepted, which is the memory that it takes.
        first_byte: where to begin in a file that is not compressed; others are always read from their beginning.

    Raises:
        DataError: a compressed file is empty, or needs a larger window (while reading).

    """
    compression = compression_of(path)
    if compression is None:
        file.seek(first_byte)
        return io.BufferedReader(_Chunks(_plain_chunks(file)), _BUFFER_BYTES)
    if not size_of(file):
        raise DataError(f"{path}: the file is empty, which a compressed file never is: fetch or write it again")
    if compression == "gzip":
        return io.BufferedReader(_Chunks(_gzip_chunks(file)), _BUFFER_BYTES)
    return io.BufferedReader(_Chunks(_zstd_chunks(file, path, max_window_bytes)), _BUFFER_BYTES)


class _Chunks(io.RawIOBase):
    """Chunks of bytes as a stream."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
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


def _plain_chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(_BUFFER_BYTES):
        yield chunk


def _gzip_chunks(file: BinaryIO) -> Iterator[bytes]:
    """Decompress all members; what precedes damage is yielded before the error is raised."""
    contents = gzip.GzipFile(fileobj=file)
    while chunk := contents.read1(_BUFFER_BYTES):
        yield chunk


def _zstd_chunks(file: BinaryIO, path: str, max_window_bytes: int) -> Iterator[bytes]:
    """Decompress all frames; zstandard's own stream reader treats a file that was cut short as complete."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=max_window_bytes)
    frame, header = decompressor.decompressobj(), b""
    while block := file.read(_BUFFER_BYTES):
        for begin in range(0, len(block), _ZSTD_STEP_BYTES):
            step = block[begin : begin + _ZSTD_STEP_BYTES]
            while step:
                if frame.eof:
                    frame, header = decompressor.decompressobj(), b""
                if len(header) < _ZSTD_HEADER_BYTES:
                    header += step[: _ZSTD_HEADER_BYTES - len(header)]
                    _check_window(header, path, max_window_bytes)
                yield frame.decompress(step)
                step = frame.unused_data
    if not frame.eof:
        raise EOFError("the zstd file ends in the middle of a frame")


def _check_window(header: bytes, path: str, max_window_bytes: int) -> None:
    try:
        window = zstandard.get_frame_parameters(header).window_size
    except zstandard.ZstdError:
        return  # not complete yet, or damaged, which decompressing reports
    if window > max_window_bytes:
        raise DataError(
            f"{path}: is compressed with a zstd window of {window / 2**20:,.0f} MiB, more than the "
            f"{max_window_bytes >> 20} MiB of data.max_zstd_window_mib: raise that key (every open file takes as much "
            "memory), or compress the file again without --long"
        )
