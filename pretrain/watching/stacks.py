"""Where the threads of this process are."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO

DUMP_SIGNAL = signal.SIGRTMIN
"""A process that trains writes the stacks of its threads when it gets this signal, even if Python is stuck; from a
shell: ``kill -RTMIN PID``. The signals with names of their own ask for a stop (`pretrain.processes.signals`)."""

OUR_PACKAGES = ("pretrain", "optimizers", "eval")
WAITING = ("torch/distributed/", "torch/autograd/graph.py", "deepspeed/comm/", "deepspeed/utils/nvtx.py")
"""Files in which a thread waits for other ranks, or for the backward pass in which ranks wait. The last one wraps
every call of ZeRO 3 that waits for weights."""
_ROOT = Path(__file__).parents[2]


def stacks_file(folder: Path, rank: int) -> Path:
    """The file for the stacks of a rank in the folder of heartbeats."""
    return folder / f"rank-{rank:05d}.stacks.txt"


@contextlib.contextmanager
def dumping(folder: Path, rank: int) -> Iterator[IO[str]]:
    """Write the stacks of all threads into `stacks_file` whenever `DUMP_SIGNAL` arrives; yield the open file.

    A file that was empty before and is empty at the end is removed.
    """
    path = stacks_file(folder, rank)
    with path.open("a", encoding="utf-8") as file:
        faulthandler.register(DUMP_SIGNAL, file=file, all_threads=True)
        try:
            yield file
        finally:
            faulthandler.unregister(DUMP_SIGNAL)
    with contextlib.suppress(OSError):
        if path.stat().st_size == 0:
            path.unlink()


def dump(file: IO[str], title: str) -> None:
    """Append the stacks of all threads of this process, after a title."""
    file.write(f"\n== {title}\n")
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)
    with contextlib.suppress(OSError):  # a pipe cannot be synced
        os.fsync(file.fileno())


def to_main_thread(pid: int, number: int) -> None:
    """Send a signal to the main thread of a process.

    When a stopped process is continued, that thread then handles the signal before it goes on; a signal to the process
    may be handled by any of its threads, while the main thread runs on.
    """
    try:
        ctypes.CDLL(None).tgkill(pid, pid, number)
    except AttributeError:  # a C library without it
        os.kill(pid, number)


def place(main: int | None = None) -> tuple[str, bool]:
    """Return where the main thread is in our code, and whether it waits there for other ranks.

    While the main thread waits for the thread that prepares batches, the place is that thread's.

    Args:
        main: the identity of the thread that trains; None: Python's main thread.
    """
    frames = sys._current_frames()
    names = {thread.name: thread.ident for thread in threading.enumerate()}
    frame = frames.get(main or threading.main_thread().ident or 0)
    prefetch = frames.get(names.get("prefetch") or 0)
    if prefetch is not None and any(code == "next_batch" and "prefetch" in file for file, code, _ in _walk(frame)):
        frame = prefetch
    stack = list(_walk(frame))
    waiting = bool(stack) and any(part in stack[0][0].replace(os.sep, "/") for part in WAITING)
    for file, function, line in stack:
        with contextlib.suppress(ValueError):
            relative = Path(file).relative_to(_ROOT)
            if relative.parts[0] in OUR_PACKAGES:
                return f"{relative.as_posix()}:{line} in {function}", waiting
    return "", waiting


def _walk(frame: FrameType | None) -> Iterator[tuple[str, str, int]]:
    """File, function and line of a stack, the innermost first."""
    while frame is not None:
        yield frame.f_code.co_filename, frame.f_code.co_name, frame.f_lineno
        frame = frame.f_back
