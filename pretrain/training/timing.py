"""Timing of the phases of a step, without synchronizing with the device."""

from __future__ import annotations

import itertools
import time

import torch


class PhaseClock:
    """Times the consecutive phases of one step, with the host's clock on a CPU and with events on a GPU.

    Args:
        device: the device that the step runs on.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._names: list[str] = []
        self._times: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self._started, self._cpu_started = time.perf_counter(), time.process_time()
        self._cpu_seconds = 0.0
        self._record()

    def mark(self, phase: str) -> None:
        """End the phase that began at the last mark."""
        self._names.append(phase)
        self._record()

    def stop(self) -> float:
        """End the step; return the wall-clock seconds since the clock was created."""
        self._cpu_seconds = time.process_time() - self._cpu_started
        return time.perf_counter() - self._started

    def seconds(self) -> dict[str, float]:
        """Return ``<phase>_seconds`` of every phase, and `cpu_seconds`, the CPU time of this process until `stop`.

        On a GPU call it only after the device has reached the last mark.
        """
        if self._on_gpu:
            spans = [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(self._events)]
        else:
            spans = [b - a for a, b in itertools.pairwise(self._times)]
        found = {f"{name}_seconds": round(span, 6) for name, span in zip(self._names, spans, strict=True)}
        return found | {"cpu_seconds": round(self._cpu_seconds, 6)}

    def _record(self) -> None:
        if self._on_gpu:
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
        else:
            self._times.append(time.perf_counter())
