"""The counters of the training loop."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class TrainState:
    """The counters of the loop.

    A checkpoint contains these, the weights, the optimizer state, the position of the data stream, the random
    generators, and the state of the hooks; nothing else is needed to resume.
    """

    step: int = 0
    """Optimizer steps, including skipped ones."""
    tokens: int = 0
    """Tokens trained on, as the schedule counts them: `global_batch_tokens` per step."""
    skipped_steps: int = 0
    """Steps that did not change the weights: a loss or gradient was not finite, or a loss spike was skipped."""
    skipped_in_a_row: int = 0
    """Steps skipped since the last step that was taken."""
    train_seconds: float = 0.0
    """Time spent in steps, without validation, saving and set-up."""
    train_loss: float | None = None
    """Loss of the last step that was taken."""
    validation_loss: float | None = None
    """Last validation loss, in nats per token."""
    bits_per_byte: float | None = None
    """Last validation bits per byte."""
    loss_spikes: int = 0
    """Steps whose loss was a spike, without those that were rolled back."""
    rollbacks: int = 0
    """How often the run returned to a checkpoint because of a loss spike."""
    loss_history: list[float] = field(default_factory=list)
    """The finite losses that the next loss is compared with, oldest first; see `guards.spike_window`."""
