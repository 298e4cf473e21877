"""The global stream of token batches: the same on any number of ranks and workers, and exactly resumable.

The mixture decides which source gives each next sequence (`pretrain.data.mixture`). Within a source, sequences come
from a ring of lanes: each lane in turn contributes its next sequence and goes to the back. A lane whose epoch is over
leaves, and when all have left, the next epoch of the source begins with all its lanes. With one source of three lanes,
of which lane 1 has only one sequence in this epoch, batches of four are

    sequence  0 1 2 3 | 4 5 6 7
    lane      0 1 2 0 | 2 0 2 0      lane 1 leaves when its second turn comes, after sequence 3

The lanes of all sources are numbered through and divided among the readers: with R ranks of W workers each, lane l is
read by reader l mod RW, which belongs to rank (l mod RW) // W. A reader yields, for each source, the sequences of its
own lanes in the order of the ring. To know how the lanes of other ranks interleave, a rank only needs to know *how
many* sequences each lane still has in this epoch, up to the few that the batch can take: one small all-reduce. Every
rank then writes its own sequences into their rows, and a second all-reduce gives all rows to all ranks.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist

from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data.bad_rows import BadRow, too_many
from pretrain.data.batch import TokenBatch
from pretrain.data.best_fit import BestFitLane
from pretrain.data.catalog import Catalog, make_catalog, tokenizer_problems
from pretrain.data.documents import Cursor
from pretrain.data.errors import DataError
from pretrain.data.mixture import Schedule
from pretrain.data.order import make_plan
from pretrain.data.packing import Lane, ReaderTask, RingTask
from pretrain.data.rings import RingPosition, RingQueues, take_turns
from pretrain.data.sources.retries import set_retry_minutes
from pretrain.data.state import STATE_VERSION, LaneState, StreamState, cursors_of, initial_state, read_state
from pretrain.data.tokenizer import load_tokenizer
from pretrain.data.workers import InlineReader, Reader, WorkerReader
from pretrain.engine.ranks import Ranks

logger = logging.getLogger(__name__)


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
    padding: int
    """Positions of those sequences that are not targets. Except in a finite stream, only best-fit packing pads."""
    cut_documents: int
    """Documents longer than a sequence, which best-fit packing had to cut, counted in each epoch; else 0."""


class TokenStream:
    """Batches of packed sequences from the sources of a config.

    All ranks of `group` construct the stream with the same arguments and make the same calls in the same order. The
    catalog of rank 0 serves all of them.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: TokenizerConfig,
        sequence_length: int,
        *,
        split: Literal["train", "validation"] = "train",
        epochs: int | None = None,
        group: dist.ProcessGroup | None = None,
        state: StreamState | None = None,
        catalog: Catalog | None = None,
    ) -> None:
        """Start the readers, at the position of `state` if there is one.

        Args:
            config: the sources, lanes, mixtures and workers.
            tokenizer: the tokenizer, which each reader loads.
            sequence_length: T, targets per sequence.
            split: the training documents, or the validation documents, which are read once in an order of their own.
            epochs: epochs of each source until it ends, instead of the limits of the config; the stream ends when all
                sources have. None for a stream without end. The validation split always has one.
            group: a process group with a backend for CPU tensors (gloo); None for a single process.
            state: the state of a stream with the same arguments, except `workers` and `group`.
            catalog: the files of the sources; listed here if there is none.

        Raises:
            DataError: a source or the tokenizer cannot be used, and `check_sources` reports all problems together; or
                `state` has another version, or other sources or lanes.
            ValueError: an argument is out of range.

        """
        if sequence_length < 1:
            raise ValueError(f"sequence_length is {sequence_length}, expected at least 1")
        if epochs is not None and (epochs < 1 or (split == "validation" and epochs != 1)):
            raise ValueError(f"epochs is {epochs}, expected at least 1, and exactly 1 for the validation split")
        set_retry_minutes(config.retry_minutes)
        catalog = catalog or make_catalog(config)
        self._plan = make_plan(config, split, epochs, catalog)
        loaded = load_tokenizer(tokenizer)  # to fail here rather than in a reader
        if problems := tokenizer_problems(catalog, loaded, tokenizer):
            raise DataError("\n".join(problems))
        self._sequence_length = sequence_length
        # The validation split is packed in one way for all runs, so that their losses can be compared.
        self.packing = config.packing if split == "train" else "concatenate"
        lane_classes: dict[str, type[Lane]] = {"concatenate": Lane, "best_fit": BestFitLane}
        self._lane_class = lane_classes[self.packing]
        self._ranks = Ranks(group.rank(), group.size(), group) if group else Ranks()
        self._failure: BaseException | None = None

        start = read_state(state, self._plan, sequence_length) if state else initial_state(self._plan)
        self._rings = [
            RingPosition.of(ring, saved, resumed=state is not None)
            for ring, saved in zip(self._plan.rings, start["sources"], strict=True)
        ]
        self._sequences = start["sequences_emitted"]
        self._text_bytes = start["text_bytes"]
        self._schedule = Schedule(
            self._plan.stages,
            sequence_length,
            sequence=self._sequences,
            ended=[index for index, ring in enumerate(self._rings) if ring.ended],
            state=start["mixture"] if state else None,
        )
        self._readers: list[Reader] = []
        self._queues: dict[int, RingQueues] = {}
        self._cursors: dict[int, Cursor] = {}
        # The validation split is small: a process of its own would take longer to start than to read it.
        self._open_readers(cursors_of(start), tokenizer, config.workers if split == "train" else 0)

    def _open_readers(self, cursors: list[Cursor], tokenizer: TokenizerConfig, workers: int) -> None:
        """Start the readers of this rank, with the queues of their lanes."""
        rank, size = self._ranks.rank, self._ranks.world_size
        per_rank = max(workers, 1)
        for number in range(rank * per_rank, (rank + 1) * per_rank):
            own = range(number, self._plan.lanes, size * per_rank)
            tasks = {}
            for index, position in enumerate(self._rings):
                if lanes := [lane for lane in own if lane in position.ring.lanes]:
                    ring = tuple(lane for lane in position.turns if lane in own)
                    tasks[index] = RingTask(position.epoch, ring, {lane: cursors[lane] for lane in lanes})
            if not tasks:
                continue
            task = ReaderTask(self._plan, tokenizer, self._sequence_length, tasks, self._lane_class)
            reader = WorkerReader(task) if workers else InlineReader(task)
            self._readers.append(reader)
            for index, ring_task in tasks.items():
                self._queues |= dict.fromkeys(ring_task.cursors, RingQueues(reader, index, list(ring_task.cursors)))
        self._cursors = {lane: cursors[lane] for lane in self._queues}

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text in the batches returned so far, on all ranks and including those before a resume.

        Once the stream has ended, this is the size of all its documents. A document of which only some tokens have
        been targets counts in proportion.
        """
        return self._text_bytes

    @property
    def stage(self) -> int:
        """Index of the current stage of the mixture."""
        return self._schedule.stage

    def progress(self) -> dict[str, SourceProgress]:
        """Return how far each source has been read, by its name; not a collective call."""
        return {
            ring.ring.name: SourceProgress(
                ring.epoch,
                ring.ring.epochs,
                ring.sequences,
                ring.tokens,
                ring.documents,
                ring.text_bytes,
                ring.bad_rows,
                ring.sequences * self._sequence_length - ring.tokens,
                ring.cut_documents,
            )
            for ring in self._rings
        }

    def next_batch(self, num_sequences: int) -> TokenBatch:
        """Return the next global batch, the same on every rank; a collective call.

        A finite stream returns a shorter batch at its end and raises StopIteration afterwards.

        Raises:
            StopIteration: the stream has ended.
            DataError: a source cannot be read, or holds no document of this split; or the sources of the mixture have
                ended by their `max_epochs`.
            RuntimeError: a worker process died.
            PeerError: one of these happened on another rank.

        After an error, every further call raises it again, and `state` remains that of the last returned batch.

        """
        if num_sequences < 1:
            raise ValueError(f"num_sequences is {num_sequences}, expected at least 1")
        if self._failure is not None:
            raise self._failure
        try:
            rows, schedule, rings = self._deal(num_sequences)
            if len(rows) < num_sequences and self._plan.epochs is None:
                raise DataError(self._all_ended(schedule, rings))
            if not rows:
                raise StopIteration("the stream has ended")
            batch, cursors = self._fill(rows, rings)
        except BaseException as error:
            self._failure = error
            raise
        self._schedule, self._rings = schedule, rings
        self._cursors |= cursors
        self._sequences += len(rows)
        self._text_bytes = sum(ring.text_bytes for ring in rings)
        return batch

    def state(self) -> StreamState:
        """Return the position after the last returned batch, regardless of what was read ahead; a collective call."""
        cursors = torch.zeros(self._plan.lanes, len(Cursor._fields), dtype=torch.int64)
        for lane, cursor in self._cursors.items():
            cursors[lane] = torch.tensor(cursor)
        self._all_reduce(cursors)
        lanes = [LaneState(epoch=e, unit=u, row=r, token=t) for e, u, r, t in cursors.tolist()]
        return StreamState(
            version=STATE_VERSION,
            mixture=self._schedule.state(),
            sources=[ring.state(lanes[ring.ring.lanes.start : ring.ring.lanes.stop]) for ring in self._rings],
            sequences_emitted=self._sequences,
            text_bytes=self._text_bytes,
        )

    def close(self) -> None:
        """End the workers and close the files. May be called twice; not a collective call."""
        self._failure = RuntimeError("the stream is closed")
        for reader in self._readers:
            reader.close()

    def _deal(self, num_sequences: int) -> tuple[list[int], Schedule, list[RingPosition]]:
        """Return the lanes of the next rows, fewer if the stream ends; and the schedule and the rings after them."""
        schedule, rings = self._schedule.copy(), [ring.copy() for ring in self._rings]
        rows: list[int] = []
        dealt = [0] * self._plan.lanes
        while len(rows) < num_sequences:
            source = schedule.next()
            if source is None:
                # A finite stream reads every source to its end, even if that of a stage comes too early.
                if self._plan.epochs is None or not schedule.skip_stage():
                    break
            elif rings[source].turns:
                missing = num_sequences - len(rows)
                wanted = {
                    lane: dealt[lane] - (-count // len(rings[index].turns))
                    for index, count in schedule.demand(missing).items()
                    for lane in rings[index].turns
                }
                rows += take_turns(schedule, rings, self._look_ahead(wanted), wanted, dealt, missing)
            else:
                self._end_epoch(source, rings[source])
                if rings[source].ended:
                    schedule.end(source)
        return rows, schedule, rings

    def _look_ahead(self, wanted: dict[int, int]) -> list[int]:
        """Return how many sequences each lane can give, at most the wanted number; if fewer, its epoch ends.

        Each rank looks at its own lanes. All ranks learn of an error on one of them, or they would wait for it forever.
        """
        ready = torch.zeros(self._plan.lanes + 1, dtype=torch.int64)
        failure: Exception | None = None
        try:
            for lane in wanted.keys() & self._queues.keys():
                ready[lane] = self._queues[lane].look_ahead(lane, wanted[lane])
        except Exception as error:
            failure = error
            ready[-1] = 1
        self._all_reduce(ready)
        *counts, failures = ready.tolist()
        if failures:
            self._ranks.together(partial(_raise, failure))
        return counts

    def _queues_of(self, source: int) -> Iterator[RingQueues]:
        """This rank's queues of a source, each once."""
        return (queues for queues in set(self._queues.values()) if queues.ring == source)

    def _end_epoch(self, source: int, position: RingPosition) -> None:
        """Begin the next epoch of a source; refuse a whole epoch without any document, which would repeat forever."""
        if position.whole_epoch and position.epoch_sequences == 0:
            documents = torch.tensor([sum(queues.documents for queues in self._queues_of(source))])
            self._all_reduce(documents)
            if not documents.item():
                raise DataError(
                    f"no document of {position.ring.name} belongs to the {self._plan.split} split "
                    f"(data.validation_fraction is {self._plan.validation_fraction})"
                )
        for queues in self._queues_of(source):
            queues.begin_epoch()
        position.begin_epoch()

    def _fill(self, rows: list[int], rings: list[RingPosition]) -> tuple[TokenBatch, dict[int, Cursor]]:
        """Write the sequences of this rank into their rows and add up the rows of all ranks.

        Counts the rows in `rings`. Returns the batch and the new cursors of the lanes of this rank.
        """
        width = self._sequence_length + 1
        table = torch.zeros(
            len(rows), width + 5, dtype=torch.int32
        )  # tokens, length, bytes of text, documents, bad rows, cut documents
        view = table.numpy()
        cursors: dict[int, Cursor] = {}
        bad: list[BadRow] = []
        for row, lane in enumerate(rows):
            if lane in self._queues:
                sequence = self._queues[lane].take(lane)
                view[row, :width] = sequence.tokens
                bad_rows = sum(bad.rows for bad in sequence.bad_rows)
                view[row, width:] = sequence.length, sequence.text_bytes, sequence.documents, bad_rows, sequence.cut
                bad += sequence.bad_rows
                cursors[lane] = sequence.cursor
        self._all_reduce(table)
        for lane, counts in zip(rows, view[:, width:].tolist(), strict=True):
            rings[self._plan.ring_of(lane)].count(*counts)
        self._check_bad_rows(bad, sum(ring.bad_rows for ring in rings))
        batch = TokenBatch(table[:, :width].contiguous(), table[:, width].contiguous())
        return batch, cursors

    def _check_bad_rows(self, new: list[BadRow], total: int) -> None:
        """Log the bad rows that this rank skipped in a batch; an error on all ranks if there are too many on all."""
        for bad in new:
            logger.warning("skipped a bad row: %s", bad)
        if total > self._plan.max_bad_rows:
            failure = too_many(new[-1], total, self._plan.max_bad_rows) if new else None
            self._ranks.together(partial(_raise, failure))

    def _all_ended(self, schedule: Schedule, rings: list[RingPosition]) -> str:
        """Say that no source is left to go on with."""
        shares = self._plan.stages[schedule.stage].shares
        ended = [f"{ring.ring.name} after {ring.epoch}" for ring, share in zip(rings, shares, strict=True) if share]
        stage = f" of stage {schedule.stage}" if len(self._plan.stages) > 1 else ""
        return (
            f"every source{stage} has ended by its max_epochs ({', '.join(ended)} epochs), after "
            f"{self._sequences * self._sequence_length:,} tokens: lower train.total_tokens, add text, raise max_epochs "
            "or set data.past_max_epochs to error"
        )

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        if self._ranks.group is not None:
            dist.all_reduce(tensor, group=self._ranks.group)


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure
