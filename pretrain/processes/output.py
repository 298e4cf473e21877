"""Standard output and error that nobody reads any more (``| head``, a dead `tee`, a closed terminal, a full disk)."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any

STREAMS = ("stdout", "stderr")


def open_closed_streams() -> None:
    """Open the null device in the place of each standard stream that this process was started without (``>&-``).

    Otherwise the next file that is opened would become the standard output, and receive what libraries print. What a
    stream cannot encode is escaped from now on, instead of being an error.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number, which is this one
    for name in STREAMS:
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper and not stream.closed and stream.errors in ("strict", "surrogateescape"):
            # A document or the name of a file may hold what the encoding of the terminal does not know.
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def output_may_fail(work: str) -> Iterator[None]:
    """Drop what is printed to a standard stream that cannot be written to, instead of raising an error.

    Args:
        work: what continues, for the one warning that the other stream receives.
    """
    before = {name: getattr(sys, name) for name in STREAMS}
    for name, stream in before.items():
        if replaced := _tolerant(name, stream, work):
            setattr(sys, name, replaced)
    try:
        yield
    finally:
        for name, stream in before.items():
            with contextlib.suppress(OSError, ValueError):
                getattr(sys, name).flush()
            setattr(sys, name, stream)


def drop_what_cannot_be_written() -> None:
    """Empty the buffers of the standard streams, so that Python does not end with code 120 because of them."""
    for name in STREAMS:
        stream = getattr(sys, name)
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class _Tolerant(io.RawIOBase):
    """A descriptor to which writing always succeeds."""

    def __init__(self, name: str, descriptor: int, work: str) -> None:
        self._name, self._descriptor, self._work = name, descriptor, work
        self._warned = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def write(self, data: object) -> int:
        content = memoryview(data).cast("B")  # type: ignore[arg-type]
        try:
            return os.write(self._descriptor, content)
        except BlockingIOError:
            waiting = select.poll()  # somebody has made the pipe non-blocking
            waiting.register(self._descriptor, select.POLLOUT)
            waiting.poll(1000)
            return 0
        except OSError as error:
            if not self._warned:
                self._warned = True
                other = {"stdout": 2, "stderr": 1}[self._name]
                whole = {"stdout": "standard output", "stderr": "standard error"}[self._name]
                text = f"warning: {whole} failed ({error.strerror}); {self._work} continues silently\n"
                with contextlib.suppress(OSError):
                    os.write(other, text.encode())
            return len(content)


class _Unbuffered(io.BufferedWriter):
    """Writes everything immediately; unlike a raw stream it repeats a write of which only a part was taken."""

    def write(self, data: Any) -> int:
        count = super().write(data)
        self.flush()
        return count


def _tolerant(name: str, stream: Any, work: str) -> io.TextIOWrapper | None:
    """A stream that drops what cannot be written; None if it is not a plain stream, such as a notebook's."""
    if type(stream) is not io.TextIOWrapper or not isinstance(getattr(stream.buffer, "raw", stream.buffer), io.FileIO):
        return None
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    raw = _Tolerant(name, stream.fileno(), work)
    is_unbuffered = getattr(stream.buffer, "raw", None) is None
    return io.TextIOWrapper(
        _Unbuffered(raw) if is_unbuffered else io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through or is_unbuffered,
    )
