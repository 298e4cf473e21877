"""Everything that may ask a run to stop: signals, the death of the launcher, a file, a time limit."""

from __future__ import annotations

import contextlib
import os

from pretrain.launch.setup import Setup
from pretrain.launch.time_budget import TimeBudget
from pretrain.processes.parent import is_orphaned
from pretrain.processes.signals import StopRequests


class Stops:
    """What one rank knows of requests to stop; the ranks agree on them after each step.

    Args:
        requests: those that this process has received already.
        setup: the run's.
        budget: its time.
    """

    def __init__(self, requests: StopRequests, setup: Setup, budget: TimeBudget) -> None:
        self.requests, self.budget = requests, budget
        self._ranks, self._rank = setup.engine.ranks, setup.engine.rank
        self._claimant = setup.folder.claimant
        self._file = setup.folder.stop_file
        self._found_file = False

    def requested(self) -> bool:
        """Whether this rank was asked to stop; may be called from any thread."""
        if not self.requests:
            if is_orphaned():
                self.requests.add("the death of its parent process")
            elif self.budget.is_spent():
                self.requests.add(self.budget.reason)
            elif self._rank == 0 and os.path.lexists(self._file):
                self._found_file = True
                self.requests.add(f"the file {self._file}")
            elif self._rank == 0 and (claimant := self._claimant()):
                self.requests.add(f"a later attempt of the same Slurm job ({claimant})")
        return bool(self.requests)

    def after_step(self) -> bool:
        """Whether this rank was asked to stop; called once after each step."""
        self.budget.step_ended()
        return self.requested()

    def agreed(self) -> bool:
        """Whether any rank was asked to stop; then all ranks know the same reason. A collective."""
        self.requested()
        reasons = [(rank, reason) for rank, reason in enumerate(self._ranks.gather(self.requests.reason)) if reason]
        if not reasons:
            return False
        rank, reason = reasons[0]
        if not self.requests:
            self.requests.add(f"{reason} on rank {rank}")
        return True

    def acknowledge(self) -> None:
        """Delete the file that has asked for this stop, so that the next launch trains.

        Raises:
            OSError: it cannot be deleted.
        """
        if self._found_file:
            with contextlib.suppress(FileNotFoundError):
                self._file.unlink()
