"""Runs that are killed at a chosen moment; importable, so that the fork server can load it.

A moment is the n-th event of a phase. Events are the calls of the trainer and every change of a file below the run's
root, including each block that is written to a checkpoint.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from pretrain.checkpoint import tensor_file
from pretrain.launch import building
from pretrain.processes.torchrun import free_port
from pretrain.training.trainer import Trainer
from tests.distributed.ranks import CONTEXT, TIMEOUT_SECONDS, _rank
from tests.distributed.scenarios import run

PHASES = ("start", "step", "save")
"""From the first look at the run folder to the first step; outside of a save after that; in the thread of a save."""
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree")


class Events:
    """Counts the events of each phase, and kills this process at one of them."""

    def __init__(self, root: str, phase: str | None, number: int) -> None:
        self.root, self.phase, self.number = root, phase, number
        self.seen: Counter[str] = Counter()
        self.training = False

    def event(self) -> None:
        saving = threading.current_thread().name == "checkpoint"
        phase = "save" if saving else "step" if self.training else "start"
        self.seen[phase] += 1
        if phase == self.phase and self.seen[phase] == self.number:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        changes = event in _CHANGES or (event == "open" and arguments[1] not in (None, "r", "rb"))
        if changes and self.root in str(arguments[0]):
            self.event()

    def before(self, function: Callable[..., Any], training: bool = False) -> Callable[..., Any]:
        """The function as an event."""

        def counted(*arguments: Any, **options: Any) -> Any:
            self.training |= training
            self.event()
            return function(*arguments, **options)

        return counted


def counted_run(root: str, changes: dict[str, Any], phase: str | None, number: int, rank: int) -> dict[str, int]:
    """Train; one rank kills itself at the moment. Returns the numbers of events, if it lives to the end."""
    mine = phase if int(os.environ.get("RANK", "0")) == rank else None
    events = Events(root, mine, number)
    sys.addaudithook(events.audit)
    patches = [
        mock.patch.object(tensor_file, "_blocks", _counted_blocks(events)),
        *(mock.patch.object(building, name, events.before(getattr(building, name))) for name in LOADS),
        *(mock.patch.object(Trainer, name, events.before(getattr(Trainer, name), True)) for name in CALLS),
    ]
    for patch in patches:
        patch.start()
    assert run(root, changes) == 0
    return dict(events.seen)


LOADS = ("build_model", "load_weights", "load_state", "restore_generators", "TrainState")
CALLS = ("set_learning_rates", "forward_backward", "measure", "report")


def _counted_blocks(events: Events) -> Callable[..., Any]:
    blocks = tensor_file._blocks

    def counted(*arguments: Any) -> Any:
        for block in blocks(*arguments):
            events.event()
            yield block[: len(block) // 2]  # the next event finds half of it in the file
            yield block[len(block) // 2 :]

    return counted


def attempt(
    world_size: int, root: Path, changes: dict[str, Any], phase: str | None = None, number: int = 0, rank: int = 0
) -> dict[str, int] | None:
    """Start the run once; the numbers of events of rank 0 if it ends, None if it was killed.

    As a launcher does, this kills the other ranks once one of them has died.
    """
    port, results = free_port(), CONTEXT.SimpleQueue()
    arguments = (world_size, port, _Sink(results), counted_run, (str(root), changes, phase, number, rank))
    processes = [CONTEXT.Process(target=_rank, args=(index, *arguments)) for index in range(world_size)]
    for process in processes:
        process.start()
    victim = processes[rank]
    victim.join(TIMEOUT_SECONDS)
    killed = victim.exitcode == -signal.SIGKILL
    for process in processes:
        if not killed:
            process.join(TIMEOUT_SECONDS)
        process.kill()
        process.join()
    if killed:
        return None
    found = {}
    while not results.empty():
        index, value, error = results.get()
        assert error is None, f"rank {index}:\n{error}"
        found[index] = value
    assert len(found) == world_size, f"{phase} {number} of rank {rank}: {[p.exitcode for p in processes]}"
    return found[0]


class _Sink:
    """The queue that `_rank` puts its result into: one without a thread, which a kill could leave locked."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def put(self, item: Any) -> None:
        self.queue.put(item)
