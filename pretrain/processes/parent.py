"""The process that this one belongs to: when it dies, training saves a checkpoint and stops."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

PARENT_VARIABLE = "AURORA_PARENT"
"""Environment variable with the id of the process that a training process belongs to, such as a launcher or a sweep."""

LAUNCHED_VARIABLE = "AURORA_LAUNCHED"
"""Environment variable with the time at which our launcher began, in seconds since the epoch."""

_FIRST_PARENT = os.getppid()


def is_orphaned() -> bool:
    """Return whether the process that this one belongs to has died.

    It is the one that `PARENT_VARIABLE` names. Under torchrun itself it is the process that started this one. A process
    that a shell started belongs to nobody: it may outlive the shell.
    """
    named = os.environ.get(PARENT_VARIABLE)
    if named is not None:
        return named != str(os.getppid())
    return "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != _FIRST_PARENT


@contextlib.contextmanager
def parent_of_what_starts() -> Iterator[None]:
    """Let the processes that are started meanwhile belong to this one."""
    before = {name: os.environ.get(name) for name in (PARENT_VARIABLE, LAUNCHED_VARIABLE)}
    os.environ |= {PARENT_VARIABLE: str(os.getpid()), LAUNCHED_VARIABLE: str(time.time() - process_age())}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def process_age() -> float:
    """How many seconds ago this process was started."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        return float(Path("/proc/uptime").read_text().split()[0]) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def launched_before(seconds: float) -> float:
    """How many seconds ago our launcher began; without one, `seconds`, the age of what has no launcher."""
    if os.environ.get(PARENT_VARIABLE) != str(os.getppid()):
        return seconds
    try:
        return max(seconds, time.time() - float(os.environ[LAUNCHED_VARIABLE]))
    except (KeyError, ValueError):
        return seconds
