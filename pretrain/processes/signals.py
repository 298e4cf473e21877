"""Requests to stop, and what SIGINT, SIGTERM, SIGHUP and SIGUSR1 mean while there is something to save."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
"""Ctrl-C, a scheduler or `kill`, a closed terminal, and what Slurm sends before a time limit (``--signal=USR1@90``)."""

PASSED_ON = signal.SIGUSR2
"""What our launcher sends to its processes after it was asked to stop itself. It asks for a stop however often it
arrives: Slurm signals the launcher and its processes alike, and that must not count as a second signal."""

ASKING = (*SIGNALS, PASSED_ON)
"""All signals that ask for a stop. Some schedulers, and the scripts of some users, announce a limit by SIGUSR2."""

OF_SLURM = frozenset({signal.SIGUSR1, signal.SIGTERM})
"""What Slurm sends by itself: the notice before a time limit, and the limit or a preemption. The first of each is one
request: what was announced has arrived, and must not cut the save short."""

NOTICE = "stopping after this step, with a checkpoint; a second signal ends the run immediately"
"""What is printed after the name of the first signal."""

REPEAT_SECONDS = 0.75
"""The same signal again within this time is the same request. At a time limit that comes without notice, Slurm sends
SIGTERM twice in a row, and srun may forward it as well."""


class SignalCount:
    """Counts the signals of one process as requests.

    Not counted are a repetition of a signal within `REPEAT_SECONDS`, `PASSED_ON` after a request, and the other signal
    of `OF_SLURM` after the first one, when nothing else has come. A second Ctrl-C, or a second `kill` some time after
    the first, is counted.

    Args:
        clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.count = 0
        self._clock = clock
        self._heard_at: dict[int, float] = {}

    def add(self, number: int) -> bool:
        """Return whether a signal that has arrived now is one to be counted, and count it."""
        if number == PASSED_ON and self.count:
            return False
        now = self._clock()
        # From the last one that was not a repetition: whoever keeps sending a signal is heard.
        if now - self._heard_at.get(number, -math.inf) < REPEAT_SECONDS:
            return False
        is_announced = number not in self._heard_at and {number, *self._heard_at} <= OF_SLURM
        self._heard_at[number] = now
        if is_announced and self.count:
            return False
        self.count += 1
        return True


class StopRequests:
    """The requests to stop that this process has received, from signals and from whatever else may ask.

    Attributes:
        count: number of requests; those after the first ask for an immediate end.
        reason: who asked first; None before that.
        started: when the work began that may be asked to stop, on the monotonic clock.
        seconds: how long stopping may take after the first request; see `pretrain.processes.exit_timer`.
        saved: everything is saved, and only the process has still to end.
    """

    def __init__(self, seconds: float = 600.0, age: float = 0.0) -> None:
        self.count = 0
        self.reason: str | None = None
        self.started = time.monotonic() - age
        self.seconds = seconds
        self.saved = False

    def __bool__(self) -> bool:
        return self.count > 0

    def add(self, reason: str) -> None:
        """Count a request."""
        self.reason = self.reason or reason
        self.count += 1


@contextlib.contextmanager
def stop_requests(
    requests: StopRequests,
    notice: str | None,
    *,
    first_only: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> Iterator[None]:
    """Count `SIGNALS` and `PASSED_ON` instead of dying of them; the earlier handlers return at the end.

    Args:
        requests: counts them; `PASSED_ON` counts only if nothing else has, and repetitions do not (`SignalCount`).
        notice: printed to standard error after the signal's name; None prints nothing.
        first_only: only the first signal is a request; the earlier handlers return for the second, which is sent to
            them, so that it ends the process.
        warn: called with a line of text where handlers cannot be installed, which Python allows in the main thread
            only. Signals then do what they did before.
    """
    if threading.current_thread() is not threading.main_thread():
        warn("not in the main thread: signals will not stop this work with a checkpoint")
        yield
        return

    received = SignalCount()

    def request(number: int, frame: FrameType | None) -> None:
        if not received.add(number):
            return
        if first_only and received.count > 1:
            restore()
            signal.raise_signal(number)
            return
        requests.add(signal.Signals(number).name)
        say(number, notice)

    def passed_on(number: int, frame: FrameType | None) -> None:
        if not requests:
            requests.add("a signal to the launcher")

    with handled((PASSED_ON,), passed_on), handled(SIGNALS, request) as restore:
        yield


@contextlib.contextmanager
def handled(
    numbers: Iterable[signal.Signals], handler: Callable[[int, FrameType | None], None]
) -> Iterator[Callable[[], None]]:
    """Handle signals; yield what puts the earlier handlers back, which also happens at the end.

    SIGHUP and SIGINT stay ignored where they are ignored already: by ``nohup``, and by shells for background jobs.
    Outside the main thread, where Python does not allow it, nothing is handled.
    """
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in numbers:
            earlier = signal.getsignal(number)
            if not (number in (signal.SIGHUP, signal.SIGINT) and earlier is signal.SIG_IGN):
                before[number] = earlier

    def restore() -> None:
        for number, earlier in before.items():
            # None: a handler that was not installed from Python, and that Python cannot put back.
            signal.signal(number, signal.SIG_DFL if earlier is None else earlier)

    for number in before:
        signal.signal(number, handler)
    try:
        yield restore
    finally:
        restore()


def say(number: int, notice: str | None) -> None:
    """Print a notice after a signal's name, from its handler: not by `print`, which the signal may have interrupted."""
    if notice is not None:
        with contextlib.suppress(OSError):
            os.write(2, f"\n{signal.Signals(number).name}: {notice}\n".encode())
