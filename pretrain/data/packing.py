"""From the documents of lanes to packed sequences.

A lane's tokens are one line without gaps: a separator, then each document followed by a separator, epoch after
epoch. Sequence k of the lane is the window of T+1 tokens that begins at token kT. Its first token is the last of the
sequence before it, so every token but the very first is a target exactly once:

    tokens     | a a a | b | c c c c |        (| = separator, T = 4)
    sequence 0 [| a a a |]
    sequence 1         [| b | c c]
    sequence 2               [c c c | ...     waits for the next epoch, or is padded when there is none
"""

import heapq
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.config.data import TokenizerConfig
from pretrain.data.documents import Cursor, Document, lane_documents
from pretrain.data.errors import DataError
from pretrain.data.order import ReadPlan
from pretrain.data.tokenizer import DocumentEncoder, Tokens

# Text that is tokenized in one call, taken from whichever lanes have the fewest tokens: enough to keep all threads
# of the tokenizer busy, little enough that the first batch does not wait for it.
REFILL_BYTES = 1 << 20
# Text that all lanes of a reader together, and one lane, hold decoded but not yet tokenized. A document is never
# divided, so a lane with larger ones holds one of them.
READ_AHEAD_BYTES = 64 << 20
LANE_READ_AHEAD_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """One training sequence and the place where its lane goes on."""

    lane: int
    tokens: Tokens
    """int32 [T+1]."""
    length: int
    """Valid targets, `tokens[1 : 1 + length]`; T but in the last sequence of a lane."""
    text_bytes: int
    """UTF-8 bytes of the text whose tokens are targets here. A document's bytes are shared out evenly over its
    tokens, in whole numbers that add up to its size."""
    cursor: Cursor
    """The first token that is not yet a target."""


@dataclass(frozen=True, slots=True)
class EpochEnd:
    """A lane leaves the ring: what it still holds of this epoch fills no sequence."""

    lane: int
    documents: int
    """How many documents it read for this epoch."""


Item = PackedSequence | EpochEnd


@dataclass(frozen=True)
class ReaderTask:
    """What one reader (a worker, or the training process itself) has to do. Can be pickled."""

    plan: ReadPlan
    tokenizer: TokenizerConfig
    context_length: int
    cursors: dict[int, Cursor]
    """The reader's lanes and where each goes on."""
    epoch: int
    ring: tuple[int, ...]
    """Those of its lanes that are still in the ring of this epoch, beginning with the next one."""


def read_items(task: ReaderTask) -> Iterator[Item]:
    """Yield the sequences of a reader's lanes in the order of the ring, until the last epoch ends.

    Lanes take turns. One whose remaining tokens of the epoch fill no sequence yields its `EpochEnd` instead and
    leaves; when all have left, the next epoch begins with all of them, in order.

    Raises:
        DataError: see `read_unit` and `load_tokenizer`; or the data is not what the cursors were taken from.

    """
    encoder = DocumentEncoder.load(task.tokenizer)
    lanes = {lane: _Lane(task, lane, encoder.eos_id) for lane in sorted(task.cursors)}
    ring = deque(lanes[lane] for lane in task.ring)
    epoch, epochs = task.epoch, task.plan.epochs
    while epochs is None or epoch < epochs:
        for lane in ring:
            lane.open(epoch)
        while ring:
            lane = ring.popleft()
            while lane.lacks_tokens:
                _refill([lane, *ring], encoder)
            item = lane.pack(pad=epoch + 1 == epochs)
            if isinstance(item, PackedSequence):
                ring.append(lane)
            yield item
        epoch += 1
        ring.extend(lanes.values())


