"""Sweeps: the file, the jobs that follow, and a run that may be killed at any time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pretrain.checkpoint.store import CheckpointReader, list_checkpoints
from pretrain.cli import main
from pretrain.config import ConfigError
from pretrain.processes.exit_codes import BAD_INPUT, DONE, FAILED, STOPPED
from pretrain.processes.signals import PASSED_ON, StopRequests
from pretrain.run.folder import RunError, RunFolder
from pretrain.run.json_lines import JsonLines
from pretrain.sweep import format_status, load_sweep, plan_jobs, run_job, run_sweep, runner
from tests.conftest import REPOSITORY, SMALL_VOCABULARY, TINY, merged

AXES: dict[str, Any] = {
    "optimizer": {
        "muon": {"optimizer.name": "muon"},
        "adamw": {"optimizer": {"name": "adamw"}, "optimizer.adamw.lr": {"one_of": [1e-3, 3e-3]}},
    },
    "seed": {1: {"run.seed": 1}, 2: {"run.seed": 2}},
}
# Four jobs: three trials, and one that waits for the best of them.
ONE_OPTIMIZER: dict[str, Any] = {
    "optimizer": {"adamw": {"optimizer": {"name": "adamw"}, "optimizer.adamw.lr": {"one_of": [1e-3, 2e-3, 3e-3]}}},
    "seed": AXES["seed"],
}


def write_sweep(folder: Path, **changes: Any) -> Path:
    """A sweep over a config of 6 steps; keyword arguments are keys of the sweep file."""
    steps = {"train.total_tokens": 6 * 768, "schedule.warmup_tokens": 0, "checkpoint.save_every_steps": 2}
    (folder / "base.yaml").write_text(yaml.safe_dump(merged(TINY, SMALL_VOCABULARY | steps)))
    data = {"name": "tiny", "base": "base.yaml", "root": str(folder / "runs"), "axes": AXES} | changes
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


@pytest.fixture
def sweep_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a sweep into tmp_path, see `write_sweep`."""
    return partial(write_sweep, tmp_path)


def finish(run: RunFolder, loss: float) -> None:
    """Make a run folder look complete with this validation loss."""
    run.path.mkdir(parents=True, exist_ok=True)
    run.manifest_path.write_text(json.dumps({"finished": {"step": 6}}))
    run.metrics.append({"step": 6, "validation_loss": loss})


def test_the_jobs_are_the_product_of_the_axes_and_values_are_tuned_with_the_first_seed(
    sweep_file: Callable[..., Path],
) -> None:
    sweep = load_sweep(sweep_file())
    jobs = plan_jobs(sweep)
    assert [str(job) for job in jobs] == [
        "optimizer adamw, seed 1, optimizer.adamw.lr=0.001",
        "optimizer adamw, seed 1, optimizer.adamw.lr=0.003",
        "optimizer muon, seed 1",
        "optimizer muon, seed 2",
        "optimizer adamw, seed 2",
    ]
    assert [job.is_trial for job in jobs] == [True, True, False, False, False]
    assert [job.chosen for job in jobs] == [False, False, True, True, True]
    assert jobs[4].config is None
    assert [job.config.run.seed for job in jobs[:4] if job.config] == [1, 1, 1, 2]
    assert len({job.config.run.name for job in jobs[:4] if job.config}) == 4

    finish(jobs[0].run, 4.0)
    assert plan_jobs(sweep)[4].config is None  # one trial is not complete
    finish(jobs[1].run, 3.0)
    jobs = plan_jobs(sweep)
    assert [job.chosen for job in jobs] == [False, True, True, True, True]
    assert jobs[4].config is not None
    assert (jobs[4].config.optimizer.adamw.lr, jobs[4].config.run.seed) == (3e-3, 2)


def test_a_diverged_trial_is_not_chosen(sweep_file: Callable[..., Path]) -> None:
    sweep = load_sweep(sweep_file())
    jobs = plan_jobs(sweep)
    finish(jobs[0].run, 4.0)
    jobs[1].run.path.mkdir(parents=True)
    jobs[1].run.manifest_path.write_text(json.dumps({"finished": {"step": 6}}))
    jobs[1].run.metrics.append({"step": 6, "validation_loss": float("nan")})
    assert [job.chosen for job in plan_jobs(sweep)[:2]] == [True, False]


