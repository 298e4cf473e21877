"""The global stream of token batches: the same on any number of ranks and workers, and exactly resumable.

Sequences come from a ring of lanes: each lane in turn contributes its next sequence and goes to the back; a lane
whose epoch is over leaves; when all have left, the next epoch begins with all lanes. With three lanes of which lane
1 has only one sequence in this epoch, batches of four are

    sequence  0 1 2 3 | 4 5 6 7
    lane      0 1 2 0 | 2 0 2 0      lane 1 leaves when its second turn comes, after sequence 3

The lanes are shared out: with R ranks of W workers each, lane l is read by reader l mod RW, which belongs to rank
(l mod RW) // W. A reader yields the sequences of its own lanes in the order of the ring. To know how the lanes of
others interleave, a rank needs to know only *how many* sequences each lane still has in this epoch, up to the few
that the batch can take: one small all-reduce. Then every rank writes its own sequences into their rows, and a second
all-reduce gives all rows to all ranks.
"""

from collections import deque
from typing import Literal, TypedDict

import torch
import torch.distributed as dist

from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data.batch import TokenBatch
from pretrain.data.documents import Cursor
from pretrain.data.errors import DataError
from pretrain.data.order import make_plan
from pretrain.data.packing import EpochEnd, PackedSequence, ReaderTask
from pretrain.data.tokenizer import load_tokenizer
from pretrain.data.workers import InlineReader, Reader, WorkerReader

STATE_VERSION = 1
_MESSAGE_BYTES = 4096


class LaneState(TypedDict):
    """The first token of a lane that is not yet a target."""

    epoch: int
    """Earlier than the stream's epoch while the lane's tail waits for it to fill a sequence."""
    unit: int
    """Index among the lane's units of that epoch."""
    row: int
    """Row of the unit, counted from 0. May be one past the last."""
    token: int
    """Token of the document in that row."""


class StreamState(TypedDict):
    """Where a stream is. JSON-serialisable; the same on every rank, for any number of ranks and workers."""

    version: int
    """Version of this format: 1."""
    epoch: int
    next_lane: int
    """The lane whose turn comes next; 0 when all have left."""
    left: list[int]
    """Lanes that have left the ring in this epoch, ascending."""
    lanes: list[LaneState]
    sequences_emitted: int
    text_bytes: int
    """UTF-8 bytes of the text in those sequences."""