def _refill(lanes: "Sequence[_Lane]", encoder: DocumentEncoder) -> None:
    """Tokenize about `REFILL_BYTES` of text in one call, one document after the other to the emptiest lane."""
    queue = [(lane.pending, index) for index, lane in enumerate(lanes) if not lane.exhausted]
    heapq.heapify(queue)
    batch: list[tuple[_Lane, Document]] = []
    size = 0
    while queue and size < REFILL_BYTES:
        pending, index = queue[0]
        document = lanes[index].next_document()
        if document is None:
            heapq.heappop(queue)
            continue
        batch.append((lanes[index], document))
        size += document.text_bytes
        heapq.heapreplace(queue, (pending + document.text_bytes // 4 + 1, index))  # about four bytes a token
    for (lane, document), tokens in zip(batch, encoder.encode([d.text for _, d in batch]), strict=True):
        lane.push(document, tokens)


class _Lane:
    """The tokens of a lane that are read but not packed."""

    def __init__(self, task: ReaderTask, lane: int, eos_id: int) -> None:
        self._task = task
        self._lane = lane
        self._eos_id = eos_id
        self._batch_bytes = min(LANE_READ_AHEAD_BYTES, READ_AHEAD_BYTES // len(task.cursors))
        self._cursor = self._read_from = task.cursors[lane]
        self._waiting: deque[tuple[Document, Tokens]] = deque()
        self._used = self._cursor.token  # tokens of the first waiting document that are packed already
        # A separator stands before every document and before the lane; `push` corrects this within a document.
        self._last_token = eos_id
        self._documents: Iterator[Document] = iter(())
        self._documents_read = 0
        self.pending = 0
        """Tokens that wait to be packed."""
        self.exhausted = True
        """Whether no document is left to read in this epoch."""

    def open(self, epoch: int) -> None:
        """Begin to read, up to the end of an epoch. What is left from the one before stays in front.

        After a resume, what is left is not there: reading then begins at the cursor, in whichever epoch that is.
        """
        self._documents = lane_documents(self._task.plan, self._lane, self._read_from, epoch, self._batch_bytes)
        self._documents_read = 0
        self._read_from = Cursor(epoch + 1, 0, 0, 0)
        self.exhausted = False

    @property
    def lacks_tokens(self) -> bool:
        """Whether more must be read before it is known what comes next."""
        return self.pending < self._task.context_length and not self.exhausted

    def next_document(self) -> Document | None:
        """Take the next document of the epoch, to be given back through `push` with its tokens."""
        document = next(self._documents, None)
        self.exhausted = document is None
        return document

    def push(self, document: Document, tokens: Tokens) -> None:
        """Append a document. A lone separator, of a text without tokens, is left out."""
        if len(tokens) == 1:
            return
        if self._used and not self._waiting:  # after a resume: the cursor stands within this document
            if document.place != self._cursor._replace(token=0) or self._used >= len(tokens):
                raise DataError(
                    f"lane {self._lane} cannot go on at {self._cursor}: the data or the tokenizer is not the one "
                    "that the saved state was taken from; restore it, or start a new run"
                )
            self._last_token = int(tokens[self._used - 1])
            self.pending -= self._used
        self._waiting.append((document, tokens))
        self._documents_read += 1
        self.pending += len(tokens)

    def pack(self, *, pad: bool) -> Item:
        """Return the next sequence, a shorter one at the very end if `pad`, or the end of the lane's epoch."""
        length = min(self.pending, self._task.context_length)
        if length == self._task.context_length or (pad and length):
            return self._take(length)
        return EpochEnd(self._lane, self._documents_read)

    def _take(self, length: int) -> PackedSequence:
        sequence = np.full(self._task.context_length + 1, self._eos_id, dtype=np.int32)
        sequence[0] = self._last_token
        filled, text_bytes = 1, 0
        while filled <= length:
            document, tokens = self._waiting[0]
            begin = self._used
            end = min(len(tokens), begin + length + 1 - filled)
            sequence[filled : filled + end - begin] = tokens[begin:end]
            filled += end - begin
            text_bytes += document.text_bytes * end // len(tokens) - document.text_bytes * begin // len(tokens)
            if end == len(tokens):
                self._waiting.popleft()
                self._used = 0
                self._cursor = document.place._replace(row=document.place.row + 1)
            else:
                self._used = end
                self._cursor = document.place._replace(token=end)
        self.pending -= length
        self._last_token = int(sequence[length])
        return PackedSequence(self._lane, sequence, length, text_bytes, self._cursor)