def test_equal_runs_of_two_sweeps_are_one(sweep_file: Callable[..., Path]) -> None:
    first = plan_jobs(load_sweep(sweep_file()))
    only_muon = {"optimizer": {"muon": AXES["optimizer"]["muon"]}, "seed": {2: {"run.seed": 2}, 3: {"run.seed": 3}}}
    second = plan_jobs(load_sweep(sweep_file(name="other", axes=only_muon)))
    assert second[0].run.path == first[3].run.path
    assert second[1].run.path not in [job.run.path for job in first if job.config]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {}}, "axes"),
        ({"axes": {"seed": {}}}, "axes.seed: expected at least one label"),
        ({"nmae": "x"}, "unknown key"),
        ({"name": "a/b"}, "expected 1 to 64"),
        ({"base": "missing.yaml"}, "no such config file"),
        ({"baseline": {"optimizer": "aurora"}}, "baseline.optimizer: 'aurora' is not a label of an axis"),
        ({"seed_axis": "seeds"}, "'seeds' is not an axis"),
        ({"overrides": {"model.hiden_size": 3}}, "model.hiden_size: unknown key; did you mean hidden_size? (in every"),
        ({"axes": {"seed": {1: {"run.name": "x"}}}}, "run.name: cannot be set in a sweep"),
        ({"axes": {"a": {1: {"optimizer": {"name": "muon"}}}, "b": {1: {"optimizer.lr": 0.1}}}}, "axes.a and axes.b"),
        ({"axes": {"lr": {"bad": {"optimizer.lr": -1}, "good": {"optimizer.lr": 1}}}}, "(in the job lr bad)"),
        ({"claims": [{"claim": "x"}]}, "claims.0"),
    ],
)
def test_bad_sweeps_are_refused_with_the_problem(
    sweep_file: Callable[..., Path], changes: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sweep_file(**changes)
    for command in (["sweep", str(path)], ["check", str(path)]):
        assert main(command) == BAD_INPUT
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
        assert all(line.startswith("error: ") for line in error.splitlines())


def test_every_problem_is_reported_once(sweep_file: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_sweep(sweep_file(overrides={"model.num_heads": 5, "train.grad_clip": -1}))
    assert len(caught.value.problems) == 2


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep that was run to its end without a stop."""
    path = write_sweep(tmp_path_factory.mktemp("complete"), axes=ONE_OPTIMIZER)
    assert main(["sweep", str(path), "--jobs", "2"]) == DONE
    return path


def test_a_sweep_runs_to_its_end_and_is_not_run_again(complete: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = complete
    jobs = plan_jobs(load_sweep(path))
    assert all(job.run.finished for job in jobs)
    before = [(job.run.path / "metrics.jsonl").stat().st_mtime_ns for job in jobs]
    assert main(["sweep", str(path)]) == DONE
    assert [(job.run.path / "metrics.jsonl").stat().st_mtime_ns for job in jobs] == before
    assert "4 of 4 jobs done" in capfd.readouterr().out
    assert main(["sweep", "status", str(path)]) == DONE
    assert capfd.readouterr().out.count("done") == 5
    plan = json.loads((path.parent / "runs/sweeps/tiny/sweep.json").read_text())
    assert [job["chosen"] for job in plan["jobs"]].count(False) == 2
    assert main(["report", str(path)]) == DONE
    assert (path.parent / "runs/sweeps/tiny/report.html").exists()


def weights(sweep_path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The last weights of every job."""
    jobs = plan_jobs(load_sweep(sweep_path))
    return {str(job): CheckpointReader(list_checkpoints(job.run.checkpoints)[-1]).weights() for job in jobs}


def start(path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "pretrain", "sweep", str(path), "--jobs", "2"], cwd=REPOSITORY)


def wait_for_steps(path: Path, steps: int) -> None:
    """Until the runs have taken so many steps together."""
    runs = path.parent / "runs"
    for _ in range(6000):
        if sum(len(JsonLines(file).read()) for file in runs.glob("*/metrics.jsonl")) >= steps:
            return
        time.sleep(0.1)
    raise AssertionError("the sweep does not get on")


@pytest.mark.long
def test_killing_a_sweep_twice_changes_nothing(complete: Path, sweep_file: Callable[..., Path]) -> None:
    """Once by SIGKILL, which leaves the training processes to themselves, once by a request to stop."""
    expected = weights(complete)
    # The second stop comes when two trials are done and the third has begun.
    path = sweep_file(axes=ONE_OPTIMIZER)
    for number, steps, code in ((signal.SIGKILL, 3, -signal.SIGKILL), (signal.SIGTERM, 13, STOPPED)):
        process = start(path)
        wait_for_steps(path, steps)
        os.kill(process.pid, number)
        assert process.wait(timeout=120) == code
    assert start(path).wait(timeout=240) == DONE
    found = weights(path)
    assert found.keys() == expected.keys()
    for job, by_name in expected.items():
        assert all(torch.equal(found[job][name], value) for name, value in by_name.items()), job
    for job in plan_jobs(load_sweep(path)):
        assert [record["step"] for record in job.run.metrics.read()] == [1, 2, 3, 4, 5, 6]


def test_a_sweep_does_not_ask_its_runs_a_second_time_and_ends_them_at_the_second_request(tmp_path: Path) -> None:
    """They have the signal from Slurm already, and another of those would end them without a checkpoint."""
    sent: list[int] = []

    class Process:
        send_signal = staticmethod(sent.append)

    sweep = runner._Runner.__new__(runner._Runner)
    sweep.requests = StopRequests()
    sweep.running = [runner._Running(None, Process(), tmp_path, 0.0)]  # type: ignore[arg-type]
    for expected in ([PASSED_ON], [PASSED_ON, signal.SIGKILL]):
        sweep.requests.add("SIGUSR1")
        sweep.pass_on_requests()
        sweep.pass_on_requests()
        assert sent == expected


def test_a_failed_job_is_named_and_the_others_are_run(
    sweep_file: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    axes = {"seed": {1: {"run.seed": 1}, 2: {"run.seed": 2}}}
    sweep = load_sweep(sweep_file(axes=axes))
    first, second = plan_jobs(sweep)
    first.run.path.mkdir(parents=True)
    first.run.manifest_path.write_text("{ damaged")
    assert run_sweep(sweep, 2) == FAILED
    assert second.run.finished
    out = capfd.readouterr().out
    assert "FAILED   seed 1: error: " in out
    assert "manifest.json" in out
    assert "1 of 2 jobs done, 1 failed" in out
    assert any("failed (exit 2)" in line for line in format_status(sweep))


def test_a_job_array_runs_one_job_and_says_what_must_come_first(sweep_file: Callable[..., Path]) -> None:
    sweep = load_sweep(sweep_file())
    with pytest.raises(RunError, match="waits for jobs 0 to 1"):
        run_job(sweep, 4)
    with pytest.raises(RunError, match="0 to 4"):
        run_job(sweep, 5)
    assert run_job(sweep, 2) == DONE
    assert [job.config is not None and job.run.finished for job in plan_jobs(sweep)] == [
        False,
        False,
        True,
        False,
        False,
    ]


def test_every_job_has_a_gpu_or_a_thread_of_its_own(
    sweep_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    environments = []

    class Process:
        def __init__(self, command: list[str], env: dict[str, str], **_: Any) -> None:
            environments.append({key: env.get(key) for key in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")})
            self.returncode = DONE
            run = RunFolder(Path(command[-1]).parents[3] / Path(command[-1]).stem)
            finish(run, 1.0)

        def poll(self) -> int:
            return self.returncode

    monkeypatch.setattr(runner.subprocess, "Popen", Process)
    monkeypatch.setattr(runner, "POLL_SECONDS", 0)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    axes = {"seed": {seed: {"run.seed": seed} for seed in range(4)}}
    for visible, expected in ((None, ["0", "1"]), ("3,GPU-7", ["3", "GPU-7"])):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        environments.clear()
        assert run_sweep(load_sweep(sweep_file(name=f"gpus-{expected[0]}", axes=axes))) == DONE
        assert [env["CUDA_VISIBLE_DEVICES"] for env in environments] == [*expected, *expected]
        shutil.rmtree(sweep_file().parent / "runs")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    environments.clear()
    assert run_sweep(load_sweep(sweep_file(axes=axes)), 4) == DONE
    assert [env["OMP_NUM_THREADS"] for env in environments] == ["1"] * 4


def test_a_check_says_what_two_seeds_cannot_decide(
    sweep_file: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    claim = {"claim": "x", "measure": "validation_loss", "where": {"optimizer": "muon"}, "below": 1}
    for claims in ([], [claim]):
        assert main(["check", str(sweep_file(claims=claims))]) == DONE
        assert ("every claim will be undecided: the axis seed has 2 labels" in capsys.readouterr().out) == bool(claims)


def test_shipped_sweeps_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    paths = sorted(path for path in Path("configs/experiments").glob("*.yaml") if path.name != "small.yaml")
    assert len(paths) >= 7
    for path in paths:
        assert main(["check", str(path)]) == DONE
