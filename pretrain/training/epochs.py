"""Lines for the display when a source begins an epoch or ends, or the mixture changes."""

from __future__ import annotations

from pretrain.data import StreamPosition


class EpochNotices:
    """Compares the position of a stream with what it was at the last call.

    Args:
        position: where training begins or continues.
    """

    def __init__(self, position: StreamPosition) -> None:
        self._before = position

    def lines(self, step: int, position: StreamPosition) -> list[str]:
        """Return what has begun or ended with the batch of a step, after which the stream is at `position`."""
        before, self._before = self._before, position
        epochs_before = {name: source.epochs for name, source in before.progress().items()}
        found = []
        for name, source in position.progress().items():
            if (epochs := source.epochs) == epochs_before[name]:
                continue
            if epochs == source.max_epochs:
                found.append(f"source {name}: has ended after {epochs} epochs (max_epochs), at step {step}")
            else:
                found.append(f"source {name}: epoch {epochs + 1} begins at step {step}")
        if position.stage != before.stage:
            found.append(f"stage {position.stage + 1} of the mixture has been reached at step {step}")
        return found
