"""Readers that run in a process of their own.

A worker is started as a plain program that gets its task on standard input and writes items to standard output. Unlike
a forked process, it inherits no locks or threads of the trainer; unlike a spawned one, it does not import the trainer's
main module again. The pipes also end orphans: when the trainer is gone, for whatever reason, standard input ends and
so does the worker; when the worker is gone, reading fails and the trainer reports it.

Only the trainer knows which ring gives the next sequence, so a worker cannot put the items of several rings into the
right order. Instead the trainer requests blocks of items of a ring, some blocks ahead of their use, and requests
another one whenever it begins a block. Of the rings with open requests, a worker reads the one of which it has sent the
fewest blocks that are not in use yet. It can never be stuck with items that nobody wants while the trainer waits for
others, whatever the mixture; a ring that the mixture does not use is not read; and what is read ahead is bounded.
"""

import contextlib
import os
import pickle
import queue
import select
import signal
import struct
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from typing import IO, Protocol

from pretrain.data.errors import DataError
from pretrain.data.packing import Item, ReaderTask
from pretrain.data.reading import read_rings
from pretrain.data.sources.retries import patience, set_patience, stop_requested, stopping
from pretrain.data.tokenizer import DocumentEncoder
from pretrain.processes.signals import ASKING

# Items are sent in blocks. A worker prepares at most this many blocks ahead of the trainer: in all rings together, but
# two of every ring that is read.
_BLOCK_ITEMS = 32
_BLOCKS_AHEAD = 16

_REQUEST = struct.Struct("<I")  # the index of a ring, or
_STOP = 0xFFFFFFFF  # a stop is requested: do not wait for servers any longer
_SIZE = struct.Struct("<Q")  # bytes of the task or the block that follows
_LOOK_MILLISECONDS = 100  # how often a wait for a worker looks whether a stop is requested

Block = tuple[int, list[Item] | DataError]
"""The index of a ring, and its next items or the error that comes instead of them."""


class Reader(Protocol):
    """A source of items of some lanes, for each ring in its order."""

    def items(self, ring: int) -> Iterator[Item]:
        """Yield the items of a ring; raises the errors of `read_items`. Each ring is asked for once."""

    def close(self) -> None:
        """Stop reading. May be called twice."""


class InlineReader:
    """Reads in this process, when an item is requested."""

    def __init__(self, task: ReaderTask, encoder: DocumentEncoder | None = None) -> None:
        self._items = read_rings(task, encoder)

    def items(self, ring: int) -> Iterator[Item]:
        """Yield the items of a ring; raises the errors of `read_items`."""
        return self._items[ring]

    def close(self) -> None:
        """Close the open files and end the threads of the tokenizer, unless another thread is just reading."""
        for items in self._items.values():
            with contextlib.suppress(ValueError):  # another thread is executing it
                items.close()


