"""From the documents of lanes to packed sequences.

The tokens of a lane form one line without gaps: a separator, then each document followed by a separator, epoch after
epoch. Sequence k of the lane is the window of T+1 tokens that begins at token kT. Its first token is the last of the
previous sequence, so every token except the very first is a target exactly once:

    tokens     | a a a | b | c c c c |        (| = separator, T = 4)
    sequence 0 [| a a a |]
    sequence 1         [| b | c c]
    sequence 2               [c c c | ...     waits for the next epoch, or is padded when there is none
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.config.data import TokenizerConfig
from pretrain.data.bad_rows import BadRow
from pretrain.data.documents import Cursor, Document, Tokenized, lane_documents
from pretrain.data.errors import DataError
from pretrain.data.order import ReadPlan
from pretrain.data.prepared.runs import TokenRun
from pretrain.data.tokenizer import DocumentEncoder, token_bytes

# Text that is decoded but not yet tokenized: at most this much in all lanes of a reader, and in one lane. A document is
# never divided, so a lane with larger documents holds one of them.
READ_AHEAD_BYTES = 64 << 20
LANE_READ_AHEAD_BYTES = 4 << 20


class Part(NamedTuple):
    """What a source contributes to a sequence."""

    source: int
    """Its index in the config."""
    tokens: int
    """Targets."""
    documents: int
    text_bytes: int


# Makes a named tuple of its fields. Where each sequence is a slice of prepared tokens, the constructors of the classes
# themselves would take a tenth of the time.
_make: Callable[..., Any] = tuple.__new__


class PackedSequence(NamedTuple):
    """One training sequence and the position where its lane continues."""

    lane: int
    tokens: npt.NDArray[Any]
    """Integers [T+1]; int32, or a view of prepared tokens."""
    length: int
    """Number of valid targets, `tokens[1 : 1 + length]`; T except in the last sequence of a lane."""
    text_bytes: int
    """UTF-8 bytes of the text whose tokens are targets here. The bytes of a document are spread evenly over its tokens,
    in whole numbers that add up to its size."""
    documents: int
    """Documents whose last token is a target here."""
    bad_rows: tuple[BadRow, ...]
    """Rows that were skipped before the documents that begin here, in the first epoch."""
    cursor: Cursor
    """The first token that is not yet a target."""
    cut: int = 0
    """Documents that begin here and are longer than a sequence; counted by best-fit packing only."""
    parts: tuple[Part, ...] = ()
    """What comes from which source, if those of several take turns in the lane; a source may occur more than once."""


@dataclass(frozen=True, slots=True)
class EpochEnd:
    """A lane leaves the ring: the rest of its epoch is shorter than a sequence."""

    lane: int
    documents: int
    """Documents that the lane read for this epoch."""


Item = PackedSequence | EpochEnd


@dataclass(frozen=True)
class RingTask:
    """The lanes of one ring that a reader reads."""

    epoch: int
    ring: tuple[int, ...]
    """Its lanes that are still in the ring of this epoch, beginning with the next one."""
    cursors: dict[int, Cursor]
    """All its lanes, in order, and the position where each continues."""


@dataclass(frozen=True)
class ReaderTask:
    """The work of one reader, which is a worker or the training process itself. Can be pickled."""

    plan: ReadPlan
    tokenizer: TokenizerConfig
    sequence_length: int
    rings: dict[int, RingTask]
    """By the index of the ring; those that the reader has lanes of."""
    lane_class: "type[Lane]"
    """How documents become sequences."""

    @property
    def lane_bytes(self) -> int:
        """Text of a lane that may be decoded but not yet tokenized."""
        lanes = sum(len(ring.cursors) for ring in self.rings.values())
        return min(LANE_READ_AHEAD_BYTES, READ_AHEAD_BYTES // lanes)


class Lane:
    """The tokens of a lane that have been read but not packed."""

    def __init__(self, task: ReaderTask, lane: int, cursor: Cursor, encoder: DocumentEncoder) -> None:
        self._task = task
        self._lane = lane
        self._encoder = encoder
        self._length = task.sequence_length
        self._cursor = self._read_from = cursor
        self._waiting: deque[tuple[Cursor, Cursor, TokenRun, tuple[BadRow, ...]]] = deque()
        self._used = self._cursor.token  # tokens of the first waiting run that have been packed
        self._last_token = encoder.eos_id  # before the first waiting run; a separator precedes the lane itself
        self._several = len(task.plan.rings[task.plan.ring_of(lane)].units) > 1  # sources
        self._sources: tuple[int, list[int]] = (-1, [])  # of the units of an epoch
        self._counted = (0, 0, 0)  # tokens of the first waiting run, and the documents and bytes before the last one
        self._documents: Iterator[Document | Tokenized] = iter(())
        self._documents_read = 0
        self._skipped: list[BadRow] = []  # since the last document that was read
        self._unattached: tuple[BadRow, ...] = ()  # of documents that were left out
        self.pending = 0
        """Tokens waiting to be packed."""
        self.expected = 0
        """Tokens, roughly, of the documents that have been read but not handed back to `push` or `skip`."""
        self.read_out = True
        """Whether the last document of this epoch has been read."""

    @property
    def exhausted(self) -> bool:
        """Whether nothing more will be pushed in this epoch."""
        return self.read_out and not self.expected

    def open(self, epoch: int) -> None:
        """Start reading, up to the end of an epoch. Tokens left over from the previous epoch come first.

        After a resume there are no such tokens: reading then begins at the cursor, in whichever epoch that is.
        """
        task, encoder = self._task, self._encoder
        self._documents = lane_documents(
            task.plan,
            self._lane,
            self._read_from,
            epoch,
            task.lane_bytes,
            self._skipped,
            # Of the encoder, not of the lane: files that are read in a cycle of references would stay open.
            lambda: token_bytes(encoder.tokenizer, encoder.eos_id),
        )
        self._documents_read = 0
        self._read_from = Cursor(epoch + 1, 0, 0, 0)
        self.read_out = False

    def next_document(self) -> Document | Tokenized | None:
        """Return the next document of the epoch; the caller hands it back to `push` with its tokens, or to `skip`."""
        document = next(self._documents, None)
        self.read_out = document is None
        return document

    def skip(self, bad_rows: tuple[BadRow, ...]) -> None:
        """Leave a document out; the bad rows before it are told of with the next one."""
        self._unattached += bad_rows

    def push(self, position: Cursor, end: Cursor, run: TokenRun, skipped: tuple[BadRow, ...] = ()) -> None:
        """Append a document, or a run of them, that begins and ends at positions and follows the skipped bad rows."""
        tokens = run.tokens
        if self._used and not self._waiting:  # after a resume: the cursor is within this run
            if position[:3] != self._cursor[:3] or self._used >= len(tokens):
                raise self._wrong_data(self._cursor)
            self.pending -= self._used
        self._waiting.append((position, end, run, self._unattached + skipped))
        self._unattached = ()
        self._documents_read += len(run.ends)
        self.pending += len(tokens)

    def pack(self, *, pad: bool) -> Item | None:
        """Return the next sequence, or the lane's `EpochEnd`; None if more must be read before either is known.

        If `pad` is true, a last shorter sequence is padded.
        """
        length = self._length
        if self.pending < length:
            if not self.exhausted:
                return None
            return self._join(self.pending) if pad and self.pending else EpochEnd(self._lane, self._documents_read)
        position, _, run, _ = self._waiting[0]
        begin, end = self._used, self._used + length
        if not begin or end >= len(run.tokens):
            return self._join(length)
        # Within one run, which prepared data makes the usual case: nothing is copied here, and little is called.
        counted, documents_before, bytes_before = self._counted
        if counted != begin:
            documents_before, bytes_before = run.before(begin)
        documents, bytes_ = run.before(end)
        self._counted = end, documents, bytes_
        self._used = end
        self.pending -= length
        epoch, unit, row, _, byte = position
        cursor = _make(Cursor, (epoch, unit, row, end, byte))
        documents -= documents_before
        bytes_ -= bytes_before
        parts = (self._part(position, length, documents, bytes_),) if self._several else ()
        fields = (self._lane, run.tokens[begin - 1 : end], length, bytes_, documents, (), cursor, 0, parts)
        return _make(PackedSequence, fields)

    def _part(self, position: Cursor, tokens: int, documents: int, text_bytes: int) -> Part:
        """Return what the source of the unit at a position contributes."""
        if self._sources[0] != position.epoch:
            self._sources = position.epoch, self._task.plan.lane_sources(position.epoch, self._lane)
        return Part(self._sources[1][position.unit], tokens, documents, text_bytes)

    def _wrong_data(self, cursor: Cursor) -> DataError:
        plan = self._task.plan
        name = plan.rings[plan.ring_of(self._lane)].name
        return DataError(
            f"{name}: lane {self._lane} cannot continue at {cursor}: the data or the tokenizer is not the one that the "
            "saved state was taken from; restore it, or start a new run"
        )

    def _join(self, length: int) -> PackedSequence:
        """Put a sequence together from the runs that it reaches into."""
        sequence = np.empty(self._length + 1, dtype=np.int32)
        sequence[0] = self._waiting[0][2].tokens[self._used - 1] if self._used else self._last_token
        sequence[length + 1 :] = self._encoder.eos_id
        filled, documents, text_bytes = 1, 0, 0
        bad_rows: tuple[BadRow, ...] = ()
        parts: list[Part] = []
        while filled <= length:
            position, next_position, run, skipped = self._waiting[0]
            begin = self._used
            if begin == 0:
                bad_rows += skipped
            end = min(len(run.tokens), begin + length + 1 - filled)
            sequence[filled : filled + end - begin] = run.tokens[begin:end]
            filled += end - begin
            more_documents, more_bytes = self._count(run, begin, end)
            documents += more_documents
            text_bytes += more_bytes
            if self._several:
                parts.append(self._part(position, end - begin, more_documents, more_bytes))
            if end == len(run.tokens):
                self._waiting.popleft()
                self._used = 0
                self._cursor = next_position
            else:
                self._used = end
                self._cursor = position._replace(token=end)
        self._last_token = int(sequence[length])
        self.pending -= length
        cursor = self._cursor
        return PackedSequence(self._lane, sequence, length, text_bytes, documents, bad_rows, cursor, parts=tuple(parts))

    def _count(self, run: TokenRun, begin: int, end: int) -> tuple[int, int]:
        """Return the documents and bytes of some tokens of the first waiting run."""
        counted = self._counted if begin and self._counted[0] == begin else (begin, *run.before(begin))
        self._counted = (end, *run.before(end))
        return self._counted[1] - counted[1], self._counted[2] - counted[2]
