"""Several processes: torchrun, with our exit codes and the name of the process that failed first.

torchrun ends with code 1 and a traceback of its own, whatever its processes ended with. Here a stop on request (75) and
bad input (2) keep their codes, and one line says what failed first. ``python -m pretrain.processes`` takes torchrun's
arguments, for one node of several.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pretrain.processes.exit_codes import BAD_INPUT, DONE, FAILED, STOPPED, UNAVAILABLE
from pretrain.processes.failures import EXIT_FILE, Failure, read_failures
from pretrain.processes.output import output_may_fail
from pretrain.processes.overseer import FROZEN_LOOKS, LaunchStoppedError, Overseer
from pretrain.processes.parent import parent_of_what_starts
from pretrain.processes.signals import ASKING

SHUTDOWN_SECONDS = 600
"""How long processes that torchrun itself sends a signal may take to end."""


def free_port() -> int:
    """A TCP port that is free on loopback."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_processes(count: int, arguments: Sequence[str]) -> int:
    """Run ``aurora ARGUMENTS`` on `count` processes that find each other on loopback; return the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    return torchrun(["--standalone", "--nproc-per-node", str(count), "-m", "pretrain", *arguments])


def torchrun(arguments: Sequence[str]) -> int:
    """Run ``torchrun ARGUMENTS`` in this process; return the exit code of the processes that it started here.

    If they train, the first signal asks them to save and to stop, and the code is 75 when they have. A second signal
    kills them. Processes that do something else receive the signal itself.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(output_may_fail("the run"))
        overseer = Overseer()
        if _starts_training(arguments):
            stack.enter_context(overseer.at_work())
        stack.enter_context(parent_of_what_starts())
        try:
            code, line = _run(arguments, overseer, stack)
        except LaunchStoppedError as error:
            code, line = error.exit_code, None if error.exit_code == STOPPED else f"ended by {error}"
    if line is not None:
        print(f"error: {line}", file=sys.stderr, flush=True)
    return code


def _run(arguments: Sequence[str], overseer: Overseer, stack: contextlib.ExitStack) -> tuple[int, str | None]:
    """The exit code, and a line to print or None; see `judge`."""
    # torchrun loads torch, which `aurora --help` does without.
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import parse_args, run

    options = parse_args(list(arguments))
    if options.shutdown_timeout is None:
        options.shutdown_timeout = SHUTDOWN_SECONDS
    if overseer.working:
        options.signals_to_handle = "SIGQUIT"  # and no others: the overseer handles them
    # Each process writes its error and its exit code there.
    root = options.log_dir or stack.enter_context(tempfile.TemporaryDirectory(prefix="aurora-logs-"))
    options.log_dir = root
    earlier = set(_attempts(root))
    overseer.attempt = lambda: _newest_attempt(root, earlier)
    ended = stack.enter_context(_ended_by_torchrun())
    try:
        run(options)
    except ChildFailedError as error:
        attempt = _newest_attempt(root, earlier)
        reports = read_failures(attempt) if attempt else []
        ended |= overseer.ended
        return judge(error.failures, reports, ended, overseer.frozen, asked=bool(overseer.signals))
    except RendezvousError as error:
        # Also when the node at which the others meet has ended first; its own exit code says why.
        reason = f" ({error.__cause__})" if error.__cause__ else ""
        return FAILED, f"lost or never reached the other nodes: {error}{reason}"
    except SignalException as error:
        code = _code_after_signal(error.sigval, _newest_attempt(root, earlier), options.nproc_per_node)
        return code, None if code in (DONE, STOPPED) else f"ended by {error.sigval.name}"
    return DONE, None


def _starts_training(arguments: Sequence[str]) -> bool:
    """Whether torchrun's arguments start ``aurora train``, whose processes save when they are asked to stop."""
    words = ["-m" if word == "--module" else word for word in arguments]
    return any(words[i : i + 3] == ["-m", "pretrain", "train"] for i in range(len(words)))


