"""The progress of this rank: which phase of which step it is in."""

from __future__ import annotations

import time
from typing import NamedTuple

QUICK = frozenset({"data", "forward", "backward", "optimizer", "records"})
"""The phases of a step. All others (set-up, validation, samples, telemetry, saves) may take longer."""
READS_DATA = frozenset({"start", "data", "dry run", "validation", "telemetry"})
"""The phases that may wait for a data server."""


class Moment(NamedTuple):
    """Where a rank is."""

    phase: str
    step: int
    """The step that is being taken; the last one before the first and after the last."""
    marks: int
    """Phases entered so far. All ranks enter the same phases in the same order, so the rank with the fewest is the
    one that the others wait for."""
    ticks: int
    """Signs of life within phases."""


class Progress:
    """What the training loop reports, at the cost of a few assignments; read by the threads of the watchdog.

    Args:
        settling: steps of this launch after which the time limits of `QUICK` phases apply.
    """

    def __init__(self, settling: int = 1) -> None:
        self.now = Moment("start", 0, 0, 0)
        self.longest: dict[str, float] = {}
        """Phase -> the longest time that it has taken, without the steps in which the run settles."""
        self._settling, self._first_step = settling, 0
        self._since = time.monotonic()

    def enter(self, phase: str, step: int) -> None:
        """Begin a phase of `step`, which ends the phase before."""
        now, before = time.monotonic(), self.now
        if self.settled or before.phase not in QUICK:
            self.longest[before.phase] = max(self.longest.get(before.phase, 0.0), now - self._since)
        if phase == "data":
            self._first_step = self._first_step or step
        self._since = now
        self.now = Moment(phase, step, before.marks + 1, before.ticks)

    def tick(self) -> None:
        """Show that a long phase still makes progress."""
        self.now = self.now._replace(ticks=self.now.ticks + 1)

    @property
    def settled(self) -> bool:
        """Whether enough steps have been taken for the time limits of `QUICK` phases."""
        return self._first_step > 0 and self.now.step - self._first_step >= self._settling
