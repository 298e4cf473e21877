"""Lines for the display when a source begins an epoch or ends, or the mixture changes, and about packing."""

from __future__ import annotations

from pretrain.data import TokenStream


class EpochNotices:
    """Compares the progress of a stream with what it was at the last call.

    Args:
        stream: at the position where training begins or continues.
    """

    def __init__(self, stream: TokenStream) -> None:
        self._stream = stream
        self._epochs, self._stage = self._read()

    def lines(self, step: int) -> list[str]:
        """Return what has begun or ended with the batch of a step."""
        before, stage_before = self._epochs, self._stage
        self._epochs, self._stage = self._read()
        found = []
        for name, source in self._stream.progress().items():
            if (epochs := source.epochs) == before[name]:
                continue
            if epochs == source.max_epochs:
                found.append(f"source {name}: has ended after {epochs} epochs (max_epochs), at step {step}")
            else:
                found.append(f"source {name}: epoch {epochs + 1} begins at step {step}")
            found += packing_lines(self._stream, name)
        if self._stage != stage_before:
            found.append(f"stage {self._stage + 1} of the mixture has been reached at step {step}")
        return found

    def _read(self) -> tuple[dict[str, int], int]:
        return {name: source.epochs for name, source in self._stream.progress().items()}, self._stream.stage


def packing_lines(stream: TokenStream, *names: str) -> list[str]:
    """Return what best-fit packing has padded and cut so far, one line for each source that has been read.

    Args:
        stream: the stream.
        names: the sources to report; none: all.
    """
    if stream.packing != "best_fit":
        return []
    return [
        f"source {name}: best-fit packing has padded {source.padding / (source.padding + source.tokens):.2%} of "
        f"{source.sequences:,} sequences, and cut {source.cut_documents:,} of {source.documents:,} documents, which "
        "are longer than a sequence"
        for name, source in stream.progress().items()
        if source.sequences and (not names or name in names)
    ]
