"""The next batch is prepared behind the current training step."""

import queue
import threading
from dataclasses import dataclass

from pretrain.data.batch import BatchShare
from pretrain.data.position import StreamPosition
from pretrain.data.sources.retries import stopping
from pretrain.data.state import StreamState
from pretrain.data.stream import TokenStream
from pretrain.engine.ranks import Ranks

_COMPLETE_SECONDS, _FAIL_SECONDS = 3.0, 10.0


@dataclass(frozen=True)
class PreparedBatch:
    """A rank's share of a global batch."""

    share: BatchShare
    sha256: str
    """Hash of the global batch; see `BatchShare.sha256`."""
    position: StreamPosition
    """Of the stream after this batch."""


class Prefetcher:
    """Calls a stream in a thread of its own, one batch ahead of the training.

    The thread's collectives run beside those of the training step. So the stream needs a process group that nothing
    else uses, and every rank prepares the same batches in the same order.
    """

    def __init__(
        self, stream: TokenStream, num_sequences: int, batches: int, stream_ranks: Ranks, ranks: Ranks
    ) -> None:
        """Begin to prepare the first batch.

        Args:
            stream: at the position where training begins or continues; nothing else may use it from now on.
            num_sequences: rows of a global batch.
            batches: how many will be asked for at most; nothing is read for a batch after the last.
            stream_ranks: the ranks with the group of the stream.
            ranks: the ranks with another group, for the calls of `state`.

        """
        self._stream, self._num_sequences = stream, num_sequences
        self._left, self._ended, self._counting = batches, False, threading.Lock()
        self._stream_ranks, self._ranks = stream_ranks, ranks
        self.position = stream.position
        """After the batch that `next_batch` returned last, whatever has been prepared since."""
        self._returned: list[PreparedBatch] = []
        self._prepared: queue.Queue[PreparedBatch | BaseException] = queue.Queue()
        self._failure: BaseException | None = None
        self._wanted = threading.Semaphore(1)
        self._closed = False
        self._thread = self._start()

    def next_batch(self) -> PreparedBatch:
        """Return the next batch, waiting for it if necessary; then begin to prepare the one after it.

        Raises:
            Exception: see `TokenStream.next_batch`; raised again by every further call.

        """
        if self._failure is not None:
            raise self._failure
        if self._returned:
            batch = self._returned.pop()
            self.position = batch.position
            return batch
        prepared = self._prepared.get()
        if isinstance(prepared, BaseException):
            self._failure = prepared
            raise prepared
        self.position = prepared.position
        self._wanted.release()
        return prepared

    def put_back(self, batch: PreparedBatch, position: StreamPosition) -> None:
        """Let `next_batch` return a batch again, the last that it returned; `position` is that before the batch."""
        self._returned.append(batch)
        self.position = position

    def extend(self, batches: int) -> None:
        """Expect so many more calls of `next_batch`; all ranks must do so."""
        with self._counting:
            ended, self._ended = self._ended, False
            self._left += batches
        if ended:
            self._thread = self._start()

    def state(self) -> StreamState:
        """Return what a checkpoint holds of the position after the last returned batch; a collective call."""
        return self.position.state(self._ranks.group)

    def close(self) -> None:
        """End the thread and the stream. May be called twice; not a collective call."""
        self._closed = True
        self._failure = RuntimeError("the stream is closed")
        self._wanted.release()
        # A batch that all ranks are preparing is soon complete. Otherwise the thread waits for a worker or a server,
        # and fails when that is closed, or for a rank that is gone, and is left behind.
        with stopping():
            self._thread.join(_COMPLETE_SECONDS)
            self._stream.close()
            self._thread.join(_FAIL_SECONDS)
            self._stream.close()  # what the thread was just reading

    def _start(self) -> threading.Thread:
        # A daemon: a thread that waits for a rank which is gone must not keep the process alive.
        thread = threading.Thread(target=self._prepare, name="prefetch", daemon=True)
        thread.start()
        return thread

    def _prepare(self) -> None:
        while self._count_down():
            self._wanted.acquire()
            if self._closed:
                return
            try:
                share = self._stream.next_batch(self._num_sequences)
                self._prepared.put(PreparedBatch(share, share.sha256(self._stream_ranks), self._stream.position))
            except BaseException as error:
                self._prepared.put(error)
                return

    def _count_down(self) -> bool:
        """Count a batch that will be prepared; return whether there is one."""
        with self._counting:
            self._ended = self._left == 0
            self._left -= not self._ended
            return not self._ended
