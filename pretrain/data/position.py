"""A position of a stream, and what it says about the progress of each source."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pretrain.data.documents import Cursor
from pretrain.data.mixture import Schedule
from pretrain.data.rings import RingPosition
from pretrain.data.state import STATE_VERSION, StreamState, lane_state


@dataclass(frozen=True)
class SourceProgress:
    """How much of a source the batches so far contained, or of all sources together if there is no mixture.

    Counts all ranks, and what was read before a resume.
    """

    epochs: int
    """Completed epochs."""
    max_epochs: int | None
    """The epochs after which it ends; None if it never does."""
    sequences: int
    tokens: int
    """Targets."""
    documents: int
    """Documents whose last token was a target, counted in each epoch."""
    text_bytes: int
    """UTF-8 bytes."""
    bad_rows: int
    """Rows that were skipped, in the first epoch."""
    cut_documents: int
    """Documents longer than a sequence, which best-fit packing had to cut, counted in each epoch; else 0."""


@dataclass(frozen=True)
class StreamPosition:
    """Where a stream is after a batch. Does not change when the stream continues."""

    schedule: Schedule
    rings: Sequence[RingPosition]
    cursors: Mapping[int, Cursor]
    """Where this rank's lanes continue, by lane."""
    sequences: int
    """Sequences of all batches so far."""

    @property
    def stage(self) -> int:
        """Index of the current stage of the mixture."""
        return self.schedule.stage

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text in the batches so far, on all ranks and including those before a resume.

        Once the stream has ended, this is the size of all its documents. A document of which only some tokens have
        been targets counts in proportion.
        """
        return sum(ring.text_bytes for ring in self.rings)

    def progress(self) -> dict[str, SourceProgress]:
        """Return how far each source has been read, by its name."""
        return {
            ring.ring.name: SourceProgress(
                ring.epoch,
                ring.ring.epochs,
                ring.sequences,
                ring.tokens,
                ring.documents,
                ring.text_bytes,
                ring.bad_rows,
                ring.cut_documents,
            )
            for ring in self.rings
        }

    def state(self, group: dist.ProcessGroup | None = None) -> StreamState:
        """Return what a checkpoint holds; a collective of the group, which must have all ranks of the stream."""
        cursors = torch.zeros(self.rings[-1].ring.lanes.stop, len(Cursor._fields), dtype=torch.int64)
        for lane, cursor in self.cursors.items():
            cursors[lane] = torch.tensor(cursor)
        if group is not None:
            dist.all_reduce(cursors, group=group)
        lanes = [lane_state(Cursor(*cursor)) for cursor in cursors.tolist()]
        return StreamState(
            version=STATE_VERSION,
            mixture=self.schedule.state(),
            sources=[ring.state(lanes[ring.ring.lanes.start : ring.ring.lanes.stop]) for ring in self.rings],
            sequences_emitted=self.sequences,
            text_bytes=self.text_bytes,
        )
