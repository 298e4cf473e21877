"""Guards against bad numbers: which steps may change the weights, and what follows from those that may not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pretrain.config import Config
from pretrain.engine.base import Engine
from pretrain.training.spikes import SpikeDetector
from pretrain.training.state import TrainState


class TrainingError(RuntimeError):
    """Training cannot continue; the last checkpoint is unaffected."""


class Guards:
    """Judges every step: on the device before the optimizer's step, and on the host when its values have been read.

    Args:
        config: the run's config.
        state: the counters, with the losses of earlier steps.
        device: the device of the losses.
    """

    def __init__(self, config: Config, state: TrainState, device: torch.device) -> None:
        self.settings, self.max_skipped = config.guards, config.train.max_skipped_steps
        self._device = device
        self._spikes: SpikeDetector | None = None
        self.restart(state)

    def restart(self, state: TrainState) -> None:
        """Continue from the losses in `state`."""
        if self.settings.on_loss_spike != "ignore":
            window, threshold = self.settings.spike_window, self.settings.spike_threshold
            self._spikes = SpikeDetector(window, threshold, state.loss_history, self._device)

    def history(self) -> list[float]:
        """Return the losses for `TrainState.loss_history`; waits for the device."""
        return self._spikes.losses() if self._spikes is not None else []

    def judge(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Judge the loss of a global batch, before the optimizer's step and without waiting for the device.

        Returns:
            Whether the step may change the weights, and whether the loss is a spike: scalar bool tensors, equal on all
            ranks because the loss is.
        """
        finite = loss.isfinite()
        spike = self._spikes.observe(loss) if self._spikes is not None else torch.zeros_like(finite)
        return (finite & ~spike if self.settings.on_loss_spike == "skip" else finite), spike

    def count(self, values: Mapping[str, float], state: TrainState) -> dict[str, Any]:
        """Count a step whose values are known; return what its record says about it.

        Args:
            values: of the step: `loss`, `grad_norm`, `taken` and `spike`.
            state: the counters, which are changed.
        """
        found: dict[str, Any] = {}
        if values["spike"]:
            state.loss_spikes += 1
            found["loss_spike"] = True
        if values["taken"]:
            state.skipped_in_a_row, state.train_loss = 0, values["loss"]
        else:
            state.skipped_in_a_row += 1
            state.skipped_steps += 1
            found |= {"skipped": True, "skipped_because": self._why(values)}
        return found

    def _why(self, values: Mapping[str, float]) -> str:
        """Why a step was skipped."""
        if not math.isfinite(values["loss"]):
            return "loss not finite"
        if values["spike"] and self.settings.on_loss_spike == "skip":
            return "loss spike"
        if not math.isfinite(values["grad_norm"]):
            return "gradients not finite"
        return "gradients not finite, or not equal on all ranks"

    def must_know(self, state: TrainState, unread: int) -> bool:
        """Return whether one of the `unread` steps could end the run, so that they must be read before the next."""
        return state.skipped_in_a_row + unread >= self.max_skipped

    def rolls_back(self, values: Mapping[str, float]) -> bool:
        """Return whether a step has to be undone."""
        return bool(values["spike"]) and self.settings.on_loss_spike == "roll_back"

    def compare_weights(self, engine: Engine, step: int, *, before_save: bool = False) -> None:
        """Compare the weights of all ranks if that is due after `step` or before a save; a collective.

        Raises:
            TrainingError: they differ between ranks that should hold the same.
        """
        every = self.settings.compare_weights_every_steps
        if every is None or engine.world_size == 1 or (step % every and not before_save):
            return
        if differing := engine.differing_ranks():
            ranks = "; ".join(f"rank {rank} ({where})" for rank, where in differing.items())
            raise TrainingError(
                f"step {step}: the weights of these ranks are not those of the others: {ranks}. Their hardware has "
                "computed or stored wrong values. Nothing has been saved since; exclude their machines and resume "
                "from the last checkpoint"
            )

    def check(self, state: TrainState) -> None:
        """Raise a TrainingError if too many steps in a row were skipped."""
        if state.skipped_in_a_row >= self.max_skipped:
            raise TrainingError(
                f"step {state.step}: loss or gradients were not finite, or the loss was a spike to be skipped, for "
                f"{state.skipped_in_a_row} steps in a row (train.max_skipped_steps); the weights are those before "
                "these steps. Lower the learning rates or check the data: the batches of these steps are in the run "
                "folder's bad_batches"
            )

    def check_rollbacks(self, step: int, loss: float, state: TrainState) -> None:
        """Raise a TrainingError if the run may not be rolled back once more."""
        if state.rollbacks >= self.settings.max_rollbacks:
            raise TrainingError(
                f"step {step}: the loss {loss:.4g} is a spike, and the run has been rolled back {state.rollbacks} "
                "times already (guards.max_rollbacks). The last checkpoint is from before it; lower the learning "
                "rates, check the data (the batch is in the run folder's bad_batches), or raise guards.max_rollbacks"
            )
