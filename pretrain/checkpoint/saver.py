"""Save while training continues, and keep training after disk errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from pretrain.checkpoint.format import Fragment
from pretrain.checkpoint.host_copy import HostCopy
from pretrain.checkpoint.writer import Snapshot, named, save_checkpoint
from pretrain.config.checkpoint import CheckpointConfig
from pretrain.engine.ranks import Ranks
from pretrain.processes.errors import PeerError


class Saver:
    """Saves the checkpoints of a run.

    An asynchronous save copies the state into host memory and writes it in a thread while training continues. At most
    one is in flight: a save that falls due meanwhile waits for it, and so do the end of training and a stop, by
    `settle`.

    A save that fails because of the disk leaves the earlier checkpoints as they are, and the run continues with a
    warning. It ends after `max_failed_saves` such saves in a row, or if the last state that it wanted to keep could
    not be saved. Any other error ends it.

    All methods are collectives. The ranks agree in the thread, whose collectives run beside those of training.

    Args:
        root: the folder of the checkpoints.
        settings: the config section.
        ranks: with a group of their own if saves are asynchronous.
        newest: the checkpoint that the run started from, if any.
        prepare: called on rank 0 before anything is written; may raise an OSError, by which the save fails.
        finish: called on rank 0 with the folder of a complete checkpoint. An OSError is a warning: the checkpoint is
            saved, and the next save tries again what it could not do, such as to delete older ones.
        say: prints a line.
        warn: prints a warning.
    """

    def __init__(
        self,
        root: Path,
        settings: CheckpointConfig,
        ranks: Ranks,
        *,
        newest: Path | None = None,
        prepare: Callable[[], None] = lambda: None,
        finish: Callable[[Path, Snapshot], None] = lambda folder, snapshot: None,
        say: Callable[[str], None] = lambda line: None,
        warn: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.root, self.settings, self.ranks = root, settings, ranks
        self._prepare, self._finish, self._say, self._warn = prepare, finish, say, warn
        self._copy = HostCopy()
        self._thread: threading.Thread | None = None
        self._fatal: BaseException | None = None
        self._failure: OSError | PeerError | None = None
        """That of the last save, if the disk was the reason."""
        self.failed = 0
        """Saves that have failed."""
        self.failed_in_a_row = 0
        """Saves that have failed since the last one that did not."""
        self.seconds = 0.0
        """What the longest save has taken, with the part that training did not wait for."""
        self.newest = newest
        """The newest complete checkpoint of this run."""

    def save(
        self, snapshot: Snapshot, fragments: Iterable[Fragment], generators: dict[str, Tensor], ranks: Ranks
    ) -> None:
        """Save a checkpoint, or begin to.

        Args:
            snapshot: what it holds besides tensors; nothing of it may change later.
            fragments: this rank's part of the tensors, which may change as soon as this returns.
            generators: copies of the states of this rank's random generators.
            ranks: the ranks with the group of the calling thread.

        Raises:
            OSError: `max_failed_saves` saves in a row have failed on this rank.
            PeerError: they have on another rank.
            Exception: what else ended the save before this one, or this one if saves are synchronous.
        """
        self.wait()
        if not self.settings.asynchronous:
            self._write(snapshot, fragments, generators)
            self.wait()
            return
        copies = ranks.everywhere(lambda: self._copy.take(fragments))
        # A daemon: a thread that waits for a rank which is gone must not keep the process alive.
        self._thread = threading.Thread(
            target=self._write, args=(snapshot, copies, generators), name="checkpoint", daemon=True
        )
        self._thread.start()

    def settle(self) -> None:
        """Wait for the save in flight.

        Raises:
            OSError: the last save has failed on this rank, so the run must not end as if its state were saved.
            PeerError: it has on another rank.
            Exception: what else ended the last save.
        """
        self.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def in_flight(self) -> bool:
        """Whether a save is being written at the moment."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Wait for the save in flight; raises what must end the run, as `save` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._fatal is not None:
            raise self._fatal
        most = self.settings.max_failed_saves
        if self._failure is not None and most is not None and self.failed_in_a_row >= most:
            raise self._failure

    def _write(self, snapshot: Snapshot, fragments: Iterable[Fragment], generators: dict[str, Tensor]) -> None:
        begun = time.monotonic()
        try:
            self._failure = self._attempt(snapshot, fragments, generators)
            self.seconds = max(self.seconds, time.monotonic() - begun)
        except BaseException as error:
            self._fatal = error

    def _attempt(
        self, snapshot: Snapshot, fragments: Iterable[Fragment], generators: dict[str, Tensor]
    ) -> OSError | PeerError | None:
        """Write a checkpoint; return an error of the disk, on this rank or another, and raise any other one."""

        def prepare() -> None:
            with named(snapshot.step):
                self._prepare()

        def finish() -> None:
            try:
                self._finish(folder, snapshot)
            except OSError as error:
                self._warn(f"{folder} is saved, but the work after the save failed: {error}; the next save tries again")

        try:
            self.ranks.on_rank_0(prepare)
            self.newest = folder = save_checkpoint(self.root, snapshot, fragments, generators, self.ranks)
            self.ranks.on_rank_0(finish)
        except Exception as error:
            of_disk = isinstance(error, (OSError, PeerError))
            if not all(self.ranks.gather(of_disk)) or not isinstance(error, (OSError, PeerError)):
                raise
            self.failed += 1
            self.failed_in_a_row += 1
            self._warn(self._describe(error))
            return error
        self.failed_in_a_row = 0
        self._say(f"saved {folder}")
        return None

    def _describe(self, error: Exception) -> str:
        times = f" ({self.failed_in_a_row} saves in a row have failed)" if self.failed_in_a_row > 1 else ""
        return f"{error}{times}; the newest checkpoint is {self.newest.name if self.newest else 'none'}"
