"""Worker programs that start in a moment: forked from the server of `tests.distributed.ranks`, which has the imports.

A worker of the product is a plain program, whose imports take three seconds of a core. That it starts as one is shown
by tests/data/test_workers.py and tests/data/test_prepare_killed.py; where only what it does is tested, it is the same
code in a process of its own, with the same pipes, signals and exit codes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import SimpleNamespace
from unittest import mock

from tests.distributed.ranks import CONTEXT


class WarmProcess:
    """As much of `subprocess.Popen` as our workers need, for ``[python, "-c", code]``."""

    def __init__(self, command: list[str], *, stdin: int, stdout: int, env: Mapping[str, str]) -> None:
        python, option, code = command
        assert (python, option, stdin, stdout) == (sys.executable, "-c", subprocess.PIPE, subprocess.PIPE)
        (requests, our_end), (our_start, answers) = os.pipe(), os.pipe()
        theirs = Connection(requests, writable=False), Connection(answers, readable=False)
        self._process = CONTEXT.Process(target=_work, args=(code, *theirs, dict(env)), daemon=True)
        self._process.start()
        for connection in theirs:
            connection.close()
        self.stdin, self.stdout = os.fdopen(our_end, "wb"), os.fdopen(our_start, "rb")

    @property
    def pid(self) -> int:
        """Of the worker."""
        assert self._process.pid
        return self._process.pid

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def wait(self) -> int:
        """Wait for the end; the exit code, or minus the number of the signal."""
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def _work(code: str, requests: Connection, answers: Connection, environment: dict[str, str]) -> None:
    os.dup2(requests.fileno(), 0)
    os.dup2(answers.fileno(), 1)
    requests.close()
    answers.close()
    sys.stdin, sys.stdout = os.fdopen(0, closefd=False), os.fdopen(1, "w", closefd=False)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = environment["PYTHONPATH"].split(os.pathsep)
    exec(code, {"__name__": "__main__"})


@contextmanager
def warm_workers() -> Iterator[None]:
    """Data workers and those of `aurora data prepare` start warm."""
    stand_in = SimpleNamespace(Popen=WarmProcess, PIPE=subprocess.PIPE)
    with (
        mock.patch("pretrain.data.workers.subprocess", stand_in),
        mock.patch("pretrain.data.prepared.prepare.subprocess", stand_in),
    ):
        yield
