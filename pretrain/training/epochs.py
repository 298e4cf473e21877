"""Lines for the display when a source begins an epoch or ends, or the mixture changes, and about packing."""

from __future__ import annotations

from pretrain.data import StreamPosition


class EpochNotices:
    """Compares the position of a stream with what it was at the last call.

    Args:
        position: where training begins or continues.
        padded_length: see `packing_lines`.
    """

    def __init__(self, position: StreamPosition, padded_length: int | None = None) -> None:
        self._before, self._padded_length = position, padded_length

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
            found += packing_lines(position, self._padded_length, name)
        if position.stage != before.stage:
            found.append(f"stage {position.stage + 1} of the mixture has been reached at step {step}")
        return found


def packing_lines(position: StreamPosition, padded_length: int | None, *names: str) -> list[str]:
    """Return what best-fit packing has padded and cut so far, one line for each source that has been read.

    Args:
        position: of the stream.
        padded_length: tokens of a sequence; None with another packing, which does not pad: there are no lines.
        names: the sources to report; none: all.
    """
    if padded_length is None:
        return []
    return [
        f"source {name}: best-fit packing has padded {1 - source.tokens / (source.sequences * padded_length):.2%} of "
        f"{source.sequences:,} sequences, and cut {source.cut_documents:,} of {source.documents:,} documents, which "
        "are longer than a sequence"
        for name, source in position.progress().items()
        if source.sequences and (not names or name in names)
    ]
