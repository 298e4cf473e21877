"""Python's garbage collection at a time of our choosing.

Python collects when enough objects have been made, which is at another moment on every rank, and all ranks wait for
each one that does. What is alive after set-up, a million objects, need not be looked through again and again.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


class GarbageCollector:
    """Collects every n steps, and never between.

    Args:
        every_steps: n; None leaves it to Python.
    """

    def __init__(self, every_steps: int | None) -> None:
        self._every, self._steps = every_steps, 0

    @contextlib.contextmanager
    def in_charge(self) -> Iterator[None]:
        """Collect only in `after_step` inside this context."""
        if self._every is None or not gc.isenabled():
            yield
            return
        gc.disable()
        try:
            yield
        finally:
            gc.unfreeze()
            gc.enable()

    def after_step(self) -> None:
        """Collect if it is time; after the first collection what is alive is left out of all further ones."""
        self._steps += 1
        if self._every is None or self._steps % self._every:
            return
        gc.collect()
        if self._steps == self._every:
            gc.freeze()
