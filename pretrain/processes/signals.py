"""Requests to stop: what SIGINT and SIGTERM mean while there is something to save."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequests:
    """How often this process was asked to stop."""

    def __init__(self) -> None:
        self.count = 0

    def __bool__(self) -> bool:
        return self.count > 0


@contextlib.contextmanager
def stop_requests(
    requests: StopRequests,
    notice: str | None,
    *,
    first_only: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> Iterator[None]:
    """Count SIGINT and SIGTERM instead of dying of them; the earlier handlers return at the end.

    Args:
        requests: counts them.
        notice: printed to standard error after the signal's name; None prints nothing.
        first_only: the earlier handlers return after the first request, so that a second one ends the process.
        warn: called with a line of text where handlers cannot be installed, which Python allows in the main thread
            only. Signals then do what they did before.
    """
    if threading.current_thread() is not threading.main_thread():
        warn("not in the main thread: SIGINT and SIGTERM will not stop this work with a checkpoint")
        yield
        return

    def restore() -> None:
        for number, handler in previous.items():
            # None: a handler that was not installed from Python, and that Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def request(number: int, frame: FrameType | None) -> None:
        requests.count += 1
        if notice is not None:
            # Not print: the signal may have interrupted one.
            with contextlib.suppress(OSError):
                os.write(2, f"\n{signal.Signals(number).name}: {notice}\n".encode())
        if first_only:
            restore()

    previous: dict[signal.Signals, Any] = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, request)
    try:
        yield
    finally:
        restore()
