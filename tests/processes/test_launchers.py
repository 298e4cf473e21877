"""A run is the same whatever starts it: launcher x engine x one process or two, from the shell and from Python."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import pretrain
from pretrain.config import Config
from pretrain.processes.errors import UserError
from pretrain.processes.signals import REPEAT_SECONDS
from pretrain.processes.torchrun import free_port
from pretrain.run.folder import RunFolder
from tests.conftest import REPOSITORY
from tests.distributed.ranks import run_ranks
from tests.processes.launching import LAUNCHERS, SHORT, TIMEOUT_SECONDS, environment, launch, write_config

# Two processes of torchrun itself with the plain engine: tests/test_cli.py.
FAST = {
    ("torchrun", "deepspeed", 1),
    ("deepspeed", "plain", 2),
}


def cases() -> list[Any]:
    """`accelerate launch` starts several processes only on GPUs or with MPI."""
    found = []
    for launcher in [*LAUNCHERS, "--processes"]:
        for engine in ("plain", "deepspeed"):
            for count in (1, 2):
                if count == 2 and launcher in ("none", "accelerate"):
                    continue
                case = (launcher, engine, count)
                found.append(pytest.param(*case, marks=() if case in FAST else pytest.mark.long))
    return found


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(record["loss"], record["grad_norm"]) for record in RunFolder(folder / "runs" / "tiny").metrics.read()]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], list[tuple[float, float]]]:
    """The steps of the same run on ranks that no launcher started."""
    known: dict[tuple[str, int], list[tuple[float, float]]] = {}

    def steps(engine: str, count: int) -> list[tuple[float, float]]:
        if (engine, count) not in known:
            folder = tmp_path_factory.mktemp("expected")
            run_ranks(count, pretrain.train, str(write_config(folder, {"engine.kind": engine})))
            known[engine, count] = losses(folder)
        return known[engine, count]

    return steps


@pytest.mark.parametrize(("launcher", "engine", "count"), cases())
def test_every_launcher_trains_the_same_run(
    launcher: str, engine: str, count: int, tmp_path: Path, expected: Callable[[str, int], list[tuple[float, float]]]
) -> None:
    file = write_config(tmp_path, {"engine.kind": engine})
    if launcher == "--processes":
        done = launch("train", file, "--processes", str(count))
    else:
        done = launch("train", file, launcher=launcher, count=count, port=free_port())
    assert done.returncode == 0, done.stderr
    assert f", {count} ranks," in done.stdout
    assert done.stdout.count("done: 4 steps") == 1
    assert "warning" not in done.stderr.lower().replace("[warning]", ""), done.stderr
    assert losses(tmp_path) == expected(engine, count)
    assert len(losses(tmp_path)) == 4


def test_train_from_python_takes_a_path_with_overrides_or_a_config(
    tmp_path: Path, tiny_config: Callable[..., Config]
) -> None:
    file = write_config(tmp_path)
    assert pretrain.train(file, ["optimizer.lr=0.01"], stop_at=1) == 75
    assert pretrain.train(str(file), ["optimizer.lr=0.01"]) == 0
    assert len(losses(tmp_path)) == 4
    with pytest.raises(UserError, match=r"optimizer\.lr"):
        pretrain.train(file, ["optimizer.lr=-1"])
    config = tiny_config({**SHORT, "run.name": "from_config"})
    assert pretrain.train(config, resume="never", stop_at=1) == 75
    with pytest.raises(TypeError, match="overrides"):
        pretrain.train(config, ["optimizer.lr=0.01"])


def test_train_works_in_a_thread_and_under_a_running_event_loop(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_config(tmp_path)
    codes: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=lambda: codes.append(pretrain.train(file, stop_at=2)))
    thread.start()
    thread.join()
    assert codes == [75]
    assert "warning: not in the main thread" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before

    async def cell() -> int:  # how a notebook runs its cells
        return pretrain.train(file)

    assert asyncio.run(cell()) == 0
    assert len(losses(tmp_path)) == 4


def test_engines_follow_each_other_in_one_process(tmp_path: Path) -> None:
    """What DeepSpeed leaves in the environment does not reach the next run."""
    code = (
        "import os, sys, pretrain\n"
        "for name, engine in (('a', 'deepspeed'), ('b', 'plain'), ('c', 'deepspeed')):\n"
        "    assert pretrain.train(sys.argv[1], [f'run.name={name}', f'engine.kind={engine}'], stop_at=2) == 75\n"
        "    left = {name for name in os.environ if name.startswith(('ACCELERATE_', 'RANK', 'WORLD', 'MASTER'))}\n"
        "    assert not left, left\n"
    )
    command = [sys.executable, "-c", code, str(write_config(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment(), timeout=240)
    assert done.returncode == 0, done.stderr


@contextlib.contextmanager
def two_ranks_in_training(
    folder: Path, launcher: Sequence[str] = ("-m", "pretrain"), count: Sequence[str] = ("--processes", "2")
) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A launcher whose two ranks have trained a step, and the ids of the ranks; all of them are killed at the end."""
    file = write_config(folder, {"train.total_tokens": 1700 * 768, "logging.every_steps": 1})
    process = subprocess.Popen(
        [sys.executable, *launcher, "train", str(file), *count],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env=environment(),
    )
    assert process.stdout is not None
    ranks: list[int] = []
    try:
        for line in process.stdout:
            if line.startswith("step"):
                break
        found = subprocess.run(["pgrep", "--parent", str(process.pid), "--full", str(file)], capture_output=True)
        ranks = [int(word) for word in found.stdout.split()]
        assert len(ranks) == 2
        yield process, ranks
    finally:
        for pid in (process.pid, *ranks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def checkpoints(folder: Path) -> list[str]:
    return [path.name for path in (folder / "runs/tiny/checkpoints").glob("step-*")]


PROCESSES = ("-m", "pretrain.processes", "--standalone", "--nproc-per-node", "2", "-m", "pretrain")


@pytest.mark.parametrize(
    ("number", "launcher"),
    [
        (signal.SIGUSR1, "--processes"),
        pytest.param(signal.SIGTERM, "--processes", marks=pytest.mark.long),
        pytest.param(signal.SIGINT, "--processes", marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, "--processes", marks=pytest.mark.long),
        pytest.param(signal.SIGUSR1, "pretrain.processes", marks=pytest.mark.long),
        pytest.param(signal.SIGTERM, "pretrain.processes", marks=pytest.mark.long),
    ],
)
def test_a_signal_to_the_launcher_stops_all_processes_with_a_checkpoint_and_code_75(
    number: signal.Signals, launcher: str, tmp_path: Path
) -> None:
    started = two_ranks_in_training(tmp_path) if launcher == "--processes" else None
    with started or two_ranks_in_training(tmp_path, PROCESSES, ()) as (process, ranks):
        process.send_signal(number)
        out, error = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == 75, error
        assert not any(map(is_alive, ranks))
    assert "stopped after step" in out
    assert f"{number.name}: stopping after this step" in error
    assert len(checkpoints(tmp_path)) == 1


@pytest.mark.long
def test_slurm_may_signal_the_launcher_and_its_processes_alike(tmp_path: Path) -> None:
    with two_ranks_in_training(tmp_path) as (process, ranks):
        for pid in (*ranks, process.pid):
            os.kill(pid, signal.SIGTERM)
        _, error = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == 75, error
    assert len(checkpoints(tmp_path)) == 1


@pytest.mark.long
def test_one_rank_that_is_asked_stops_all(tmp_path: Path) -> None:
    with two_ranks_in_training(tmp_path) as (process, ranks):
        os.kill(ranks[1], signal.SIGUSR1)
        out, error = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == 75, error
        assert "because of SIGUSR1" in out
    assert len(checkpoints(tmp_path)) == 1


@pytest.mark.long
def test_ranks_do_not_outlive_their_launcher(tmp_path: Path) -> None:
    """They save, end, and leave the run folder to the next launch."""
    with two_ranks_in_training(tmp_path) as (process, ranks):
        process.kill()
        process.communicate(timeout=TIMEOUT_SECONDS)  # until nobody holds the other end of its output
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while any(map(is_alive, ranks)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(map(is_alive, ranks))
    assert len(checkpoints(tmp_path)) == 1
    assert not RunFolder(tmp_path / "runs/tiny").is_locked()


@pytest.mark.long
def test_a_second_signal_to_the_launcher_ends_ranks_that_cannot_stop(tmp_path: Path) -> None:
    with two_ranks_in_training(tmp_path) as (process, ranks):
        for pid in ranks:
            os.kill(pid, signal.SIGSTOP)
        process.send_signal(signal.SIGTERM)
        time.sleep(2 * REPEAT_SECONDS)
        process.send_signal(signal.SIGTERM)
        _, error = process.communicate(timeout=TIMEOUT_SECONDS)
        assert process.returncode == 128 + signal.SIGTERM, error
        assert not any(map(is_alive, ranks))


def test_training_outlives_the_reader_of_its_output(tmp_path: Path) -> None:
    """As with ``aurora train CONFIG | head``."""
    file = write_config(tmp_path, {"logging.every_steps": 1})
    reading, writing = os.pipe()
    os.close(reading)  # nobody reads, from the first line on
    command = [sys.executable, "-m", "pretrain", "train", str(file)]
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment(), timeout=240
    )
    os.close(writing)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "warning: standard output failed (Broken pipe); training continues silently\n"
    assert len(losses(tmp_path)) == 4
    assert [path.name for path in (tmp_path / "runs/tiny/checkpoints").iterdir()] == ["step-00000004"]


def test_other_verbs_end_quietly_when_nobody_reads(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "pretrain", "check", str(write_config(tmp_path))]
    done = subprocess.run(
        command, stdout=writing, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment(), timeout=240
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")
