"""Locks of files between processes of a machine, which go with the process that holds them.

On cluster file systems without locks nothing is locked, and whoever asks for a lock is told.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def locked(
    file: Path,
    *,
    waiting: Callable[[], object] = lambda: None,
    unsupported: Callable[[OSError], object] = lambda error: None,
) -> Iterator[None]:
    """Hold the exclusive lock of a file, which is created if it is not there, and stays.

    Args:
        file: its folder must exist.
        waiting: called before waiting for another process that holds the lock.
        unsupported: called, before continuing without the lock, if the file system has none.

    Raises:
        OSError: the file cannot be opened.
    """
    with file.open("a") as handle:
        try:
            if not try_exclusive(handle):
                waiting()
                fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            unsupported(error)
        yield


def try_exclusive(file: int | IO[str]) -> bool:
    """Lock an open file exclusively, unless another process has it locked; return whether that is so.

    A shared lock that this process holds is turned into the exclusive one, and may be lost if that fails.

    Raises:
        OSError: the file system has no locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
