"""Readers that run in a process of their own.

A worker is started as a plain program that gets its task on standard input and writes items to standard output. Unlike
a forked process, it inherits no locks or threads of the trainer; unlike a spawned one, it does not import the trainer's
main module again. The pipe also ends orphans: when the trainer is gone, for whatever reason, writing fails and the
worker ends; when the worker is gone, reading fails and the trainer reports it.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import islice
from typing import IO, Protocol

from pretrain.data.errors import DataError
from pretrain.data.packing import Item, ReaderTask, read_items
from pretrain.data.sources.retries import patience, set_patience

# Items are sent in blocks; a worker prepares at most this many blocks ahead of the trainer.
_BLOCK_ITEMS = 32
_BLOCKS_AHEAD = 16

Block = list[Item] | DataError


class Reader(Protocol):
    """A source of items of some lanes, in the order of the ring."""

    def pull(self) -> Item:
        """Return the next item; raises the errors of `read_items`."""

    def close(self) -> None:
        """Stop reading. May be called twice."""


class InlineReader:
    """Reads in this process, when an item is requested."""

    def __init__(self, task: ReaderTask) -> None:
        self._items = read_items(task)

    def pull(self) -> Item:
        """Return the next item; raises the errors of `read_items`."""
        return next(self._items)

    def close(self) -> None:
        """Close the open files."""
        self._items = iter(())


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
        with self._process.stdin as pipe:
            pickle.dump((task, patience()), pipe)
        self._pipe = self._process.stdout
        self._block: Iterator[Item] = iter(())

    def pull(self) -> Item:
        """Return the next item, waiting for it if necessary.

        Raises:
            DataError: raised by the worker.
            RuntimeError: the worker died.

        """
        for item in self._block:
            return item
        try:
            block: Block = pickle.load(self._pipe)
        except (EOFError, pickle.UnpicklingError) as error:
            code = self._process.wait()
            cause = f"signal {-code}, possibly out of memory" if code < 0 else f"exit code {code}, see its output above"
            raise RuntimeError(f"a data worker (process {self._process.pid}) ended unexpectedly: {cause}") from error
        if isinstance(block, DataError):
            raise block
        self._block = iter(block)
        return next(self._block)

    def close(self) -> None:
        """End the worker. It only reads, so nothing is lost."""
        self._process.kill()
        self._process.wait()
        self._pipe.close()


def main() -> None:
    """Run a worker: read the task from standard input, write blocks of items to standard output."""
    # A scheduler signals every process of a job, but the trainer decides when to stop.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    task: ReaderTask
    task, limits = pickle.load(sys.stdin.buffer)
    set_patience(limits)
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # output of libraries must not end up among the items
    blocks: queue.Queue[Block | None] = queue.Queue(_BLOCKS_AHEAD)
    sender = threading.Thread(target=_send, args=(blocks, pipe))
    sender.start()
    try:
        items = read_items(task)
        while block := list(islice(items, _BLOCK_ITEMS)):
            blocks.put(block)
    except DataError as error:
        blocks.put(error)
    finally:
        blocks.put(None)
    sender.join()


def _send(blocks: "queue.Queue[Block | None]", pipe: IO[bytes]) -> None:
    try:
        with pipe:
            while (block := blocks.get()) is not None:
                pickle.dump(block, pipe, protocol=pickle.HIGHEST_PROTOCOL)
                pipe.flush()
    except BrokenPipeError:
        os._exit(1)  # the trainer is gone
