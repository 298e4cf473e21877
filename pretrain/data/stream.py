"""The global stream of token batches: the same on any number of ranks and workers, and exactly resumable.

Sequences come from a ring of lanes: each lane in turn contributes its next sequence and goes to the back. A lane whose
epoch is over leaves, and when all have left, the next epoch begins with all lanes. With three lanes, of which lane 1
has only one sequence in this epoch, batches of four are

    sequence  0 1 2 3 | 4 5 6 7
    lane      0 1 2 0 | 2 0 2 0      lane 1 leaves when its second turn comes, after sequence 3

The lanes are divided among the readers: with R ranks of W workers each, lane l is read by reader l mod RW, which
belongs to rank (l mod RW) // W. A reader yields the sequences of its own lanes in the order of the ring. To know how
the lanes of other ranks interleave, a rank only needs to know *how many* sequences each lane still has in this epoch,
up to the few that the batch can take: one small all-reduce. Every rank then writes its own sequences into their rows,
and a second all-reduce gives all rows to all ranks.
"""

from collections import deque
from functools import partial
from typing import Literal, TypedDict

import torch
import torch.distributed as dist

from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data.batch import TokenBatch
from pretrain.data.catalog import Catalog, make_catalog, tokenizer_problems
from pretrain.data.documents import Cursor
from pretrain.data.errors import DataError
from pretrain.data.order import make_plan
from pretrain.data.packing import EpochEnd, PackedSequence, ReaderTask
from pretrain.data.tokenizer import load_tokenizer
from pretrain.data.workers import InlineReader, Reader, WorkerReader
from pretrain.engine.ranks import Ranks

STATE_VERSION = 1


class LaneState(TypedDict):
    """The first token of a lane that has not been a target yet."""

    epoch: int
    """May be earlier than the epoch of the stream: a lane's tail waits until later epochs complete its sequence."""
    unit: int
    """Index among the units of the lane in that epoch."""
    row: int
    """Row of the unit, counted from 0; may be one past the last."""
    token: int
    """Index of the token in the document of that row."""


