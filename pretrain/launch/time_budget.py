"""How long a launch may take, and whether another step still fits."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

SAVES = 2.5
"""So many of the longest save so far must fit: a regular one, the last one, and half of that for slow disks."""
FIRST_SAVE_BYTES_PER_SECOND = 200e6
"""The speed that is assumed for the first save of a launch."""


@dataclass
class TimeBudget:
    """Compares the time that is left with what two more steps, the saves and the end of the process take.

    Two steps, because the step that has begun when time runs out cannot be interrupted, and its end is known one step
    later. The longest of each so far counts, so that a validation fits as well; only the first step of a launch is
    forgotten as soon as there is another one, since it may have compiled the model.
    """

    ends_at: float = math.inf
    """On the clock; infinity: there is no limit."""
    reason: str = ""
    """What sets the limit, for people."""
    save_seconds: float = 0.0
    """The longest save so far; at first an estimate."""
    close_seconds: float = 2.0
    """For the end of the process."""
    clock: Callable[[], float] = time.monotonic
    step_seconds: float = field(default=0.0, init=False)
    _steps: int = field(default=0, init=False)
    _since: float | None = field(default=None, init=False)

    def step_ended(self) -> None:
        """Learn from the time since the last call, without saves."""
        now = self.clock()
        if self._since is not None:
            self._steps += 1
            seconds = now - self._since
            self.step_seconds = seconds if self._steps <= 2 else max(seconds, self.step_seconds)
        self._since = now

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Learn how long the save in this block takes, which does not count as part of a step."""
        begun = self.clock()
        yield
        self.save_took(self.clock() - begun)
        if self._since is not None:
            self._since += self.clock() - begun

    def save_took(self, seconds: float) -> None:
        """Learn how long a save took in all, with what was written behind the steps that followed."""
        self.save_seconds = max(seconds, self.save_seconds)

    def is_spent(self) -> bool:
        """Whether this is the last moment to save."""
        needed = 2 * self.step_seconds + SAVES * self.save_seconds + self.close_seconds
        return self.clock() + needed >= self.ends_at


def time_budget(
    max_seconds: float | None, age: float, checkpoint_bytes: int, warn: Callable[[str], None]
) -> TimeBudget:
    """The budget of a launch that began `age` seconds ago, from `run.max_seconds` and the Slurm job's time limit."""
    now = time.monotonic()
    limits = []
    if max_seconds is not None:
        limits.append((now - age + max_seconds, f"run.max_seconds = {max_seconds:g}"))
    slurm = os.environ.get("SLURM_JOB_END_TIME", "") if os.environ.get("SLURM_JOB_ID") else ""
    if slurm.isdecimal():
        left = int(slurm) - time.time()
        if left > 0:
            limits.append((now + left, "the time limit of the Slurm job"))
        else:  # of a job in which this shell was once started
            warn(f"SLURM_JOB_END_TIME={slurm} in the environment is ignored: it has passed")
    if not limits:
        return TimeBudget()
    ends_at, reason = min(limits)
    close = min(10.0, max(2.0, 0.05 * (ends_at - now + age)))
    return TimeBudget(ends_at, reason, checkpoint_bytes / FIRST_SAVE_BYTES_PER_SECOND, close)
