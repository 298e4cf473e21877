"""Ranks that hang; importable by their processes."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
from pathlib import Path
from typing import Any

from pretrain.training.trainer import Trainer
from tests.counting.where import configured, train

STEP = 3
QUICK: dict[str, Any] = {
    "watch.hang_seconds": 1.5,
    "watch.slow_seconds": 60,
    "data.validation_fraction": 0.0,
    "train.micro_batch_sequences": 4,  # divides by up to three ranks
}


def _stop(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def _deadlock(folder: Path) -> None:
    lock = threading.Lock()
    with lock, lock:
        pass


def _hold_the_interpreter(folder: Path) -> None:
    ctypes.PyDLL(None).sleep(600)  # no other thread of Python runs meanwhile


def _read(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    (folder / "pipe").read_bytes()


KINDS = {"stop": _stop, "deadlock": _deadlock, "interpreter": _hold_the_interpreter, "read": _read}


def hang(root: str, kind: str, at_fault: int, changes: dict[str, Any]) -> int:
    """Train on this rank; the rank `at_fault` hangs in the forward pass of step `STEP`."""
    rank = int(os.environ.get("RANK", "0"))
    output = os.open(f"{root}/stderr-{rank}", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 2)
    compute = Trainer.loss_sum

    def loss_sum(self: Trainer, *arguments: Any) -> Any:
        if self.state.step + 1 == STEP and rank == at_fault:
            KINDS[kind](Path(root))
        return compute(self, *arguments)

    Trainer.loss_sum = loss_sum  # type: ignore[method-assign]
    return train(configured(root, QUICK | changes))
