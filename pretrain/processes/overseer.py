"""What a launcher does for its processes besides starting them: it passes requests to stop on, and ends frozen ones.

torchrun answers a signal by sending it on, waiting, and ending with an error. Here the first signal asks the processes
for a checkpoint, and torchrun keeps waiting for them, so that their own exit codes decide.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from pretrain.processes.exit_codes import STOPPED
from pretrain.processes.exit_timer import arrived, signal_pipe
from pretrain.processes.failures import PID_FILE
from pretrain.processes.signals import ASKING, NOTICE, PASSED_ON, SignalCount, handled, say

LOOK_SECONDS = 0.2
"""How often the processes are looked at while they are asked to stop; otherwise every second."""
FROZEN_LOOKS = 60
"""How many looks in a row, a second apart, find a process stopped (as by SIGSTOP) before it is ended. Looks and not
seconds: a scheduler may suspend a whole job, this launcher included."""
LEAVE_SECONDS = 5.0
"""How long torchrun may take to end after a signal where there is no process to wait for."""


class LaunchStoppedError(BaseException):
    """Raised in the main thread by a signal, so that torchrun ends its processes and then itself.

    Args:
        number: the signal.
        exit_code: of this launcher.
    """

    def __init__(self, number: signal.Signals, exit_code: int) -> None:
        super().__init__(number.name)
        self.exit_code = exit_code


class Overseer:
    """Watches the processes of one launch from a thread."""

    def __init__(self) -> None:
        self.attempt: Callable[[], Path | None] = lambda: None
        """Returns the folder in which the processes of the present attempt leave their files, once there is one."""
        self.working = False
        """Whether signals are handled here."""
        self.signals: list[signal.Signals] = []
        """The signals that this launcher has received, as its thread sees them, without repetitions."""
        self.handled = SignalCount()
        """Those that the main thread has seen."""
        self.ended: set[int] = set()
        """The processes that the overseer has ended."""
        self.frozen: int | None = None
        """The first process that it has ended because it was frozen."""
        self._asked: set[int] = set()
        self._looks: dict[int, int] = {}

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Handle this process's signals, and watch its children from a thread."""
        ended = threading.Event()
        with signal_pipe() as (pipe, wake_up), handled(ASKING, self._handle):
            thread = threading.Thread(target=self._watch, args=(pipe, ended), name="overseer", daemon=True)
            thread.start()
            self.working = True
            try:
                yield
            finally:
                self.working = False
                ended.set()
                os.write(wake_up, b"\0")
                thread.join()

    def processes(self) -> set[int]:
        """The running children that can be asked to stop."""
        folder = self.attempt()
        found = set()
        for file in folder.glob(f"*/{PID_FILE}") if folder else ():
            with contextlib.suppress(OSError, ValueError):
                pid = int(file.read_text())
                if _state_and_parent(pid)[1] == os.getpid():
                    found.add(pid)
        return found

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, which runs torchrun."""
        if not self.handled.add(number):
            return
        if self.handled.count == 1:
            say(number, NOTICE)
        if self.handled.count > 1 or self.attempt() is None:
            raise LaunchStoppedError(signal.Signals(number), _exit_code(self.handled.count, number))

    def _watch(self, pipe: int, ended: threading.Event) -> None:
        counted, asked_at, looked_at = SignalCount(), math.inf, time.monotonic()
        while True:
            numbers = arrived(pipe, LOOK_SECONDS if self.signals else 1.0)
            if ended.is_set():
                return
            received = [signal.Signals(number) for number in numbers if number in ASKING and counted.add(number)]
            self.signals += received
            processes, now = self.processes(), time.monotonic()
            if now - looked_at >= 1:
                looked_at = now
                self._end_frozen(processes)
            if self.signals:
                asked_at = now if received else asked_at
                self._pass_on(processes)
                if now - asked_at > LEAVE_SECONDS and (len(self.signals) > 1 or self.attempt() is None):
                    # The main thread is in code that does not see signals.
                    os._exit(_exit_code(len(self.signals), self.signals[-1]))

    def _pass_on(self, processes: set[int]) -> None:
        again = len(self.signals) > 1
        done = self.ended if again else self._asked
        for pid in processes - done:
            _send(pid, signal.SIGKILL if again else PASSED_ON)
            done.add(pid)

    def _end_frozen(self, processes: set[int]) -> None:
        for pid in processes:
            is_stopped = False
            with contextlib.suppress(OSError, ValueError):
                is_stopped = _state_and_parent(pid)[0] == "T"
            self._looks[pid] = self._looks.get(pid, 0) + 1 if is_stopped else 0
            if self._looks[pid] >= FROZEN_LOOKS:
                self.frozen = self.frozen or pid
                self.ended.add(pid)
                _send(pid, signal.SIGKILL)


def _exit_code(signals: int, number: int) -> int:
    """The launcher's own, after its first signal, if nothing was trained, and after any further one."""
    return STOPPED if signals == 1 else 128 + number


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _state_and_parent(pid: int) -> tuple[str, int]:
    """The state of a process, as ps shows it, and its parent's id.

    Raises:
        OSError, ValueError: the process does not exist.
    """
    state, parent = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[:2]
    return state, int(parent)