class StreamState(TypedDict):
    """Position of a stream. JSON-serialisable; the same on every rank, for any number of ranks and workers."""

    version: int
    """Version of this format: 1."""
    epoch: int
    next_lane: int
    """The lane whose turn is next; 0 if all have left."""
    left: list[int]
    """Lanes that have left the ring in this epoch, ascending."""
    lanes: list[LaneState]
    sequences_emitted: int
    text_bytes: int
    """UTF-8 bytes of the text in those sequences."""


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
            config: the sources, lanes and workers.
            tokenizer: the tokenizer, which each reader loads.
            sequence_length: T, targets per sequence.
            split: the training documents, or the validation documents, which are read once in an order of their own.
            epochs: number of epochs; None for a stream without end. The validation split always has one.
            group: a process group with a backend for CPU tensors (gloo); None for a single process.
            state: the state of a stream with the same arguments, except `workers` and `group`.
            catalog: the files of the sources; listed here if there is none.

        Raises:
            DataError: a source or the tokenizer cannot be used; `check_sources` reports all problems together.
            ValueError: an argument is out of range, or `state` has another version or number of lanes.

        """
        if sequence_length < 1:
            raise ValueError(f"sequence_length is {sequence_length}, expected at least 1")
        if epochs is not None and (epochs < 1 or (split == "validation" and epochs != 1)):
            raise ValueError(f"epochs is {epochs}, expected at least 1, and exactly 1 for the validation split")
        catalog = catalog or make_catalog(config)
        self._plan = make_plan(config, split, epochs, catalog)
        loaded = load_tokenizer(tokenizer)  # to fail here rather than in a reader
        if problems := tokenizer_problems(catalog, loaded, tokenizer):
            raise DataError("\n".join(problems))
        self._sequence_length = sequence_length
        self._ranks = Ranks(group.rank(), group.size(), group) if group else Ranks()
        self._failure: BaseException | None = None
        self._sources = ", ".join(source.path for source in config.sources)

        start = state or _initial_state(self._plan.lanes)
        _check_state(start, self._plan.lanes)
        self._epoch = start["epoch"]
        self._ring = _ring(start)
        self._sequences = start["sequences_emitted"]
        self._text_bytes = start["text_bytes"]
        self._epoch_is_whole = state is None  # started here, not resumed
        self._epoch_sequences = 0
        # The validation split is small: a process of its own would take longer to start than to read it.
        self._queues = self._open_readers(start, tokenizer, config.workers if split == "train" else 0)
        self._cursors = {lane: Cursor(**start["lanes"][lane]) for lane in self._queues}

    def _open_readers(self, start: StreamState, tokenizer: TokenizerConfig, workers: int) -> dict[int, "ReaderQueues"]:
        """Start the readers of this rank; return the queues of each of its lanes."""
        rank, size = self._ranks.rank, self._ranks.world_size
        per_rank = max(workers, 1)
        queues: dict[int, ReaderQueues] = {}
        for reader in range(rank * per_rank, (rank + 1) * per_rank):
            lanes = range(reader, self._plan.lanes, size * per_rank)
            if not lanes:
                continue
            cursors = {lane: Cursor(**start["lanes"][lane]) for lane in lanes}
            ring = tuple(lane for lane in self._ring if lane in lanes)
            task = ReaderTask(self._plan, tokenizer, self._sequence_length, cursors, self._epoch, ring)
            own = ReaderQueues(WorkerReader(task) if workers else InlineReader(task), lanes)
            queues |= dict.fromkeys(lanes, own)
        return queues

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text in the batches returned so far, on all ranks and including those before a resume.

        Once the stream has ended, this is the size of all its documents. A document of which only some tokens have
        been targets counts in proportion.
        """
        return self._text_bytes

    def next_batch(self, num_sequences: int) -> TokenBatch:
        """Return the next global batch, the same on every rank; a collective call.

        A finite stream returns a shorter batch at its end and raises StopIteration afterwards.

        Raises:
            StopIteration: the stream has ended.
            DataError: a source cannot be read, or no source holds a document of this split.
            RuntimeError: a worker process died.
            PeerError: one of these happened on another rank.

        After an error, every further call raises it again, and `state` remains that of the last returned batch.

        """
        if num_sequences < 1:
            raise ValueError(f"num_sequences is {num_sequences}, expected at least 1")
        if self._failure is not None:
            raise self._failure
        try:
            rows, ring, epoch = self._deal(num_sequences)
            if not rows:
                raise StopIteration("the stream has ended")
            batch, text_bytes, cursors = self._fill(rows)
        except BaseException as error:
            self._failure = error
            raise
        self._ring, self._epoch = ring, epoch
        self._cursors |= cursors
        self._sequences += len(rows)
        self._text_bytes += text_bytes
        return batch

    def state(self) -> StreamState:
        """Return the position after the last returned batch, regardless of what was read ahead; a collective call."""
        cursors = torch.zeros(self._plan.lanes, len(Cursor._fields), dtype=torch.int64)
        for lane, cursor in self._cursors.items():
            cursors[lane] = torch.tensor(cursor)
        self._all_reduce(cursors)
        return StreamState(
            version=STATE_VERSION,
            epoch=self._epoch,
            next_lane=self._ring[0] if self._ring else 0,
            left=sorted(set(range(self._plan.lanes)) - set(self._ring)),
            lanes=[LaneState(epoch=e, unit=u, row=r, token=t) for e, u, r, t in cursors.tolist()],
            sequences_emitted=self._sequences,
            text_bytes=self._text_bytes,
        )

    def close(self) -> None:
        """End the workers and close the files. May be called twice; not a collective call."""
        self._failure = RuntimeError("the stream is closed")
        for queues in self._queues.values():
            queues.reader.close()

    def _deal(self, num_sequences: int) -> tuple[list[int], deque[int], int]:
        """Return the lanes of the next rows, and the ring and the epoch after them."""
        ring, epoch = deque(self._ring), self._epoch
        rows: list[int] = []
        dealt = [0] * self._plan.lanes
        while len(rows) < num_sequences and epoch != self._plan.epochs:
            if ring:
                missing = num_sequences - len(rows)
                turns = -(-missing // len(ring))
                wanted = {lane: dealt[lane] + turns for lane in ring}
                taken = _take_turns(ring, self._look_ahead(wanted), wanted, dealt, missing)
                self._epoch_sequences += len(taken)
                rows += taken
            else:
                self._end_epoch()
                epoch += 1
                ring.extend(range(self._plan.lanes) if epoch != self._plan.epochs else ())
        return rows, ring, epoch

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

    def _end_epoch(self) -> None:
        """Refuse an epoch without any document, after which the stream would search forever."""
        if self._epoch_is_whole and self._epoch_sequences == 0:
            documents = torch.tensor([sum(queues.documents for queues in set(self._queues.values()))])
            self._all_reduce(documents)
            if not documents.item():
                raise DataError(
                    f"no document of {self._sources} belongs to the {self._plan.split} split "
                    f"(data.validation_fraction is {self._plan.validation_fraction})"
                )
        for queues in self._queues.values():
            queues.begin_epoch()
        self._epoch_is_whole, self._epoch_sequences = True, 0

    def _fill(self, rows: list[int]) -> tuple[TokenBatch, int, dict[int, Cursor]]:
        """Write the sequences of this rank into their rows and add up the rows of all ranks.

        Returns the batch, the bytes of its text, and the new cursors of the lanes of this rank.
        """
        width = self._sequence_length + 1
        table = torch.zeros(len(rows), width + 2, dtype=torch.int32)  # tokens, length, bytes of text
        view = table.numpy()
        cursors: dict[int, Cursor] = {}
        for row, lane in enumerate(rows):
            if lane in self._queues:
                sequence = self._queues[lane].take(lane)
                view[row, :width] = sequence.tokens
                view[row, width:] = sequence.length, sequence.text_bytes
                cursors[lane] = sequence.cursor
        self._all_reduce(table)
        batch = TokenBatch(table[:, :width].contiguous(), table[:, width].contiguous())
        return batch, int(table[:, -1].sum()), cursors

    def _all_reduce(self, tensor: torch.Tensor) -> None:
        if self._ranks.group is not None:
            dist.all_reduce(tensor, group=self._ranks.group)


class ReaderQueues:
    """The items that a reader has yielded and no batch has taken yet, by lane."""

    def __init__(self, reader: Reader, lanes: range) -> None:
        self.reader = reader
        self.documents = 0
        """Documents of this epoch, over the lanes that have reached its end."""
        self._ready: dict[int, deque[PackedSequence]] = {lane: deque() for lane in lanes}
        self._ended: set[int] = set()

    def look_ahead(self, lane: int, wanted: int) -> int:
        """Return how many sequences of the epoch a lane has, at most `wanted`."""
        while len(self._ready[lane]) < wanted and lane not in self._ended:
            item = self.reader.pull()
            if isinstance(item, EpochEnd):
                self._ended.add(item.lane)
                self.documents += item.documents
            else:
                self._ready[item.lane].append(item)
        return min(wanted, len(self._ready[lane]))

    def take(self, lane: int) -> PackedSequence:
        """Remove the next sequence of a lane."""
        return self._ready[lane].popleft()

    def begin_epoch(self) -> None:
        """Expect sequences from all lanes again."""
        self._ended.clear()
        self.documents = 0


def _take_turns(
    ring: deque[int], ready: list[int], wanted: dict[int, int], dealt: list[int], missing: int
) -> list[int]:
    """Let the lanes of the ring take turns for at most `missing` rows; return the lane of each row.

    Advances `ring` and `dealt`. Stops early at a lane whose next sequences are not known yet.
    """
    rows: list[int] = []
    while ring and len(rows) < missing:
        lane = ring[0]
        if dealt[lane] < ready[lane]:
            rows.append(lane)
            dealt[lane] += 1
            ring.rotate(-1)
        elif ready[lane] < wanted[lane]:
            ring.popleft()  # its epoch is over
        else:
            break
    return rows


def _initial_state(lanes: int) -> StreamState:
    begin = LaneState(epoch=0, unit=0, row=0, token=0)
    return StreamState(
        version=STATE_VERSION, epoch=0, next_lane=0, left=[], lanes=[begin] * lanes, sequences_emitted=0, text_bytes=0
    )


def _raise(failure: Exception | None) -> None:
    if failure is not None:
        raise failure


def _check_state(state: StreamState, lanes: int) -> None:
    if state["version"] != STATE_VERSION:
        raise ValueError(f"the data state has version {state['version']}, this program reads {STATE_VERSION}")
    if len(state["lanes"]) != lanes:
        raise ValueError(
            f"the data state was saved with {len(state['lanes'])} lanes and data.lanes is {lanes}: the number of "
            "lanes decides the order of the text and cannot change within a run"
        )


def _ring(state: StreamState) -> deque[int]:
    """Return the lanes that have not left the ring, beginning with the next one."""
    ring = deque(lane for lane in range(len(state["lanes"])) if lane not in set(state["left"]))
    while ring and ring[0] != state["next_lane"]:
        ring.rotate(-1)
    return ring
