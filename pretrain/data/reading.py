"""From the files of lanes to their sequences: documents are read, tokenized and given to the lanes that pack them."""

import heapq
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import cache
from typing import NamedTuple

from pretrain.data.documents import Document, Tokenized
from pretrain.data.packing import Item, Lane, PackedSequence, ReaderTask
from pretrain.data.prepared.runs import TokenRun
from pretrain.data.tokenizer import DocumentEncoder, Tokens, encodes_in_parallel

# Text that is tokenized in one call, taken from the lanes that have the fewest tokens: enough to keep all threads of
# the tokenizer busy, and little enough that the first batch does not wait for it.
REFILL_BYTES = 1 << 20


def read_rings(task: ReaderTask, encoder: DocumentEncoder | None = None) -> dict[int, Generator[Item]]:
    """Return the items of each ring, which are read only when they are requested; see `read_items`.

    The rings do not depend on one another: the mixture decides which of them gives the next sequence.

    Args:
        task: what to read.
        encoder: that of the task; loaded with the first item if there is none.

    """
    load = cache(lambda: encoder or DocumentEncoder.load(task.tokenizer))
    return {index: read_items(task, index, load) for index in task.rings}


def read_items(task: ReaderTask, index: int, load_encoder: Callable[[], DocumentEncoder]) -> Generator[Item]:
    """Yield the sequences of a reader's lanes of one ring, in the order of the ring, until its last epoch ends.

    Lanes take turns. A lane whose remaining tokens of the epoch do not fill a sequence yields its `EpochEnd` instead
    and leaves. When all have left, the next epoch begins with all lanes, in order.

    Raises:
        DataError: see `read_unit`, `load_tokenizer` and `DocumentEncoder.encode`; or the cursors were taken from
            different data.

    """
    encoder, own = load_encoder(), task.rings[index]
    lanes = {lane: task.lane_class(task, lane, own.cursors[lane], encoder) for lane in sorted(own.cursors)}
    ring = deque(lanes[lane] for lane in own.ring)
    epoch, epochs = own.epoch, task.plan.rings[index].epochs
    # Threads of the tokenizer that are done with the texts of one call find work in the other.
    calls = 2 if encodes_in_parallel() else 1
    threads = ThreadPoolExecutor(calls, "tokenizer")
    try:
        source = _DocumentSource(encoder, threads, calls)
        while epochs is None or epoch < epochs:
            for lane in ring:
                lane.open(epoch)
            last = epoch + 1 == epochs
            while ring:
                lane = ring.popleft()
                while (item := lane.pack(pad=last)) is None:
                    source.refill([lane, *ring])
                if isinstance(item, PackedSequence):
                    ring.append(lane)
                yield item
            epoch += 1
            ring.extend(lanes.values())
    finally:
        # Without waiting: the collector may end this generator inside another thread that is just starting, and joining
        # a thread there takes a lock that the starting one holds.
        threads.shutdown(wait=False, cancel_futures=True)


class _Read(NamedTuple):
    """Documents that have been read together."""

    documents: list[tuple[Lane, Document | Tokenized, int]]
    """Each with its lane, and the tokens that were expected of it."""
    tokens: Future[list[Tokens]] | None
    """Those of the documents that are text; None if none is."""


class _DocumentSource:
    """Reads and tokenizes the documents of lanes, some calls of the tokenizer ahead.

    While the tokenizer, which needs no Python, works on some documents, the next ones are read and earlier ones packed.
    """

    def __init__(self, encoder: DocumentEncoder, threads: Executor, ahead: int) -> None:
        self._encoder, self._threads, self._ahead = encoder, threads, ahead
        self._read: deque[_Read] = deque()
        self._failure: Exception | None = None
        self._read_ahead = False

    def refill(self, lanes: Sequence[Lane]) -> None:
        """Push the tokens of about `REFILL_BYTES` of text; each document goes to the lane with the fewest tokens.

        What is tokenized already only takes its turn.
        """
        if not self._read:
            if self._failure is not None:
                raise self._failure
            self._read.append(self._read_documents(lanes))
        # The first sequences after a start do not wait for more than they need.
        while self._read_ahead and len(self._read) <= self._ahead and self._read[0].tokens and self._failure is None:
            self._read.append(self._read_documents(lanes))
        self._read_ahead = True
        self._push(self._read.popleft())

    def _read_documents(self, lanes: Sequence[Lane]) -> _Read:
        """Read about `REFILL_BYTES` and let a thread tokenize them.

        An error of reading is raised when the documents before it have been used.
        """
        queue = [(lane.pending + lane.expected, index) for index, lane in enumerate(lanes) if not lane.read_out]
        heapq.heapify(queue)
        found: list[tuple[Lane, Document | Tokenized, int]] = []
        size = 0
        try:
            while queue and size < REFILL_BYTES:
                tokens, index = queue[0]
                lane = lanes[index]
                document = lane.next_document()
                if document is None:
                    heapq.heappop(queue)
                    continue
                # About four bytes per token.
                length = len(document.run.tokens) if isinstance(document, Tokenized) else document.text_bytes // 4 + 1
                found.append((lane, document, length))
                lane.expected += length
                size += 4 * length
                heapq.heapreplace(queue, (tokens + length, index))
        except Exception as error:
            self._failure = error
        texts = [document.text for _, document, _ in found if isinstance(document, Document)]
        return _Read(found, self._threads.submit(self._encoder.encode, texts) if texts else None)

    def _push(self, read: _Read) -> None:
        """Give the documents to their lanes, when they are tokenized."""
        texts = iter(read.tokens.result() if read.tokens else ())
        for lane, document, expected in read.documents:
            lane.expected -= expected
            if isinstance(document, Tokenized):
                lane.push(*document)
                continue
            tokens = next(texts)
            if len(tokens) > 1:
                run = TokenRun.of_document(tokens, document.text_bytes)
                lane.push(document.position, document.end, run, document.skipped)
            else:  # a text without tokens, of which only the separator remains, is left out
                lane.skip(document.skipped)
