"""Alerts: a webhook is told what happened, when, and on which rank.

A thread of its own sends them, so that no step waits for a server, and nothing that goes wrong here ends a run. The URL
is a secret: it is read from an environment variable or a file, and never appears in a message.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pretrain.files import now
from pretrain.processes.errors import UserError
from pretrain.processes.redaction import redact

TRIES = 3
PAUSE_SECONDS = 1.0
"""Before the second try; twice as long before the third."""
TIMEOUT_SECONDS = 5.0
CLOSE_SECONDS = 10.0
"""How long the end of a run waits for alerts on their way."""
WAITING = 50
"""Alerts that wait to be sent; further ones are dropped."""
REPEAT_SECONDS = 3600.0
"""An alert with the same text is not sent again for so long."""
LARGEST_URL = 4096


class Alerts:
    """Sends alerts to a webhook.

    Args:
        url: where they are posted; None: nowhere.
        run: the run's name.
        rank: rank of this process.
        warn: prints a line if an alert cannot be delivered.
    """

    def __init__(self, url: str | None, run: str, rank: int, warn: Callable[[str], None] = lambda text: None) -> None:
        self._url, self._run, self._rank, self._warn = url, run, rank, warn
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(WAITING)
        self._sent: dict[str, float] = {}
        self._thread: threading.Thread | None = None
        if url is not None:
            # A daemon: a server that does not answer must not keep the process alive.
            self._thread = threading.Thread(target=self._send_all, name="alerts", daemon=True)
            self._thread.start()

    def send(self, kind: str, text: str, *, step: int | None = None) -> None:
        """Send an alert soon; returns immediately.

        Args:
            kind: what happened, in one word: failed, hang, warning, straggler, stopped, done.
            text: for people, in one line.
            step: the step at which it happened.
        """
        if self._thread is None:
            return
        text, present = redact(text), time.monotonic()
        if present - self._sent.get(text, float("-inf")) < REPEAT_SECONDS:
            return
        self._sent[text] = present
        where = f"rank {self._rank} on {socket.gethostname()}"
        content = {
            "text": f"{self._run}: {kind}: {text} ({where})",
            "run": self._run,
            "kind": kind,
            "message": text,
            "rank": self._rank,
            "host": socket.gethostname(),
            "time": now(),
            "step": step,
        }
        with contextlib.suppress(queue.Full):
            self._waiting.put_nowait(content)

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Send what waits, for at most so long. May be called twice."""
        thread, self._thread = self._thread, None
        if thread is not None:
            with contextlib.suppress(queue.Full):
                self._waiting.put(None, timeout=seconds)
            thread.join(seconds)

    def _send_all(self) -> None:
        while (content := self._waiting.get()) is not None:
            problem = self._deliver(content)
            if problem is not None:
                with contextlib.suppress(Exception):
                    self._warn(f"an alert could not be delivered to watch.webhook: {problem}")

    def _deliver(self, content: dict[str, Any]) -> str | None:
        """Post one alert; return why it could not be delivered, without the URL."""
        import httpx2  # imported here: only runs with a webhook need it

        for name in ("httpx2", "httpcore2"):  # they log addresses when the root logger is set to INFO or DEBUG
            logging.getLogger(name).setLevel(logging.WARNING)
        problem = None
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE_SECONDS * 2 ** (attempt - 1))
            try:
                # Redirects are not followed: they would carry the alert to a server that nobody chose.
                answer = httpx2.post(str(self._url), json=content, timeout=TIMEOUT_SECONDS, follow_redirects=False)
            except Exception as error:  # whatever a library makes of a bad address or server
                problem = type(error).__name__
                continue
            if answer.is_success:
                return None
            problem = f"the server answered {answer.status_code}"
            if answer.status_code < 500 and answer.status_code not in (408, 429):
                return problem
        return problem


def read_webhook(setting: str | None) -> str | None:
    """Return the URL that `watch.webhook` points to.

    Args:
        setting: ``env:NAME``, ``file:PATH``, or None.

    Raises:
        UserError: there is no URL there.
    """
    if setting is None:
        return None
    kind, _, name = setting.partition(":")
    if kind == "env":
        text = os.environ.get(name, "")
    else:
        if not Path(name).is_file():
            raise UserError(f"watch.webhook: {name} is not a file")
        try:
            with Path(name).open(encoding="utf-8") as file:
                text = file.read(LARGEST_URL + 1)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise UserError(f"watch.webhook: {name} cannot be read: {reason}") from None
    url = text.strip()
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and len(text) <= LARGEST_URL
        valid = valid and url.isprintable() and " " not in url and parts.port != 0
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"watch.webhook: expected an http or https URL in {setting}, found none (it is not shown)")
    return url