def judge(
    failures: Mapping[int, Any],
    reports: Sequence[Failure],
    ended_by_launcher: set[int],
    frozen: int | None = None,
    *,
    asked: bool = False,
) -> tuple[int, str | None]:
    """What failed first, and the exit code that follows.

    Args:
        failures: torchrun's records by rank, with ``pid`` and ``exitcode``, in the order in which it saw them.
        reports: what the processes wrote themselves, as `read_failures` sorts them.
        ended_by_launcher: ids of the processes that the launcher sent a signal.
        frozen: id of the process that the launcher ended because it was frozen, if any.
        asked: whether the launcher was asked to stop.

    Returns:
        The exit code, and a line to print; None if the processes have already printed everything.
    """
    for rank, failure in failures.items():
        if failure.pid == frozen:
            where = f"rank {rank} on {socket.gethostname()}"
            return FAILED, f"{where} was frozen (stopped, as by SIGSTOP) for {FROZEN_LOOKS} seconds and was ended"
    if reports and reports[0]["kind"] == "own":
        first = reports[0]
        if first["exit_code"] != FAILED:
            return first["exit_code"], None
        return FAILED, f"rank {first['rank']} on {first['host']} failed first: {first['text']}"
    silent = {rank for rank in failures if not any(report["rank"] == rank for report in reports)}
    codes = {
        rank: failure.exitcode
        for rank, failure in failures.items()
        if rank in silent and not (failure.exitcode < 0 and failure.pid in ended_by_launcher)
    }
    if asked and not reports and codes and all(code == STOPPED or -code in ASKING for code in codes.values()):
        return STOPPED, None  # the same signal has reached some before they could handle it, so nothing was trained
    here = socket.gethostname()
    for rank, code in codes.items():
        if code < 0:
            return FAILED, f"rank {rank} on {here} was killed by {_signal_name(-code)} without reporting an error"
    # What a process reports of another one has the rank of that one.
    explained = sum(report["kind"] == "peer" for report in reports) >= len(codes)
    for rank, code in codes.items():
        if code not in (STOPPED, BAD_INPUT, UNAVAILABLE) and not explained:
            return FAILED, f"rank {rank} on {here} ended with exit code {code} without reporting an error"
    if reports:
        first = next((report for report in reports if report["kind"] == "peer"), reports[0])
        if first["kind"] == "peer":
            return first["exit_code"], None
        where = f"rank {first['rank']} on {first['host']}"
        return FAILED, f"{where} lost the connection to another rank, whose own message says why ({first['text']})"
    if codes:
        return max(codes.values()), None
    return FAILED, "the processes were ended before they could say why"


@contextlib.contextmanager
def _ended_by_torchrun() -> Iterator[set[int]]:
    """Silence torchrun's log, which repeats as errors what the processes have said, but take from it one thing that
    torchrun tells nobody else: the ids of the processes that it ended itself."""
    ended: set[int] = set()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if str(record.msg).startswith(("Sending process", "Unable to shutdown process")) and record.args:
                ended.add(int(record.args[0]))  # type: ignore[index, call-overload]

    elastic = logging.getLogger("torch.distributed.elastic")
    elastic.setLevel(logging.CRITICAL)
    source = logging.getLogger("torch.distributed.elastic.multiprocessing.api")
    listener, level, propagate, handlers = Listener(), source.level, source.propagate, source.handlers
    source.handlers, source.propagate = [listener], False
    source.setLevel(logging.WARNING)
    try:
        yield ended
    finally:
        source.handlers, source.propagate = handlers, propagate
        source.setLevel(level)


def _attempts(root: str) -> list[Path]:
    return sorted(Path(root).glob("*/attempt_*"))


def _newest_attempt(root: str, earlier: set[Path]) -> Path | None:
    """The folder of the last attempt that this launch made."""
    new = [folder for folder in _attempts(root) if folder not in earlier]
    return max(new, key=lambda folder: int(folder.name.removeprefix("attempt_")), default=None)


def _code_after_signal(number: signal.Signals, attempt: Path | None, count: str) -> int:
    """The code on which the processes agree after they were asked to stop; the signal's if any ended otherwise."""
    files = list(attempt.glob(f"*/{EXIT_FILE}")) if attempt else []
    codes = {file.read_text() for file in files}
    if str(len(files)) == str(count) and codes in ({str(STOPPED)}, {str(DONE)}):
        return int(codes.pop())
    return 128 + number


def _signal_name(number: int) -> str:
    names = {item.value: item.name for item in signal.Signals}
    return f"signal {number} ({names.get(number, 'unknown')})"
