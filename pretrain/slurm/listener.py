"""A step of the job that does nothing but receive signals.

``scancel --signal=TERM JOB`` reaches the steps of a job and not its batch script. Between the check of the nodes and
the start of the work there is no step, so the signal would reach nothing, and the work would start.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator

from pretrain.processes.signals import ASKING

# --overlap: it takes nothing from the other steps, and they need not wait for it.
COMMAND = ("srun", "--overlap", "--nodes=1", "--ntasks=1", "--gres=none", "--mem=0", "--quiet", "sleep", "infinity")
STOP_SECONDS = 10.0


class Listener:
    """Hears what the steps of the job are sent. A version of Slurm that refuses the step leaves it deaf."""

    def __init__(self) -> None:
        self._step: subprocess.Popen[bytes] | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen until the block ends, or until `stop`."""
        with contextlib.suppress(OSError):
            self._step = subprocess.Popen(COMMAND, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            yield
        finally:
            self.stop()

    def heard(self) -> int | None:
        """Return the signal that the step was ended by; None if there was none."""
        code = self._step.poll() if self._step is not None else None
        if code is None:
            return None
        number = -code if code < 0 else code - 128  # of a task, srun says it by its exit code
        return number if number in ASKING else None

    def stop(self) -> None:
        """End the step; nothing is heard afterwards."""
        step, self._step = self._step, None
        if step is not None and step.poll() is None:
            step.terminate()
            try:
                step.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                step.kill()
                step.wait()
