"""Where the time of a step goes, measured without making the device wait."""

from __future__ import annotations

import itertools
import time

import torch


class PhaseClock:
    """Times the consecutive phases of one step: by the host's clock on a CPU, by events on a GPU.

    Args:
        device: that the step runs on.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._names: list[str] = []
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        self._record()

    def mark(self, phase: str) -> None:
        """The phase that began at the last mark ends here."""
        self._names.append(phase)
        self._record()

    def total(self) -> float:
        """Wall seconds since the clock was made."""
        return time.perf_counter() - self._started

    def seconds(self) -> dict[str, float]:
        """``<phase>_seconds`` of every phase, and `cpu_seconds`, the time that this process spent on processors.

        On a GPU only after something has waited for the last mark, as the step's one host sync does.
        """
        if self._on_gpu:
            spans = [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(self._events)]
        else:
            spans = [b - a for a, b in itertools.pairwise(self._times)]
        found = {f"{name}_seconds": round(span, 6) for name, span in zip(self._names, spans, strict=True)}
        return found | {"cpu_seconds": round(time.process_time() - self._cpu_started, 6)}

    def _record(self) -> None:
        if self._on_gpu:
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
        else:
            self._times.append(time.perf_counter())
