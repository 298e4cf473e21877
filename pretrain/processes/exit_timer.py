"""The thread that ends a process which was asked to stop but cannot: by a second signal, or when its time is over.

Python runs signal handlers in the main thread, between two of its own instructions. A main thread that waits inside a
collective or a hung file system never gets there. This thread learns of signals from Python's wake-up file descriptor.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import threading
import time
from collections.abc import Iterator

from pretrain.processes.exit_codes import FAILED, STOPPED
from pretrain.processes.failures import note_exit, report
from pretrain.processes.parent import is_orphaned
from pretrain.processes.signals import SIGNALS, SignalCount, StopRequests

LOOK_SECONDS = 1.0
"""How often the thread looks at the clock and at the parent process."""
CLOSE_SECONDS = 8.0
"""How long a process may take to end after everything is saved."""


@contextlib.contextmanager
def signal_pipe() -> Iterator[tuple[int, int]]:
    """Yield the two ends of a pipe, from which the numbers of signals with a handler can be read, a byte each.

    Outside the main thread, where Python does not allow that, nothing but what is written to the other end arrives.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False) if is_main else -1
    try:
        yield reading, writing
    finally:
        if is_main:
            signal.set_wakeup_fd(before)
        os.close(reading)
        os.close(writing)


def arrived(pipe: int, seconds: float) -> bytes:
    """Wait for at most `seconds`; return the numbers of the signals that have arrived, a byte each."""
    # Not `select.select`, which refuses descriptors from 1,024 on: a process with many open files has those.
    waiting = select.poll()
    waiting.register(pipe, select.POLLIN)
    return os.read(pipe, 64) if waiting.poll(1000 * seconds) else b""


@contextlib.contextmanager
def exit_timer(requests: StopRequests) -> Iterator[None]:
    """End this process, whatever its main thread does, once a request to stop has not been followed.

    It ends immediately with 128 and the signal's number at the second signal (`SignalCount`); with `FAILED` and the
    stacks of all threads `requests.seconds` after the first request; with `STOPPED` `CLOSE_SECONDS` after everything
    was saved. If the parent process dies (`is_orphaned`), the thread itself requests a stop.

    For commands only: it does not return to a program that has other things to do.
    """
    with signal_pipe() as (signals, wake_up):
        ended = threading.Event()
        thread = threading.Thread(target=_watch, args=(requests, signals, ended), name="exit-timer", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            os.write(wake_up, b"\0")
            thread.join()


def _watch(requests: StopRequests, signals: int, ended: threading.Event) -> None:
    counted, asked_at, saved_at = SignalCount(), None, None
    while not ended.is_set():
        received = arrived(signals, LOOK_SECONDS)
        for number in received:
            if number in SIGNALS and counted.add(number) and counted.count > 1:
                os._exit(128 + number)
        if not requests and is_orphaned():
            requests.add("the death of its parent process")
        now = time.monotonic()
        if asked_at is None and (requests or received):
            asked_at = now
        if saved_at is None and requests and requests.saved:
            saved_at = now
        if saved_at is not None:
            if now - saved_at > CLOSE_SECONDS:
                note_exit(STOPPED)
                os._exit(STOPPED)
        elif asked_at is not None and now - asked_at > requests.seconds:
            _give_up(requests)


def _give_up(requests: StopRequests) -> None:
    with contextlib.suppress(OSError):
        faulthandler.dump_traceback(2, all_threads=True)
    report(
        TimeoutError(
            f"not stopped {requests.seconds:g} seconds after the request (run.stop_seconds); the stacks above show "
            "where it waits. The last complete checkpoint is intact"
        )
    )
    os._exit(FAILED)
