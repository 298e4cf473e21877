"""Validation of the weights that a run takes over from another one, before its first step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pretrain.training.hooks import Hook, StepContext
from pretrain.training.validation import Validator


class StartValidation(Hook):
    """Shows what a run starts from; without it, the first validation would already be of trained weights.

    The values are in the record of step 1 as ``start_validation_loss`` and ``start_validation_bits_per_byte``.

    Args:
        validator: the run's.
        show: prints a line on rank 0.
    """

    phase = "validation"

    def __init__(self, validator: Validator, show: Callable[[str], None]) -> None:
        self._validator, self._show = validator, show
        self.values: dict[str, Any] = {}

    def measure(self, context: StepContext) -> None:
        """Validate before the first step; a collective."""
        found = self._validator.run(context)
        self.values = {f"start_{name}": value for name, value in found.items()}
        self._show(
            f"before the first step: validation loss {found['validation_loss']:.4f}, "
            f"{found['validation_bits_per_byte']:.4f} bits per byte"
        )

    def due(self, step: int, last: bool) -> bool:
        """Return True after the first step."""
        return step == 1 and bool(self.values)

    def run(self, context: StepContext) -> dict[str, Any]:
        """Return what was measured."""
        return self.values