class TokenStream:
    """Batches of packed sequences from the sources of a config.

    All ranks of `group` construct the stream with the same arguments and make the same calls in the same order.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: TokenizerConfig,
        context_length: int,
        *,
        split: Literal["train", "validation"] = "train",
        epochs: int | None = None,
        group: dist.ProcessGroup | None = None,
        state: StreamState | None = None,
    ) -> None:
        """Open the sources, and go on where `state` was taken if one is given.

        Args:
            config: the sources, lanes and workers.
            tokenizer: the tokenizer that each reader loads.
            context_length: T, targets per sequence.
            split: the training documents, or the validation documents: those once, in an order of their own.
            epochs: end after so many epochs; None goes on for ever. The validation split always has one.
            group: a process group with a backend for CPU tensors (gloo); None: this process is alone.
            state: of a stream with the same arguments, `workers` and `group` excepted.

        Raises:
            DataError: a source or the tokenizer cannot be used; see `check_sources` for all faults at once.
            ValueError: an argument is out of range, or `state` is of another version or number of lanes.

        """
        if context_length < 1:
            raise ValueError(f"context_length is {context_length}, expected at least 1")
        if epochs is not None and (epochs < 1 or (split == "validation" and epochs != 1)):
            raise ValueError(f"epochs is {epochs}, expected at least 1, and no other number for the validation split")
        self._plan = make_plan(config, split, epochs)
        load_tokenizer(tokenizer)  # to fail here rather than in a reader
        self._context_length = context_length
        self._group = group
        self._failure: BaseException | None = None
        self._sources = ", ".join(source.path for source in config.sources)

        start = state or _initial_state(self._plan.lanes)
        _check_state(start, self._plan.lanes)
        self._epoch = start["epoch"]
        self._ring = _ring(start)
        self._sequences = start["sequences_emitted"]
        self._text_bytes = start["text_bytes"]
        self._epoch_is_whole = state is None  # begun here, not resumed
        self._epoch_sequences = 0
        # The validation split is small: a process of its own would take longer to start than to read it.
        self._queues = self._open_readers(start, tokenizer, config.workers if split == "train" else 0)
        self._cursors = {lane: Cursor(**start["lanes"][lane]) for lane in self._queues}

    def _open_readers(self, start: StreamState, tokenizer: TokenizerConfig, workers: int) -> dict[int, "ReaderQueues"]:
        """Start this rank's readers; return the queues that each of its lanes is found in."""
        rank, size = (self._group.rank(), self._group.size()) if self._group else (0, 1)
        per_rank = max(workers, 1)
        queues: dict[int, ReaderQueues] = {}
        for reader in range(rank * per_rank, (rank + 1) * per_rank):
            lanes = range(reader, self._plan.lanes, size * per_rank)
            if not lanes:
                continue
            cursors = {lane: Cursor(**start["lanes"][lane]) for lane in lanes}
            ring = tuple(lane for lane in self._ring if lane in lanes)
            task = ReaderTask(self._plan, tokenizer, self._context_length, cursors, self._epoch, ring)
            own = ReaderQueues(WorkerReader(task) if workers else InlineReader(task), lanes)
            queues |= dict.fromkeys(lanes, own)
        return queues

    @property
    def text_bytes(self) -> int:
        """UTF-8 bytes of the text in the batches returned so far, on all ranks, those before a resume included.

        Once the stream has ended it is the size of all its documents. A document of which only some tokens were
        targets counts by that share.
        """
        return self._text_bytes

    def next_batch(self, num_sequences: int) -> TokenBatch:
        """Return the next global batch, the same on every rank; a collective call.

        A finite stream returns a shorter batch at its end, and from then on raises StopIteration.

        Raises:
            StopIteration: the stream has ended.
            DataError: a source cannot be read, here or on another rank, or holds no document for this split. From
                then on every call raises it; `state` remains that of the last returned batch.
            RuntimeError: a worker process died.

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
        """Return where the stream is after the last returned batch, whatever was read ahead; a collective call."""
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
        """Return the lanes that the next rows come from, and the ring and the epoch after them."""
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
        """Return for each lane how many sequences it can give, up to the wanted number; fewer: its epoch ends.

        Each rank looks at its own lanes. An error on one of them is raised on all, or the others would wait for ever.
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
            raise self._common_failure(failure)
        return counts

    def _common_failure(self, own: Exception | None) -> Exception:
        """Return this rank's error or, if it has none, a DataError with what the others' say."""
        rank, size = (self._group.rank(), self._group.size()) if self._group else (0, 1)
        messages = torch.zeros(size, _MESSAGE_BYTES, dtype=torch.uint8)
        text = str(own or "").encode()[:_MESSAGE_BYTES]
        messages[rank, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else 0
        self._all_reduce(messages)
        texts = [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in messages]
        return own or DataError("; ".join(text for text in texts if text))

    def _end_epoch(self) -> None:
        """Refuse an epoch without any document, after which the stream would search for ever."""
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
        """Write the sequences of this rank into their rows and add up those of all ranks.

        Returns the batch, the bytes of its text, and the new cursors of this rank's lanes.
        """
        width = self._context_length + 1
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
        if self._group is not None:
            dist.all_reduce(tensor, group=self._group)


class ReaderQueues:
    """What a reader has yielded and no batch has taken yet, by lane."""

    def __init__(self, reader: Reader, lanes: range) -> None:
        self.reader = reader
        self.documents = 0
        """Documents that its lanes read for the epoch, of those lanes that have reached its end."""
        self._ready: dict[int, deque[PackedSequence]] = {lane: deque() for lane in lanes}
        self._ended: set[int] = set()

    def look_ahead(self, lane: int, wanted: int) -> int:
        """Return how many sequences of the epoch a lane has, or `wanted` if it has more."""
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
        """Expect sequences of all lanes again."""
        self._ended.clear()
        self.documents = 0


def _take_turns(
    ring: deque[int], ready: list[int], wanted: dict[int, int], dealt: list[int], missing: int
) -> list[int]:
    """Let the lanes of the ring take turns for at most `missing` rows; return whose turns they were.

    Advances `ring` and counts up `dealt`. Stops early at a lane that was not looked into far enough.
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


def _check_state(state: StreamState, lanes: int) -> None:
    if state["version"] != STATE_VERSION:
        raise ValueError(f"the data state has version {state['version']}, this program reads {STATE_VERSION}")
    if len(state["lanes"]) != lanes:
        raise ValueError(
            f"the data state was saved with {len(state['lanes'])} lanes and data.lanes is {lanes}: the number of "
            "lanes decides the order of the text and cannot change within a run"
        )


def _ring(state: StreamState) -> deque[int]:
    """Return the lanes that have not left, beginning with the next one."""
    ring = deque(lane for lane in range(len(state["lanes"])) if lane not in set(state["left"]))
    while ring and ring[0] != state["next_lane"]:
        ring.rotate(-1)
    return ring
