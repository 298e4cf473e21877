"""Folders that processes share while they need them, and that do not outlive them.

    <parent>/<host>/<name>/        the folder
    <parent>/<host>/<name>.lock    locked by every process that uses the folder

The last process that uses a folder deletes it. A process that is killed cannot, so the folder stays: the same command
finds it again, and any other command of the same host that looks below the same parent deletes it, since nobody holds
its lock. Hosts share nothing, since some file systems keep locks to the host that took them. Where the file system has
no locks at all, each process has a temporary folder of its own instead.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from eval.errors import EvalError
from pretrain.locks import try_exclusive

_PARTIAL = ("", ".tmp", ".old")
"""Suffixes of a folder's name: the folder itself, and what writing it may leave (see `pretrain.files`)."""


@contextlib.contextmanager
def held_folder(parent: Path, name: str, fill: Callable[[Path], object]) -> Iterator[Path]:
    """Yield the folder `name` of this host below `parent`, and delete it when no process uses it any more.

    Args:
        parent: holds nothing but such folders; those that no process uses are deleted first.
        name: of the folder, without a dot; processes of a host that give the same name share it.
        fill: creates the folder at the path that it is given, if it is not there; the folder must appear only when it
            is complete. Other processes wait for it.

    Raises:
        EvalError: nothing can be written to `parent`.
        Exception: what `fill` raised.
    """
    parent = parent / re.sub(r"[^\w-]", "-", socket.gethostname())
    folder = parent / name
    if not _can_lock(parent):
        # Nobody could tell whether the folder is in use: each process has one of its own.
        with tempfile.TemporaryDirectory(prefix="aurora-eval-") as own:
            fill(Path(own, name))
            yield Path(own, name)
        return
    with _writable(parent):
        parent.mkdir(parents=True, exist_ok=True)
        _delete_leftovers(parent, name)
    lock = _lock_filled(folder, fill)
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            if try_exclusive(lock):  # else another process uses it
                _delete(folder)
        os.close(lock)


@contextlib.contextmanager
def _writable(parent: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise EvalError(f"cannot write to {parent}: {error}; set AURORA_CACHE to a writable folder") from error


def _can_lock(parent: Path) -> bool:
    """Return whether the file system supports locks; some cluster file systems do not."""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=parent) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
    return True


def _lock_filled(folder: Path, fill: Callable[[Path], object]) -> int:
    """Return the descriptor of a shared lock on a folder that is there."""
    file = folder.with_name(f"{folder.name}.lock")
    while True:
        with _writable(folder.parent):
            lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)  # waits for a process that fills it
            filled = folder.is_dir()
            # Never waited for: users of a folder that was filled meanwhile keep their shared locks for hours.
            if not filled and try_exclusive(lock):
                if os.fstat(lock).st_nlink and not folder.is_dir():
                    fill(folder)
                fcntl.flock(lock, fcntl.LOCK_SH)
                filled = folder.is_dir()
            # Another process may have deleted both while this one had no lock, which is between two of them.
            if filled and os.fstat(lock).st_nlink:
                return lock
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        time.sleep(random.SystemRandom().uniform(0.01, 0.05))  # processes that refused each other do not meet again


def _delete_leftovers(parent: Path, own: str) -> None:
    for file in parent.glob("*.lock"):
        if file.stem == own:
            continue
        with contextlib.suppress(OSError):  # gone already
            lock = os.open(file, os.O_RDWR)
            try:
                if try_exclusive(lock):  # else it is in use
                    _delete(file.with_suffix(""))
            finally:
                os.close(lock)


def _delete(folder: Path) -> None:
    """Delete a folder whose lock this process holds, and then the lock."""
    for suffix in _PARTIAL:
        shutil.rmtree(folder.with_name(folder.name + suffix), ignore_errors=True)
    folder.with_name(f"{folder.name}.lock").unlink(missing_ok=True)
