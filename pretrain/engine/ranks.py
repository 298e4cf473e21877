"""What the processes of a run tell each other on the CPU: values, and errors.

This is the one mechanism by which an error on one rank reaches the others. A rank that fails outside of it leaves the
others waiting in their next collective until the launcher stops them.
"""

from __future__ import annotations

import atexit
import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pretrain.processes.errors import PeerError, UserError
from pretrain.processes.exit_codes import FAILED

T = TypeVar("T")

BEAT_SECONDS = 30.0
"""How often the other ranks hear from rank 0 during long work; must be far less than the timeout of a collective."""

_kept: list[dist.ProcessGroup] = []
"""See `keep_group`."""
atexit.register(_kept.clear)  # while gloo's threads can still take the GIL


def keep_group() -> None:
    """Keep the default process group's Python object until the process ends; call it before DDP's group is destroyed.

    A DistributedDataParallel that is freed after the group was destroyed must not be the last to hold it: it would wait
    for gloo's threads with the GIL held, and they for the GIL, which they need to release the tensors of the last
    collective (https://github.com/pytorch/pytorch/issues/56297). The group's Python object lets go of the GIL.
    """
    if (group := dist.group.WORLD) is not None:
        _kept.append(group)


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None
    """A process group for CPU objects; None on a single process."""

    def broadcast(self, value: Any) -> Any:
        """Rank 0's picklable value, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def gather(self, value: Any) -> list[Any]:
        """The picklable values of all ranks, by rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is set on any rank."""
        if self.world_size == 1:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.group)
        return [bool(flag) for flag in found.tolist()]

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on every rank; its picklable results by rank, on every rank.

        Raises:
            Exception: what `work` raised here.
            PeerError: it raised nothing here, but on another rank.
        """
        value, failure, raised = None, None, None
        try:
            value = work()
        except Exception as error:
            raised, failure = error, _describe(self.rank, error)
        outcomes = self.gather((value, failure))
        if raised is not None:
            raise raised
        failures = [failure for _, failure in outcomes if failure is not None]
        if failures:
            raise PeerError(*failures[0])
        return [value for value, _ in outcomes]

    def everywhere(self, work: Callable[[], T]) -> T:
        """Return what `work` returns here, which need not be picklable; an error on one rank is an error on all."""
        found: list[T] = []
        self.together(lambda: found.append(work()))
        return found[0]

    def on_rank_0(self, work: Callable[[], T], *, long: bool = False) -> T:
        """Do `work` on rank 0 alone; its picklable result, on every rank.

        Args:
            work: must not communicate.
            long: it may take longer than a collective waits for the other ranks.

        Raises:
            Exception: on rank 0, what `work` raised.
            PeerError: on the others, if it raised anything.
        """
        waited_for = long and self.world_size > 1
        values: list[T] = []

        def keep() -> None:
            if self.rank == 0:
                with self._beating() if waited_for else contextlib.nullcontext():
                    values.append(work())
            elif waited_for:
                self._await_rank_0()

        # Only errors are gathered: that would give every rank a copy of the value for each of the ranks.
        self.together(keep)
        value: T = self.broadcast(values[0] if values else None)
        return value

    @contextlib.contextmanager
    def _beating(self) -> Iterator[None]:
        """Take part in a collective every `BEAT_SECONDS`, so that the ranks in `_await_rank_0` do not give up."""
        ended = threading.Event()

        def beat() -> None:
            with contextlib.suppress(RuntimeError):  # another rank is gone: the next collective of this thread fails
                while not ended.wait(BEAT_SECONDS):
                    self._beat(0)

        def end() -> None:
            ended.set()
            thread.join()
            self._beat(1)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        except Exception:  # an interrupted process tells nobody
            end()
            raise
        end()

    def _await_rank_0(self) -> None:
        while not self._beat(0):
            pass

    def _beat(self, ended: int) -> bool:
        """Whether the work of rank 0 has ended; a collective."""
        flag = torch.tensor([ended])
        dist.all_reduce(flag, group=self.group)
        return bool(flag)


def _describe(rank: int, error: Exception) -> tuple[int, str, str, int]:
    """The arguments of the `PeerError` that the other ranks raise."""
    if isinstance(error, PeerError):
        return error.rank, error.host, error.text, error.exit_code
    code = error.exit_code if isinstance(error, UserError) else FAILED
    lines = str(error).splitlines() or [""]
    return rank, socket.gethostname(), f"{type(error).__name__}: {lines[0]}", code
