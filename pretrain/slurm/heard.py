"""The signals that the batch step of a job has received, from its first line on.

Loading the config takes seconds, minutes on a busy network file system. A job that is preempted or cancelled meanwhile
must learn of it all the same, and be requeued in the first case.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from pretrain.processes.signals import ASKING, handled

NOTICES = (signal.SIGUSR1, signal.SIGUSR2)
"""What Slurm sends to the batch step alone when the time limit is near: ``--signal=B:USR1@SECONDS`` in our scripts, or
whichever of the two a user prefers."""


class Heard:
    """Notes signals instead of dying of them.

    Attributes:
        asked: whether one of `NOTICES` came: the work shall stop, and the job be requeued.
        told: whether another signal came to this process or to the check of the nodes: the work has it as well if it
            has started, and shall not start otherwise.
        react: called in the signal handler, after the signal was noted.
    """

    def __init__(self) -> None:
        self.asked = self.told = False
        self.react: Callable[[], None] = lambda: None

    def __bool__(self) -> bool:
        return self.asked or self.told

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals of this process; the earlier handlers return at the end."""

        def note(number: int, frame: FrameType | None) -> None:
            if number in NOTICES:
                self.asked = True
            else:
                self.told = True
            self.react()

        with handled(ASKING, note):
            yield
