"""Two launches never write into one run folder."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from pretrain.run import lock
from pretrain.run.lock import RunError, RunLock, WaitStoppedError, is_locked
from tests.conftest import REPOSITORY


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(lock, "SHORT_WAIT_SECONDS", 0.2)
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 0.2)


@pytest.fixture
def attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., RunLock]:
    """Makes the lock of an attempt of a Slurm job, or of a launch outside of Slurm."""

    def make(job: str | None = None, restart: int = 0, host: str = "gpu1") -> RunLock:
        for name, value in {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": job and str(restart)}.items():
            monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
        monkeypatch.setattr(lock.socket, "gethostname", lambda: host)
        return RunLock(tmp_path)

    return make


def test_the_holder_is_named(attempt: Callable[..., RunLock], tmp_path: Path) -> None:
    holder, other = attempt("7", 1), attempt()
    holder.acquire()
    assert is_locked(tmp_path)
    who = rf"process {os.getpid()} on gpu1 since 20.*, Slurm job 7 restart 1"
    with pytest.raises(RunError, match=rf"another process is training in this run folder \({who}\); wait for it or"):
        other.acquire(wait_seconds=1e6)
    holder.release()
    assert not is_locked(tmp_path)
    other.acquire()
    other.check()


def test_a_lock_whose_disk_has_gone_away_is_given_back_all_the_same(
    attempt: Callable[..., RunLock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the end of a run that is complete and saved."""
    holder, other = attempt(), attempt()
    holder.acquire()
    with monkeypatch.context() as patched:
        patched.setattr(holder, "_write", mock.Mock(side_effect=OSError(errno.ESTALE, "Stale file handle")))
        holder.release()
    assert not is_locked(tmp_path)
    other.acquire()


@pytest.mark.parametrize(
    ("holding", "asking", "waits"),
    [
        (("7", 1), ("7", 2), True),
        (("7", 0), ("7", 12), True),
        (("7", 2), ("7", 2), False),  # a second start within one attempt
        (("7", 2), ("7", 1), False),
        (("7", 1), ("8", 2), False),
        ((None, 0), ("7", 1), False),
        (("7", 1), (None, 0), False),
    ],
)
def test_only_an_earlier_attempt_of_the_same_job_is_waited_for(
    holding: tuple[Any, int], asking: tuple[Any, int], waits: bool, attempt: Callable[..., RunLock], tmp_path: Path
) -> None:
    holder, other = attempt(*holding), attempt(*asking)
    holder.acquire()
    said: list[str] = []
    claimants: list[str | None] = []

    def stop_when_asked() -> None:
        while not (claimants and claimants[-1]):
            claimants.append(holder.claimant())
            time.sleep(0.01)
        holder.release()

    if not waits:
        with pytest.raises(RunError):
            other.acquire(wait_seconds=1e6, say=said.append)
        assert said == []
        assert holder.claimant() is None
        return
    thread = threading.Thread(target=stop_when_asked)
    thread.start()
    other.acquire(wait_seconds=60, say=said.append)
    thread.join()
    assert "Slurm job 7" in str(claimants[-1])
    assert len(said) == 1
    assert "an earlier attempt of this job" in said[0]
    assert not (tmp_path / lock.CLAIM_FILE).exists()
    other.check()


def test_the_moment_between_clearing_the_record_and_releasing_the_lock_is_waited_out(
    attempt: Callable[..., RunLock], tmp_path: Path
) -> None:
    holder, other = attempt("7", 0), attempt("7", 1)
    holder.acquire()

    def release_slowly() -> None:
        while holder.claimant() is None:
            time.sleep(0.01)
        time.sleep(2 * lock.SHORT_WAIT_SECONDS)
        (tmp_path / lock.LOCK_FILE).write_text("")
        time.sleep(lock.SHORT_WAIT_SECONDS / 2)
        holder.release()

    thread = threading.Thread(target=release_slowly)
    thread.start()
    other.acquire(wait_seconds=60)
    thread.join()
    other.check()


def test_the_wait_for_an_earlier_attempt_ends_with_its_name(attempt: Callable[..., RunLock], tmp_path: Path) -> None:
    holder = attempt("7", 0)
    holder.acquire()
    with pytest.raises(RunError, match=r"on gpu1 .*not stopped within 0 seconds \(run.lock_wait_seconds\); end it or"):
        attempt("7", 1).acquire(wait_seconds=0.1)
    assert not (tmp_path / lock.CLAIM_FILE).exists()


def test_the_wait_ends_when_this_launch_is_asked_to_stop(attempt: Callable[..., RunLock]) -> None:
    holder = attempt("7", 0)
    holder.acquire()
    with pytest.raises(RunError, match="stopped while") as raised:
        attempt("7", 1).acquire(wait_seconds=1e6, stopped=lambda: True)
    assert raised.value.exit_code == 75


