"""The global stream of token batches: the same on any number of ranks and workers, and exactly resumable.

The mixture decides which source gives each next sequence (`pretrain.data.mixture`). Within a source, sequences come
from a ring of lanes: each lane in turn contributes its next sequence and goes to the back. A lane whose epoch is over
leaves, and when all have left, the next epoch of the source begins with all its lanes. With one source of three lanes,
of which lane 1 has only one sequence in this epoch, batches of four are

    sequence  0 1 2 3 | 4 5 6 7
    lane      0 1 2 0 | 2 0 2 0      lane 1 leaves when its second turn comes, after sequence 3

The lanes of all sources are numbered through: lane l belongs to rank l mod R, and there to its worker (l div R) mod W.
Each reader yields, for each source, the sequences of its own lanes in the order of the ring. To know how the lanes of
other ranks interleave, a rank only needs to know *how many* sequences each lane still has in this epoch, up to the few
that the batch can take: one small all-reduce. A second one tells every rank the length and the counts of each row.

The tokens stay where they were read. All ranks know which rank trains on which row (`pretrain.data.exchange`), and only
the rows of ranks that read more than their part are sent. The set and the order of the rows of a global batch depend on
neither ranks nor workers.
"""

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data.bad_rows import BadRow, too_many
from pretrain.data.batch import BatchShare
from pretrain.data.best_fit import BestFitLane
from pretrain.data.catalog import Catalog, make_catalog, tokenizer_problems
from pretrain.data.documents import Cursor
from pretrain.data.errors import DataError
from pretrain.data.exchange import assign, exchange
from pretrain.data.mixture import Schedule
from pretrain.data.order import make_plan
from pretrain.data.packing import Lane, PackedSequence, ReaderTask, RingTask
from pretrain.data.position import SourceProgress, StreamPosition
from pretrain.data.rings import RingPosition, RingQueues, take_turns
from pretrain.data.sources.retries import set_retry_minutes
from pretrain.data.state import StreamState, cursors_of, initial_state, read_state
from pretrain.data.tokenizer import DocumentEncoder
from pretrain.data.workers import InlineReader, Reader, WorkerReader
from pretrain.engine.ranks import Ranks

