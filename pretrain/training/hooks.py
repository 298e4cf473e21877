"""Periodic work during training: what a hook is, and what it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pretrain.checkpoint.format import Fragment
from pretrain.checkpoint.store import CheckpointReader
from pretrain.data import TokenBatch
from pretrain.engine.base import Engine


@dataclass(frozen=True)
class StepContext:
    """What a hook sees of the run around one step."""

    step: int
    """Number of the step that is about to be made, or was just made."""
    last: bool
    """Whether it is the run's last."""
    engine: Engine
    loss_sum: Callable[[TokenBatch, Callable[..., Tensor]], Tensor]
    """Summed cross-entropy of a batch under a module, as in training; see `Trainer.loss_sum`."""
    taken: Callable[[], bool]
    """Whether the step just made changed the weights; waits for the device."""


class Hook:
    """Periodic work that does not change the run: the weights are the same with or without it, bit for bit.

    A hook with a state of its own saves it as fragments of the checkpoint. All methods are called on every rank.
    """

    def before_step(self, context: StepContext) -> None:
        """Prepare for the optimizer step that is about to be made."""

    def due(self, step: int, last: bool) -> bool:
        """Whether to run after this step; `last` is the last step of the run."""
        raise NotImplementedError

    def run(self, context: StepContext) -> dict[str, Any]:
        """Do the work; what is returned joins the step's line in metrics.jsonl."""
        raise NotImplementedError

    def fragments(self) -> Iterable[Fragment]:
        """What of the hook's state this rank holds, for a checkpoint."""
        return ()

    def restore(self, reader: CheckpointReader) -> None:
        """Take the state that a checkpoint holds, if it holds any."""

    def rewind(self, step: int) -> None:
        """Set aside what was written after `step`; called on rank 0 before training resumes from there."""


def is_due(every_steps: int | None, step: int, last: bool) -> bool:
    """Whether work that is done every n steps and after the last is due; None: after the last only."""
    return last or (every_steps is not None and step % every_steps == 0)