def test_a_claim_that_was_left_behind_stops_no_later_attempt(attempt: Callable[..., RunLock], tmp_path: Path) -> None:
    (tmp_path / lock.CLAIM_FILE).write_text(json.dumps(attempt("7", 1).own))
    for restart in (1, 2):
        assert attempt("7", restart).claimant() is None
    assert attempt("7", 0).claimant() is not None
    (tmp_path / lock.CLAIM_FILE).write_text('{"job": "7", "restart": "many"}')
    assert attempt("7", 0).claimant() is None


def test_a_launch_that_was_replaced_writes_nothing_more(attempt: Callable[..., RunLock], tmp_path: Path) -> None:
    """Its lock was lost: somebody deleted the file, or a network file system gave the lock to another machine."""
    first = attempt(host="gpu1")
    first.acquire()
    first.check()
    (tmp_path / lock.LOCK_FILE).unlink()
    first.check()  # nobody else trains
    second = attempt(host="gpu2")
    second.acquire()
    with pytest.raises(RunError, match=r"on gpu2 .* has taken over this run folder"):
        first.check()
    second.check()
    first.release()
    second.check()
    with pytest.raises(RunError, match="another process"):
        attempt().acquire()


def elsewhere(attempt: Callable[..., RunLock], tmp_path: Path) -> dict[str, Any]:
    """Another machine's lock, which this machine's operating system does not know."""
    record = attempt("7", 0, host="gpu9").own
    (tmp_path / lock.LOCK_FILE).write_text(json.dumps(record))
    return record


def test_a_lock_of_another_machine_that_shows_life_is_respected(
    attempt: Callable[..., RunLock], tmp_path: Path
) -> None:
    elsewhere(attempt, tmp_path)
    ended = threading.Event()

    def live() -> None:
        while not ended.wait(0.01):
            os.utime(tmp_path / lock.LOCK_FILE)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(RunError, match="on gpu9"):
            attempt().acquire()
    finally:
        ended.set()
        thread.join()


def test_a_lock_of_another_machine_without_life_is_taken_over(attempt: Callable[..., RunLock], tmp_path: Path) -> None:
    elsewhere(attempt, tmp_path)
    begun = time.monotonic()
    own = attempt()
    own.acquire()
    assert time.monotonic() - begun > lock.SILENCE_SECONDS
    own.check()


def test_a_lock_of_this_machine_whose_process_died_is_taken_at_once(
    attempt: Callable[..., RunLock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 1e6)
    for content in (json.dumps(attempt("7", 0).own), "", "{", "[]", '{"token": 1}', '"text"'):
        (tmp_path / lock.LOCK_FILE).write_text(content)
        own = attempt("8", 0)
        own.acquire()
        own.release()


@pytest.fixture
def _beating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.02)


def is_touched(file: Path, seconds: float) -> bool:
    """Whether somebody touches a file within this time."""
    os.utime(file, (1, 1))
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if file.stat().st_mtime > 1:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.usefixtures("_beating")
def test_the_holder_shows_life_while_training_does_something_long(
    attempt: Callable[..., RunLock], tmp_path: Path
) -> None:
    """As in a validation of minutes, in which nothing is logged or saved; until it gives the lock back."""
    own = attempt()
    own.acquire()
    assert is_touched(tmp_path / lock.LOCK_FILE, 30)
    assert is_touched(tmp_path / lock.LOCK_FILE, 30)
    own.release()
    time.sleep(0.1)  # a touch that had begun
    assert not is_touched(tmp_path / lock.LOCK_FILE, 0.2)


@pytest.mark.usefixtures("_beating")
def test_a_launch_that_was_replaced_shows_no_life_for_the_other_one(
    attempt: Callable[..., RunLock], tmp_path: Path
) -> None:
    own = attempt()
    own.acquire()
    elsewhere(attempt, tmp_path)
    time.sleep(0.1)  # a touch that had begun
    assert not is_touched(tmp_path / lock.LOCK_FILE, 0.2)
    own.release()


def test_a_process_that_is_stopped_shows_no_life(tmp_path: Path) -> None:
    code = (
        "import pathlib, sys, time\n"
        "from pretrain.run import lock\n"
        "lock.BEAT_SECONDS = 0.02\n"
        "lock.RunLock(pathlib.Path(sys.argv[1])).acquire()\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=REPOSITORY) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == b"locked\n"
            assert is_touched(tmp_path / lock.LOCK_FILE, 30)
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.1)
            assert not is_touched(tmp_path / lock.LOCK_FILE, 0.2)
            process.send_signal(signal.SIGCONT)
            assert is_touched(tmp_path / lock.LOCK_FILE, 30)
        finally:
            process.kill()


def test_a_stop_ends_the_wait_for_a_lock_of_another_machine(
    attempt: Callable[..., RunLock], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "SILENCE_SECONDS", 20.0)
    elsewhere(attempt, tmp_path)
    looks: list[int] = []

    def stopped() -> bool:
        looks.append(0)
        return True

    own = attempt()
    with pytest.raises(WaitStoppedError, match="on gpu9"):
        own.acquire(stopped=stopped)
    assert len(looks) == 2