logger = logging.getLogger(__name__)


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
        self._encoder = DocumentEncoder.load(tokenizer)  # to fail here rather than in a reader
        if problems := tokenizer_problems(catalog, self._encoder.tokenizer, tokenizer):
            raise DataError("\n".join(problems))
        self._sequence_length = sequence_length
        # The validation split is packed in one way for all runs, so that their losses can be compared.
        best_fit = config.packing == "best_fit" and split == "train"
        self._lane_class: type[Lane] = BestFitLane if best_fit else Lane
        self._ranks = Ranks(group.rank(), group.size(), group) if group else Ranks()
        self._failure: BaseException | None = None

        start = read_state(state, self._plan, sequence_length) if state else initial_state(self._plan)
        rings = [
            RingPosition.of(ring, saved, resumed=state is not None)
            for ring, saved in zip(self._plan.rings, start["sources"], strict=True)
        ]
        schedule = Schedule(
            self._plan.stages,
            sequence_length,
            sequence=start["sequences_emitted"],
            ended=[index for index, ring in enumerate(rings) if ring.ended],
            state=start["mixture"] if state else None,
        )
        self._ring_of = np.repeat(np.arange(len(rings)), [len(ring.ring.lanes) for ring in rings])
        self._readers: list[Reader] = []
        self._queues: dict[int, RingQueues] = {}
        self._ready: dict[int, deque[PackedSequence]] = {}
        # The validation split is small: a process of its own would take longer to start than to read it.
        cursors = cursors_of(start)
        self._open_readers(rings, cursors, tokenizer, config.workers if split == "train" else 0)
        own = {lane: cursors[lane] for lane in self._queues}
        self.position = StreamPosition(schedule, rings, own, start["sequences_emitted"])
        """After the last returned batch, regardless of what was read ahead. Each batch replaces it by a new one."""

    def _open_readers(
        self, rings: Sequence[RingPosition], cursors: Sequence[Cursor], tokenizer: TokenizerConfig, workers: int
    ) -> None:
        """Start the readers of this rank, with the queues of their lanes."""
        rank, size = self._ranks.rank, self._ranks.world_size
        per_rank = max(workers, 1)
        for worker in range(per_rank):
            own = range(rank + worker * size, self._plan.lanes, size * per_rank)
            tasks = {}
            for index, position in enumerate(rings):
                if lanes := [lane for lane in own if lane in position.ring.lanes]:
                    ring = tuple(lane for lane in position.turns if lane in own)
                    tasks[index] = RingTask(position.epoch, ring, {lane: cursors[lane] for lane in lanes})
            if not tasks:
                continue
            task = ReaderTask(self._plan, tokenizer, self._sequence_length, tasks, self._lane_class)
            reader = WorkerReader(task) if workers else InlineReader(task, self._encoder)
            self._readers.append(reader)
            for index, ring_task in tasks.items():
                queues = RingQueues(reader, index, list(ring_task.cursors))
                self._queues |= dict.fromkeys(ring_task.cursors, queues)
                self._ready |= queues.ready

    @property
    def text_bytes(self) -> int:
        """See `StreamPosition.text_bytes`."""
        return self.position.text_bytes

    def progress(self) -> dict[str, SourceProgress]:
        """See `StreamPosition.progress`; not a collective."""
        return self.position.progress()

    def next_batch(self, num_sequences: int) -> BatchShare:
        """Return this rank's share of the next global batch of `num_sequences` rows; a collective call.

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
            lanes, schedule, rings = self._deal(num_sequences)
            if len(lanes) < num_sequences and self._plan.epochs is None:
                raise DataError(self._all_ended(schedule, rings))
            if not lanes:
                raise StopIteration("the stream has ended")
            batch, cursors = self._fill(lanes, rings)
        except BaseException as error:
            self._failure = error
            raise
        before = self.position
        self.position = StreamPosition(schedule, rings, {**before.cursors, **cursors}, before.sequences + len(lanes))
        return batch

    def state(self) -> StreamState:
        """Return what a checkpoint of the position holds; a collective call."""
        return self.position.state(self._ranks.group)

    def close(self) -> None:
        """End the workers and close the files. May be called twice; not a collective call."""
        self._failure = RuntimeError("the stream is closed")
        for reader in self._readers:
            reader.close()

    def _deal(self, num_sequences: int) -> tuple[list[int], Schedule, list[RingPosition]]:
        """Return the lanes of the next rows, fewer if the stream ends; and the schedule and the rings after them."""
        schedule, rings = self.position.schedule.copy(), [ring.copy() for ring in self.position.rings]
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

    def _fill(self, lanes: list[int], rings: list[RingPosition]) -> tuple[BatchShare, dict[int, Cursor]]:
        """Take this rank's sequences and exchange those that another rank trains on.

        Counts the rows of all ranks in `rings`. Returns this rank's share and the new cursors of its lanes.
        """
        rank, size = self._ranks.rank, self._ranks.world_size
        owners = [lane % size for lane in lanes] if size > 1 else [0] * len(lanes)
        own = [row for row, owner in enumerate(owners) if owner == rank] if size > 1 else range(len(lanes))
        items = [self._ready[lanes[row]].popleft() for row in own]
        tokens = np.empty((len(own), self._sequence_length + 1), dtype=np.int32)
        counts = np.zeros((len(lanes), 5), dtype=np.int64)
        of_sources = np.zeros((sum(len(ring.ring.units) for ring in rings), 3), dtype=np.int64)
        cursors: dict[int, Cursor] = {}
        bad: list[BadRow] = []
        if items:
            own_lanes, found, lengths, text_bytes, documents, skipped, ends, cut, parts = zip(*items, strict=True)
            np.concatenate(found, out=tokens.reshape(-1), casting="same_kind")
            cursors = dict(zip(own_lanes, ends, strict=True))
            bad_rows = [sum(one.rows for one in of_row) if of_row else 0 for of_row in skipped]
            counts[own] = np.array([lengths, text_bytes, documents, bad_rows, cut]).T
            bad += chain.from_iterable(skipped)
            for source, *more in chain.from_iterable(parts):
                of_sources[source] += more
        both = np.concatenate([counts.ravel(), of_sources.ravel()])
        self._all_reduce(torch.from_numpy(both))
        counts, of_sources = both[: counts.size].reshape(-1, 5), both[counts.size :].reshape(-1, 3)
        ring_of = self._ring_of[lanes]
        for index, ring in enumerate(rings):
            of_ring = counts[ring_of == index]
            ring.count(len(of_ring), *of_ring.sum(axis=0).tolist())
            ring.count_parts(of_sources.tolist())
        self._check_bad_rows(bad, sum(ring.bad_rows for ring in rings))
        trainers = assign(owners, size) if size > 1 else owners
        share = [row for row, trainer in enumerate(trainers) if trainer == rank] if size > 1 else range(len(lanes))
        lengths = counts[:, 0]
        batch = BatchShare(
            torch.from_numpy(exchange(tokens, owners, trainers, self._ranks)),
            torch.from_numpy(lengths[share].astype(np.int32)),
            rows=tuple(share),
            global_rows=len(lanes),
            global_targets=int(lengths.sum()),
        )
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
            f"{self.position.sequences * self._sequence_length:,} tokens: lower train.total_tokens, add text, "
            "raise max_epochs or set data.past_max_epochs to error"
        )

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        if self._ranks.group is not None:
            dist.all_reduce(tensor, group=self._ranks.group)


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure
