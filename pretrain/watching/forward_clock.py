"""The time that this rank computes without waiting for others: that of its forward passes."""

from __future__ import annotations

from collections import deque
from statistics import median

import torch

REMEMBERED = 32
"""Steps over which the median is taken."""
FEWEST_STEPS = 5
"""Before that, a rank does not say how fast it is."""


class ForwardClock:
    """Times the forward passes of this rank: by the host's clock on a CPU, by events on a GPU, never waiting for it.

    Args:
        device: the device of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._open: float | torch.cuda.Event | None = None
        self._passes: list[tuple[float, float] | tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._steps: deque[float] = deque(maxlen=REMEMBERED)

    def enter(self, phase: str, now: float) -> None:
        """Learn of a phase that begins; `now` is the host's clock in seconds."""
        if phase == "data":
            self._count()
        moment = self._event() if self._on_gpu and (phase == "forward" or self._open is not None) else now
        if self._open is not None:
            self._passes.append((self._open, moment))  # type: ignore[arg-type]
        self._open = moment if phase == "forward" else None

    def seconds(self) -> float | None:
        """Return the median time of the forward passes of a step; None before there are enough steps."""
        steps = list(self._steps)
        return median(steps) if len(steps) >= FEWEST_STEPS else None

    def _count(self) -> None:
        """Add up the passes of the step before; one whose events the GPU has not reached yet does not count."""
        passes, self._passes = self._passes, []
        if not passes:
            return
        if not self._on_gpu:
            self._steps.append(sum(end - start for start, end in passes))  # type: ignore[operator, misc]
        elif passes[-1][1].query():  # type: ignore[union-attr]
            self._steps.append(sum(start.elapsed_time(end) for start, end in passes) / 1000)  # type: ignore[union-attr, arg-type]

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
