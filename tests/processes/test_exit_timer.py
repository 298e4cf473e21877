"""A process that was asked to stop ends, whatever its main thread does; these processes load no torch."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.processes.exit_timer import arrived
from pretrain.processes.signals import REPEAT_SECONDS
from tests.conftest import REPOSITORY

# Waits in C code that never returns to Python's signal handlers, as a collective does whose peer is gone.
STUCK = """
import ctypes, os, sys
from pretrain.processes import exit_timer
from pretrain.processes.parent import is_orphaned
from pretrain.processes.signals import StopRequests, stop_requests

exit_timer.LOOK_SECONDS, exit_timer.CLOSE_SECONDS = 0.05, 0.1
requests = StopRequests(seconds=float(sys.argv[1]))
requests.saved = sys.argv[2] == "saved"
with exit_timer.exit_timer(requests), stop_requests(requests, None, first_only=True):
    if sys.argv[2] == "asked":
        requests.add("a file")
    elif sys.argv[2] == "saved":
        requests.add("a file")
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    libc.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    libc.pthread_mutex_lock(mutex)
"""


def start(seconds: float, state: str = "", **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(seconds), state],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    wait_until_stuck(process.pid)
    return process


def wait_until_stuck(pid: int) -> None:
    """Until the main thread sleeps: before that, it would still follow a signal itself."""
    looks = 0
    while looks < 5:
        state = Path(f"/proc/{pid}/task/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        looks = looks + 1 if state == "S" else 0
        time.sleep(0.01)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        error = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    return process.returncode, error


def test_a_second_signal_ends_a_process_that_is_stuck() -> None:
    process = start(1e6)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGHUP)
    # Which of two signals at the same time comes first is up to the kernel.
    assert ended(process)[0] in (128 + signal.SIGTERM, 128 + signal.SIGHUP)


def test_the_end_that_a_notice_announced_ends_no_process() -> None:
    """Slurm sends SIGUSR1 before the time limit and SIGTERM at the limit, while the process may still be saving."""
    process = start(1e6)
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    time.sleep(2 * REPEAT_SECONDS)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 128 + signal.SIGTERM


def test_a_repetition_of_a_signal_ends_no_process_and_a_later_one_does() -> None:
    """At a time limit without notice, Slurm sends SIGTERM twice in a row."""
    process = start(1e6)
    for _ in range(3):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    time.sleep(2 * REPEAT_SECONDS)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 128 + signal.SIGTERM


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR2])
def test_a_stop_that_takes_too_long_ends_with_the_stacks(number: signal.Signals) -> None:
    process = start(0.2)
    process.send_signal(number)
    code, error = ended(process)
    assert code == 1
    assert "Thread 0x" in error
    assert 'File "<string>"' in error  # where the main thread is
    assert "not stopped 0.2 seconds after the request (run.stop_seconds)" in error


def test_the_time_also_counts_from_requests_that_are_not_signals() -> None:
    assert ended(start(0.2, "asked"))[0] == 1


def test_after_everything_is_saved_the_process_ends_with_75() -> None:
    assert ended(start(1e6, "saved"))[0] == 75


def test_a_process_whose_parent_has_died_stops_by_itself(tmp_path: Path) -> None:
    """The parent starts the process, says that it is its parent, and is killed."""
    (tmp_path / "stuck.py").write_text(STUCK)
    parent = (
        "import subprocess, sys, os, signal\n"
        "from pretrain.processes.parent import parent_of_what_starts\n"
        "with parent_of_what_starts():\n"
        "    child = subprocess.Popen([sys.executable, 'stuck.py', '0.2', ''], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent],
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        timeout=60,  # its standard error ends only when the child has ended as well
    )
    assert done.returncode == -signal.SIGKILL
    assert "run.stop_seconds" in done.stderr


def test_signals_arrive_in_a_process_with_many_open_files() -> None:
    """`select.select` refuses descriptors from 1,024 on."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft <= 1500:
        pytest.skip(f"no more than {soft} open files are allowed")
    reading, writing = os.pipe()
    high = fcntl.fcntl(reading, fcntl.F_DUPFD, 1024)
    try:
        assert arrived(high, 0.0) == b""
        os.write(writing, b"\x0f")
        assert arrived(high, 30.0) == b"\x0f"
    finally:
        for descriptor in (reading, writing, high):
            os.close(descriptor)