class WorkerReader:
    """Reads ahead in a worker process."""

    def __init__(self, task: ReaderTask) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from pretrain.data.workers import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # The workers share the cores among themselves: each tokenizes in one thread.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TOKENIZERS_PARALLELISM": "false"},
        )
        assert self._process.stdin
        assert self._process.stdout
        self._requests, self._pipe = self._process.stdin, self._process.stdout
        pickled = pickle.dumps((task, patience()))
        self._requests.write(_SIZE.pack(len(pickled)) + pickled)
        self._requests.flush()
        self._ahead = max(2, _BLOCKS_AHEAD // len(task.rings))
        self._blocks: dict[int, deque[list[Item] | DataError]] = {ring: deque() for ring in task.rings}
        self._used: set[int] = set()
        """The rings of which blocks have been requested."""
        self._told_to_stop = False
        for ring in task.plan.used_rings(task.rings):
            self._request(ring, self._ahead)

    def items(self, ring: int) -> Iterator[Item]:
        """Yield the items of a ring, waiting for them if necessary.

        Raises:
            DataError: raised by the worker.
            RuntimeError: the worker died.

        """
        if ring not in self._used:
            self._request(ring, self._ahead)
        while True:
            while not self._blocks[ring]:
                other, received = self._receive()
                self._blocks[other].append(received)
            block = self._blocks[ring].popleft()
            if isinstance(block, DataError):
                raise block
            self._request(ring, 1)
            yield from block

    def close(self) -> None:
        """End the worker. It only reads, so nothing is lost."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()
        self._requests.close()

    def _request(self, ring: int, blocks: int) -> None:
        """Ask for further blocks of a ring. A worker that has died is noticed when it is to be read from."""
        self._used.add(ring)
        self._send(_REQUEST.pack(ring) * blocks)

    def _send(self, requests: bytes) -> None:
        with contextlib.suppress(BrokenPipeError):
            # Not through the buffer of the file, which would keep what cannot be written.
            os.write(self._requests.fileno(), requests)

    def _receive(self) -> Block:
        try:
            [size] = _SIZE.unpack(self._read(_SIZE.size))
            block: Block = pickle.loads(self._read(size))
        except EOFError as error:
            code = self._process.wait()
            cause = f"signal {-code}, possibly out of memory" if code < 0 else f"exit code {code}, see its output above"
            raise RuntimeError(f"a data worker (process {self._process.pid}) ended unexpectedly: {cause}") from error
        return block

    def _read(self, size: int) -> bytearray:
        """Read from the worker, which is told if a stop is requested meanwhile: it may be waiting for a server."""
        readable = select.poll()
        readable.register(self._pipe, select.POLLIN)
        found = bytearray()
        while len(found) < size:
            while not readable.poll(_LOOK_MILLISECONDS):
                if not self._told_to_stop and stop_requested():
                    self._told_to_stop = True
                    self._send(_REQUEST.pack(_STOP))
            received = os.read(self._pipe.fileno(), min(size - len(found), 1 << 20))
            if not received:
                raise EOFError
            found += received
        return found


def main() -> None:
    """Run a worker: read task and requests from standard input, write blocks of items to standard output."""
    # A scheduler signals every process of a job, but the trainer decides when to stop.
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)
    task: ReaderTask
    [size] = _SIZE.unpack(_read(_SIZE.size))
    task, limits = pickle.loads(_read(size))
    set_patience(limits)
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output of libraries must not end up among the items
    requests: queue.Queue[int] = queue.Queue()
    blocks: queue.Queue[Block | None] = queue.Queue()  # bounded by the requests
    stop = threading.Event()
    threading.Thread(target=_listen, args=(requests, stop), daemon=True).start()
    sender = threading.Thread(target=_send, args=(blocks, pipe))
    sender.start()
    try:
        with stopping(stop.is_set):
            _serve(task, requests, blocks)
    finally:
        blocks.put(None)
    sender.join()


def _serve(task: ReaderTask, requests: "queue.Queue[int]", blocks: "queue.Queue[Block | None]") -> None:
    """Read what is requested until every ring has ended or failed."""
    items = read_rings(task)
    wanted: Counter[int] = Counter()
    while items:
        while not wanted or not requests.empty():
            if (ring := requests.get()) in items:
                wanted[ring] += 1
        # The trainer keeps as many requests open for each ring: where most are unanswered, it has the least in hand.
        ring = max(wanted, key=lambda ring: (wanted[ring], -ring))
        found, error = _next_items(items[ring])
        if found:
            blocks.put((ring, found))
        if error:
            blocks.put((ring, error))
        wanted -= Counter({ring: 1})
        if error or len(found) < _BLOCK_ITEMS:
            del items[ring], wanted[ring]


def _next_items(items: Iterator[Item]) -> tuple[list[Item], DataError | None]:
    """Return the items of the next block, fewer at the end of the ring, and the error that ends it, if any."""
    found: list[Item] = []
    try:
        for item in items:
            found.append(item)
            if len(found) == _BLOCK_ITEMS:
                break
    except DataError as error:
        return found, error
    return found, None


def _listen(requests: "queue.Queue[int]", stop: threading.Event) -> None:
    while True:
        [ring] = _REQUEST.unpack(_read(_REQUEST.size))
        if ring == _STOP:
            stop.set()
        else:
            requests.put(ring)


def _read(size: int) -> bytes:
    """Read from the trainer. Not through `sys.stdin`, which a waiting thread would keep locked when Python ends."""
    found = b""
    while len(found) < size:
        received = os.read(0, size - len(found))
        if not received:
            os._exit(1)  # the trainer is gone
        found += received
    return found


def _send(blocks: "queue.Queue[Block | None]", pipe: IO[bytes]) -> None:
    try:
        with pipe:
            while (block := blocks.get()) is not None:
                pickled = pickle.dumps(block, protocol=pickle.HIGHEST_PROTOCOL)
                pipe.write(_SIZE.pack(len(pickled)))
                pipe.write(pickled)
                pipe.flush()
    except BrokenPipeError:
        os._exit(1)  # the trainer is gone
