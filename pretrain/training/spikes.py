"""Loss spikes: losses far above those of the steps before them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LEAST_HISTORY = 16
"""No loss is a spike until so many losses are known, or a whole smaller window."""
MAD_TO_DEVIATION = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation, 1 / Phi^-1(3/4)."""
LEAST_DEVIATION = 0.005
"""Least standard deviation, as a share of the median: losses that hardly vary make no spike of a small change."""


class SpikeDetector:
    """Compares each loss with the median of the losses before it, on the device and without waiting for it.

    A loss is a spike if it is above median + threshold * deviation, where the deviation is 1.4826 times the median
    absolute deviation from the median (Hampel, "The influence curve and its role in robust estimation", 1974). Losses
    that are not finite are never spikes and are not remembered. Spikes are remembered: fewer than half a window of
    them hardly move a median, and if the losses stay high, because the data has changed, they become the new normal.

    Args:
        window: number of losses to remember.
        threshold: see above.
        history: the losses of earlier steps, oldest first, such as `losses` returned.
        device: the device of the losses.
    """

    def __init__(self, window: int, threshold: float, history: Sequence[float], device: torch.device) -> None:
        finite = [loss for loss in history if math.isfinite(loss)]
        kept = torch.tensor(finite[-window:], dtype=torch.float32)
        self._threshold, self._least = threshold, min(LEAST_HISTORY, window)
        # NaN marks a place that is still empty; it is sorted to the end.
        self._losses = torch.full((window,), torch.nan, device=device)
        self._losses[: len(kept)] = kept.to(device)
        self._count = torch.tensor(len(kept), device=device)
        self._places = torch.arange(window, device=device)

    def observe(self, loss: Tensor) -> Tensor:
        """Return whether a loss, a scalar, is a spike: a scalar bool tensor; then remember the loss.

        All ranks must pass the same loss.
        """
        loss = loss.detach().float()
        known = self._count.clamp(max=len(self._losses))
        median = self._median(self._losses, known)
        deviation = MAD_TO_DEVIATION * self._median((self._losses - median).abs(), known)
        limit = median + self._threshold * torch.maximum(deviation, LEAST_DEVIATION * median.abs())
        spike = (known >= self._least) & loss.isfinite() & (loss > limit)
        here = (self._places == self._count % len(self._losses)) & loss.isfinite()
        self._losses = torch.where(here, loss, self._losses)
        self._count = self._count + loss.isfinite()
        return spike

    def losses(self) -> list[float]:
        """Return the losses that are remembered, oldest first; waits for the device."""
        count, window = int(self._count), len(self._losses)
        ordered = self._losses.roll(-(count % window)) if count > window else self._losses[:count]
        found: list[float] = ordered.tolist()
        return found

    @staticmethod
    def _median(values: Tensor, known: Tensor) -> Tensor:
        """The lower median of the `known` values that are not NaN; NaN if there are none."""
        middle = ((known - 1) // 2).clamp(min=0)
        return values.sort().values.gather(0, middle[None])[0]
