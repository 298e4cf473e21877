"""Waiting for servers: the one place that retries. What is called here must not retry by itself.

A wait ends early once a stop is requested (`stopping`), so that a run whose server is down can still save and end
within the time that a scheduler gives it.
"""

import logging
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

from pretrain.data.errors import DataUnavailableError, ReadingStoppedError
from pretrain.processes.environment import world
from pretrain.processes.redaction import redact

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long to wait for a server."""

    total_seconds: float = 1800
    """Without any progress, before `DataUnavailableError`; `data.retry_minutes`."""
    first_wait_seconds: float = 0.5
    """Upper bound of the first wait; each further bound is twice the one before."""
    longest_wait_seconds: float = 60
    silence_seconds: float = 30
    """Without a byte on an open connection, before it counts as failed."""


_patience = Patience()


def patience() -> Patience:
    """The patience of this process."""
    return _patience


def set_patience(value: Patience) -> None:
    """Set the patience of this process and of the workers that it starts from now on."""
    global _patience
    _patience = value


def set_retry_minutes(minutes: float) -> None:
    """Set how long this process waits for a server that does not answer; `data.retry_minutes`."""
    set_patience(replace(_patience, total_seconds=60 * minutes))


@contextmanager
def patient(**changes: float) -> Iterator[None]:
    """Change fields of the patience of this process for a while."""
    before = patience()
    set_patience(replace(before, **changes))
    try:
        yield
    finally:
        set_patience(before)


_stops: tuple[Callable[[], bool], ...] = ()


@contextmanager
def stopping(requested: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """End the waits of all threads of this process once a stop is requested, those that have begun included.

    Reading continues as long as the servers answer: after a stop was requested, the second failure in a row raises
    `ReadingStoppedError`. A request that is under way ends by itself, at the latest after the `silence_seconds` of the
    patience.

    Args:
        requested: whether a stop is requested; called several times a second while a thread waits, from that thread.
            By default, it is requested by entering the context.

    """
    global _stops
    _stops = (*_stops, requested)
    try:
        yield
    finally:
        _stops = tuple(stop for stop in _stops if stop is not requested)


def stop_requested() -> bool:
    """Whether a stop of this process is requested, see `stopping`."""
    return any(stop() for stop in _stops)


class TransientError(Exception):
    """A failure that may pass.

    Args:
        reason: what happened, without secrets.
        wait_seconds: how long the server asked to wait; None: it did not say.
        progressed: some of what was asked for has arrived, so that the next request asks for less.

    """

    def __init__(self, reason: str, wait_seconds: float | None = None, *, progressed: bool = False) -> None:
        super().__init__(redact(reason))
        self.wait_seconds, self.progressed = wait_seconds, progressed


def retrying(what: str, attempt: Callable[[], T]) -> T:
    """Call `attempt` until it raises no `TransientError`, with growing waits of random length in between.

    Args:
        what: what is wanted, for messages.
        attempt: one request. After a `TransientError` that says so, the next call continues where it broke off.

    Raises:
        DataUnavailableError: there was no progress for longer than the patience of this process.
        ReadingStoppedError: a stop was requested, see `stopping`.

    """
    limits = patience()
    failures, silent_since, next_report = 0, time.monotonic(), 1
    while True:
        try:
            result = attempt()
        except TransientError as error:
            now = time.monotonic()
            if error.progressed:
                failures, silent_since = 0, now
            left = silent_since + limits.total_seconds - now
            if left <= 0:
                minutes = limits.total_seconds / 60
                raise DataUnavailableError(
                    f"{redact(what)}: unavailable for {minutes:g} minutes (data.retry_minutes), last: {error}; start "
                    "the same command again when the server answers"
                ) from None
            failures += 1
            wait = _wait_seconds(limits, failures, error.wait_seconds)
            if failures == next_report:
                next_report *= 4
                if failures > 1 or _is_news(now):
                    _report("%s: %s; waiting %.1f seconds before try %d", redact(what), error, wait, failures + 1)
            _sleep(min(wait, left))
            if failures > 1 and stop_requested():  # single failures are common while a server is well
                raise ReadingStoppedError(
                    f"{redact(what)}: not read, because a stop was requested while the server did not answer, last: "
                    f"{error}; start the same command again to continue"
                ) from None
        else:
            if failures >= 4:
                _report("%s: answers again after %d failed tries", redact(what), failures)
            return result


_LOOK_SECONDS = 0.1
"""How often a wait looks whether a stop is requested. Not an event: a signal handler must not take locks."""


def _sleep(seconds: float) -> None:
    """Wait, at most until a stop is requested."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not stop_requested():
        time.sleep(min(left, _LOOK_SECONDS))


def _wait_seconds(limits: Patience, failures: int, asked: float | None) -> float:
    """Full jitter below a doubling bound; never shorter than the server asked for."""
    bound = min(limits.longest_wait_seconds, limits.first_wait_seconds * 2.0 ** min(failures - 1, 30))
    wait = random.Random().uniform(bound / 2, bound)
    return wait if asked is None else max(asked, 0) + wait * 0.1


_quiet_until = 0.0


def _is_news(now: float) -> bool:
    """Whether no other first failure has been reported in the last minute: single ones are common."""
    global _quiet_until
    if now < _quiet_until:
        return False
    _quiet_until = now + 60
    return True


def _report(message: str, *values: object) -> None:
    """Log on the first rank."""
    if world().rank == 0:
        logger.warning(message, *values)
