"""What a launcher does with signals and with frozen processes; the processes here load no torch."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.processes import overseer
from pretrain.processes.overseer import LaunchStoppedError, Overseer
from pretrain.processes.signals import REPEAT_SECONDS
from pretrain.processes.torchrun import torchrun

# Ends with the number of requests that it has received, 10 more if it was also signalled.
PROCESS = """
import os, pathlib, signal, sys, time
seen = []
for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, lambda number, frame: seen.append(number))
pathlib.Path(sys.argv[1], "pid").write_text(str(os.getpid()))
while not seen:
    time.sleep(0.02)
time.sleep(0.5)
sys.exit(sum(1 if number == signal.SIGUSR2 else 10 for number in seen))
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overseer, "LOOK_SECONDS", 0.05)


@contextlib.contextmanager
def children(folder: Path, *ranks: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    started = []
    for rank in ranks:
        (folder / str(rank)).mkdir()
        command = [sys.executable, "-S", "-c", PROCESS, str(folder / str(rank))]
        started.append(subprocess.Popen(command, start_new_session=True))
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait()


def until_ready(folder: Path, *ranks: int) -> None:
    while not all((folder / str(rank) / "pid").exists() for rank in ranks):
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_asks_every_process_once(
    number: signal.Signals, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    watching = Overseer()
    watching.attempt = lambda: tmp_path
    with watching.at_work(), children(tmp_path, 0) as first:
        until_ready(tmp_path, 0)
        os.kill(os.getpid(), number)
        with children(tmp_path, 1) as second:  # one that is not ready when the signal comes
            codes = [process.wait(30) for process in (*first, *second)]
    assert codes == [1, 1]
    assert capfd.readouterr().err.startswith(f"\n{number.name}: stopping after this step, with a checkpoint")


def test_a_second_signal_kills_them(tmp_path: Path) -> None:
    watching = Overseer()
    watching.attempt = lambda: tmp_path
    with watching.at_work(), children(tmp_path, 0, 1) as started:
        until_ready(tmp_path, 0, 1)
        for process in started:
            process.send_signal(signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(LaunchStoppedError) as raised:
            os.kill(os.getpid(), signal.SIGTERM)
        assert raised.value.exit_code == 128 + signal.SIGTERM
        assert [process.wait(30) for process in started] == [-signal.SIGKILL] * 2


def test_a_repetition_of_a_signal_kills_nothing_and_a_later_one_does(tmp_path: Path) -> None:
    """At a time limit without notice, Slurm sends SIGTERM twice in a row."""
    watching = Overseer()
    watching.attempt = lambda: tmp_path
    with watching.at_work(), children(tmp_path, 0) as (process,):
        until_ready(tmp_path, 0)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert process.wait(30) == 1  # asked once, and in its own time
        time.sleep(1.5 * REPEAT_SECONDS)
        with pytest.raises(LaunchStoppedError) as raised:
            os.kill(os.getpid(), signal.SIGTERM)
        assert raised.value.exit_code == 128 + signal.SIGTERM


def test_the_end_that_a_notice_announced_kills_nothing(tmp_path: Path) -> None:
    watching = Overseer()
    watching.attempt = lambda: tmp_path
    with watching.at_work(), children(tmp_path, 0) as (process,):
        until_ready(tmp_path, 0)
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert process.wait(30) == 1
        assert watching.signals == [signal.SIGUSR1]


def test_a_process_that_is_frozen_is_ended_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overseer, "FROZEN_LOOKS", 2)
    watching = Overseer()
    watching.attempt = lambda: tmp_path
    with watching.at_work(), children(tmp_path, 0, 1) as (well, frozen):
        until_ready(tmp_path, 0, 1)
        frozen.send_signal(signal.SIGSTOP)
        assert frozen.wait(30) == -signal.SIGKILL
        assert watching.frozen == frozen.pid
        assert watching.ended == {frozen.pid}
        assert well.poll() is None


def test_before_there_are_processes_a_signal_ends_the_launch_with_75(tmp_path: Path) -> None:
    watching = Overseer()
    with watching.at_work(), pytest.raises(LaunchStoppedError) as raised:
        os.kill(os.getpid(), signal.SIGHUP)
    assert raised.value.exit_code == 75


def test_a_launcher_is_asked_while_it_still_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*arguments: object) -> tuple[int, None]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return 0, None

    monkeypatch.setattr("pretrain.processes.torchrun._run", load)
    assert torchrun(["--nproc-per-node", "2", "-m", "pretrain", "train", "config.yaml"]) == 75


def test_a_file_that_names_a_foreign_process_harms_nobody(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    for text in (str(os.getppid()), "1", "", "no number", "999999999"):
        (tmp_path / "0/pid").write_text(text)
        watching = Overseer()
        watching.attempt = lambda: tmp_path
        assert watching.processes() == set()
