"""What a step found out, read one step late so that the host never waits for the step that it has just launched."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.data import StreamPosition
from pretrain.data.prefetch import PreparedBatch
from pretrain.training.hooks import StepContext
from pretrain.training.timing import PhaseClock


class OnTheWay:
    """Named scalars that travel from the device to the host while both continue.

    Args:
        values: scalar tensors of one device.
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._names = tuple(values)
        together = torch.stack([value.detach().float() for value in values.values()])
        self._event: torch.cuda.Event | None = None
        if together.device.type == "cuda":
            self._host = torch.empty(together.shape, pin_memory=True)
            self._host.copy_(together, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        else:
            self._host = together

    def arrived(self) -> bool:
        """Return whether the device has computed them."""
        return self._event is None or self._event.query()

    def wait(self) -> dict[str, float]:
        """Return the values by name, once the device has computed them."""
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self._names, self._host.tolist(), strict=True))


@dataclass
class LaunchedStep:
    """A step from its launch until its record is complete."""

    context: StepContext
    batch: PreparedBatch
    before: StreamPosition
    """Of the stream before the batch."""
    clock: PhaseClock
    on_the_way: OnTheWay
    """What the device finds out about it."""
    record: dict[str, Any]
    """The step's line in metrics.jsonl, as far as it is known."""

    @property
    def step(self) -> int:
        """Its number."""
        return self.context.step


class LateRecords:
    """The steps that were launched and whose values have not been read."""

    def __init__(self) -> None:
        self._steps: deque[LaunchedStep] = deque()

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, step: LaunchedStep) -> None:
        """Add a step that has just been launched."""
        self._steps.append(step)

    def take(self, *, all_of_them: bool, arrived_only: bool = False) -> list[tuple[LaunchedStep, dict[str, float]]]:
        """Remove steps and return them with their values, oldest first; waits for these values.

        Args:
            all_of_them: also the step that was launched last, for which this waits until the device has finished it.
            arrived_only: no steps that would have to be waited for, because the device may never finish them.
        """
        found = []
        while len(self._steps) > (0 if all_of_them else 1):
            if arrived_only and not self._steps[0].on_the_way.arrived():
                break
            step = self._steps.popleft()
            found.append((step, step.on_the_way.wait()))
        return found
