"""torch's profiler for chosen steps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

FOLDER = "profile"
"""In the run folder."""


class Profiler:
    """Records a trace of steps `first` to `last`, with the phases of the loop as named ranges.

    The trace is a file that https://ui.perfetto.dev and chrome://tracing can show. It does not change the run; the
    steps that are recorded are slower.

    Args:
        first: the first step to record.
        last: the last one.
        folder: where the trace is written.
        rank: rank of this process; each rank writes its own trace.
        say: prints a line.
    """

    def __init__(self, first: int, last: int, folder: Path, rank: int, say: Callable[[str], None]) -> None:
        self.first, self.last, self.folder, self.rank, self.say = first, last, folder, rank, say
        self._profile: Any = None
        self._phase: Any = None
        self._step = 0

    def enter(self, phase: str, step: int) -> None:
        """Learn of a phase that begins."""
        if self._phase is not None:
            self._phase.__exit__(None, None, None)
            self._phase = None
        if phase == "data" and self._profile is None and self.first <= step <= self.last:
            self._profile = torch.profiler.profile()
            self._profile.start()
            self.first = step  # a resumed run may begin in the middle
        elif phase == "data" and step > self.last:
            self.close()
        self._step = step
        if self._profile is not None:
            self._phase = torch.profiler.record_function(phase)
            self._phase.__enter__()

    def close(self) -> None:
        """Write the trace, if one is being recorded."""
        if self._phase is not None:
            self._phase.__exit__(None, None, None)
            self._phase = None
        profile, self._profile = self._profile, None
        if profile is None:
            return
        profile.stop()
        name = f"steps-{self.first}-{self._step}-rank-{self.rank:05d}.json.gz"
        path, partial = self.folder / name, self.folder / f"partial-{name}"
        try:
            self.folder.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(partial))
            partial.replace(path)
        except (OSError, RuntimeError) as error:
            self.say(f"warning: the profile could not be written to {path}: {error}")
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
        else:
            self.say(f"profile written to {path}")
