"""Hooks: periodic work during training, and the context that it receives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from pretrain.checkpoint.format import Fragment
from pretrain.checkpoint.store import CheckpointReader
from pretrain.data import TokenBatch
from pretrain.engine.base import Engine


@dataclass(frozen=True)
class StepContext:
    """What a hook knows about the run at one step."""

    step: int
    """Number of the step that is about to be taken, or was just taken."""
    last: bool
    """Whether it is the last step of the run."""
    engine: Engine
    loss_sum: Callable[[TokenBatch, Callable[..., Tensor]], Tensor]
    """Summed cross-entropy of a batch under a module, as in training; see `Trainer.loss_sum`."""
    write: Callable[[Callable[[], object]], None]
    """Does something that may fail on one rank alone, such as writing a file; see `Trainer.attempt`."""
    taken: Callable[[], bool]
    """Returns whether the last step changed the weights; waits for the device."""


class Hook:
    """Periodic work that does not change the run: the weights are bit-identical with and without it.

    A hook with state of its own saves it as fragments of the checkpoint. All methods are called on every rank, unless
    they say otherwise.
    """

    phase: ClassVar[str]
    """What the hook's work is called where people see what the run is doing."""

    def before_step(self, context: StepContext) -> None:
        """Prepare for the optimizer step that is about to be taken."""

    def due(self, step: int, last: bool) -> bool:
        """Return whether to run after this step; `last` is True for the last step of the run."""
        raise NotImplementedError

    def run(self, context: StepContext) -> dict[str, Any]:
        """Do the work; the result is added to the step's record in metrics.jsonl."""
        raise NotImplementedError

    def fragments(self) -> Iterable[Fragment]:
        """Return this rank's part of the hook's state, for a checkpoint."""
        return ()

    def restore(self, reader: CheckpointReader) -> None:
        """Restore the hook's state from a checkpoint that contains it."""

    def rewind(self, step: int) -> None:
        """Move what was written after `step` aside; called on rank 0 before training resumes from `step`."""


def is_due(every_steps: int | None, step: int, last: bool) -> bool:
    """Return whether periodic work is due: every `every_steps` steps, or never if None, and after the last step."""
    return last or (every_steps is not None and step % every_steps == 0)
