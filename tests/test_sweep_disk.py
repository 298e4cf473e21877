"""A sweep whose disk is full or away for a while: no job is lost, and one line names the file."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import main
from pretrain.processes.exit_codes import BAD_INPUT, DONE, FAILED
from pretrain.run.folder import RunFolder
from pretrain.sweep import format_status, load_sweep, plan_jobs, run_sweep, runner
from tests.test_sweep import finish, write_sweep

SEEDS: dict[str, Any] = {"seed": {str(seed): {"run.seed": seed} for seed in range(4)}}
Fails = Callable[[Path, int], bool]


class Disk:
    """Instead of the writing of a sweep's own files: some fail, as on a full disk. The error does not name them."""

    def __init__(self, fails: Fails) -> None:
        self.fails, self.tries = fails, dict[str, int]()
        self._write = runner.replace_text

    def replace_text(self, path: Path, text: str) -> None:
        kind = path.suffix
        self.tries[kind] = self.tries.get(kind, 0) + 1
        if self.fails(path, self.tries[kind]):
            raise OSError(errno.ENOSPC, "No space left on device")
        self._write(path, text)


class Process:
    """A training that is over at once; it fails in the run with seed 3."""

    def __init__(self, command: list[str], **_: Any) -> None:
        config = Path(command[-1])
        self.returncode = FAILED if "seed: 3" in config.read_text().split("data:")[0] else DONE
        if self.returncode == DONE:
            finish(RunFolder(config.parents[3] / config.stem), 1.0)

    def poll(self) -> int:
        return self.returncode


@pytest.fixture
def sweep_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Fails], tuple[int, Path]]:
    """Runs a sweep of four jobs, whose own files fail to be written as told; returns its exit code and its file."""

    def run(fails: Fails, axes: dict[str, Any] = SEEDS) -> tuple[int, Path]:
        disk = Disk(fails)
        monkeypatch.setattr(runner.subprocess, "Popen", Process)
        monkeypatch.setattr(runner, "POLL_SECONDS", 0)
        monkeypatch.setattr(runner, "LOCKED_POLL_SECONDS", 0)
        monkeypatch.setattr(runner, "replace_text", disk.replace_text)
        monkeypatch.setattr("pretrain.sweep.jobs.replace_text", disk.replace_text)
        path = write_sweep(tmp_path, axes=axes)
        return run_sweep(load_sweep(path), 2), path

    return run


def is_plan(path: Path) -> bool:
    return path.name == "sweep.json"


def test_a_plan_that_cannot_be_written_for_a_while_ends_nothing(
    sweep_on: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, path = sweep_on(
        lambda file, tries: is_plan(file) and tries in (2, 3),
        {"seed": {str(seed): {"run.seed": seed} for seed in (0, 1, 2, 4)}},
    )
    assert code == DONE
    out = capsys.readouterr().out
    assert out.count("sweep.json: cannot be written: No space left on device; trying again") == 1
    plan = json.loads((path.parent / "runs/sweeps/tiny/sweep.json").read_text())
    assert len(plan["jobs"]) == 4


def test_a_plan_that_stays_unwritten_is_an_error_after_every_job_was_run(
    sweep_on: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, path = sweep_on(lambda file, tries: is_plan(file) and tries > 1)
    assert code == FAILED
    streams = capsys.readouterr()
    assert streams.err.startswith(f"error: {path.parent}/runs/sweeps/tiny/sweep.json: cannot be written")
    assert streams.err.count("\n") == 1
    assert "3 of 4 jobs done, 1 failed" in streams.out


def test_a_plan_that_cannot_be_written_at_the_start_starts_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_sweep(tmp_path, axes=SEEDS)
    (tmp_path / "runs").write_text("in the way")
    assert main(["sweep", str(path)]) == BAD_INPUT
    error = capsys.readouterr().err
    assert error == f"error: {tmp_path}/runs/sweeps/tiny/sweep.json: cannot be written: Not a directory\n"


def test_exit_codes_that_cannot_be_written_are_written_later(sweep_on: Callable[..., tuple[int, Path]]) -> None:
    code, path = sweep_on(lambda file, tries: file.suffix == ".exit" and tries <= 3)
    assert code == FAILED  # seed 3
    sweep = load_sweep(path)
    names = [job.run.path.name for job in plan_jobs(sweep)]
    written = [(path.parent / f"runs/sweeps/tiny/jobs/{name}.exit").read_text() for name in names]
    assert written == ["0\n", "0\n", "0\n", "1\n"]
    assert "failed (exit 1)" in format_status(sweep)[4]


def test_a_job_that_cannot_be_started_is_started_later(
    sweep_on: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    """While other jobs run, and for a number of looks after them."""
    assert sweep_on(lambda file, tries: file.suffix == ".yaml" and 2 <= tries < 9)[0] == FAILED
    streams = capsys.readouterr()
    assert "3 of 4 jobs done, 1 failed" in streams.out
    assert streams.out.count("warning: seed 1 cannot be started: ") == 1
    assert streams.out.count("warning: ") == 1
    assert streams.err == ""


def test_a_sweep_that_can_start_nothing_more_ends_and_names_the_file(
    sweep_on: Callable[..., tuple[int, Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    code, path = sweep_on(lambda file, tries: file.suffix == ".yaml" and tries > 1)
    assert code == FAILED
    streams = capsys.readouterr()
    assert "1 of 4 jobs done" in streams.out
    second = plan_jobs(load_sweep(path))[1].run.path.name
    file = f"{path.parent}/runs/sweeps/tiny/jobs/{second}.yaml"
    assert streams.err.startswith(f"error: seed 1 cannot be started: {file}: No space left on device")
    assert streams.err.count("\n") == 1


def test_a_log_that_is_gone_hides_no_failure(tmp_path: Path) -> None:
    assert "No such file" in runner._last_error(tmp_path / "gone.log")
