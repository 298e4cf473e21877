"""What asks a run to stop besides signals: a file in its folder, its time, a later attempt of its Slurm job."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from pretrain.config import Config
from pretrain.launch import train
from pretrain.launch.time_budget import TimeBudget, time_budget
from pretrain.processes.signals import StopRequests
from pretrain.run import lock
from pretrain.run.folder import RunFolder
from pretrain.training.trainer import Trainer

MakeConfig = Callable[..., Config]
SHORT = {"train.total_tokens": 5 * 768, "schedule.warmup_tokens": 0, "data.validation_fraction": 0}


def steps_of(config: Config) -> list[int]:
    return [record["step"] for record in RunFolder(config.run_folder).metrics.read()]


def saved_steps(config: Config) -> list[str]:
    return sorted(path.name for path in (config.run_folder / "checkpoints").glob("step-*"))


def after_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], object]) -> None:
    """Do something once, in the middle of the step that follows `step`."""
    original = Trainer.forward_backward

    def forward_backward(self: Trainer, *arguments: Any) -> Any:
        if self.state.step == step:
            act()
        return original(self, *arguments)

    monkeypatch.setattr(Trainer, "forward_backward", forward_backward)


def test_a_stop_file_stops_one_launch(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(SHORT)
    stop = config.run_folder / "STOP"
    after_step(monkeypatch, 1, stop.touch)
    assert train(config) == 75
    assert steps_of(config)[-1] in (2, 3)  # the step that had begun, or the one that follows it
    assert saved_steps(config) == [f"step-{steps_of(config)[-1]:08}"]
    assert not stop.exists()
    stopped = RunFolder(config.run_folder).manifest()["stopped"]  # type: ignore[index]
    assert stopped["step"] == steps_of(config)[-1]
    assert str(stop) in stopped["reason"]
    monkeypatch.undo()
    assert train(config) == 0
    assert steps_of(config) == [1, 2, 3, 4, 5]
    assert "stopped" not in RunFolder(config.run_folder).manifest()  # type: ignore[operator]


def test_a_request_from_before_the_first_step_is_followed(tiny_config: MakeConfig) -> None:
    """A signal during the start, or a STOP file for a job that waits in the queue."""
    config = tiny_config(SHORT)
    assert train(config, stop_at=1) == 75
    (config.run_folder / "STOP").touch()
    assert train(config) == 75
    assert not (config.run_folder / "STOP").exists()
    asked = StopRequests()
    asked.add("SIGTERM")
    assert train(config, requests=asked) == 75
    assert steps_of(config) == [1]
    assert train(config, stop_at=2) == 75
    assert steps_of(config) == [1, 2]


def test_a_later_attempt_of_the_job_stops_this_one_with_a_checkpoint(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(SHORT)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    later = lock.RunLock(config.run_folder).own
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    claim = config.run_folder / lock.CLAIM_FILE
    after_step(monkeypatch, 1, lambda: claim.write_text(json.dumps(later)))
    assert train(config) == 75
    assert len(saved_steps(config)) == 1


def test_a_launch_that_was_replaced_ends_and_saves_nothing(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(SHORT)
    other = lock.RunLock(config.run_folder)

    def replace() -> None:
        other.path.unlink()
        other.acquire()

    after_step(monkeypatch, 1, replace)
    with pytest.raises(lock.RunError, match="has taken over this run folder"):
        train(config)
    assert steps_of(config) in ([], [1])  # the first step's record may have been read late
    assert saved_steps(config) == []
    other.check()


class Clock:
    """A clock that is turned by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def run_until_spent(budget: TimeBudget, clock: Clock, steps: Callable[[int], float], save: float) -> tuple[int, float]:
    """Take steps until the budget is spent, then save; how many, and when everything has ended."""
    budget.step_ended()
    taken = 0
    while not budget.is_spent():
        clock.now += steps(taken)
        taken += 1
        budget.step_ended()
        if taken % 20 == 0:
            with budget.saving():
                clock.now += save
    with budget.saving():
        clock.now += save
    return taken, clock.now


@pytest.mark.parametrize("save", [0.01, 7.0, 60.0])
@pytest.mark.parametrize("step", [0.2, 3.0, 20.0])
def test_the_budget_is_used_and_kept(step: float, save: float) -> None:
    clock = Clock()
    budget = TimeBudget(ends_at=clock.now + 2000, save_seconds=save, close_seconds=2, clock=clock)
    taken, ended = run_until_spent(budget, clock, lambda index: 90.0 if index == 0 else step, save)
    assert ended + 2 <= 3000
    assert ended > 3000 - 3 * step - 1.5 * save - 2 - 1e-6, "the compiled first step still counts"
    assert taken > 10


def test_a_validation_that_may_come_fits() -> None:
    clock = Clock()
    budget = TimeBudget(ends_at=clock.now + 2000, save_seconds=1, close_seconds=2, clock=clock)
    _, ended = run_until_spent(budget, clock, lambda index: 100.0 if index % 50 == 49 else 1.0, 5)
    assert ended + 2 <= 3000


def test_a_save_behind_the_steps_counts_in_full_and_the_steps_go_on() -> None:
    clock = Clock()
    budget = TimeBudget(ends_at=clock.now + 1000, clock=clock)
    for _ in range(3):
        budget.step_ended()
        clock.now += 1
    with budget.saving():
        clock.now += 0.5  # the snapshot
    for _ in range(30):
        clock.now += 1
        budget.step_ended()
    budget.save_took(30.5)
    assert budget.save_seconds == 30.5
    assert budget.step_seconds < 2.5


def test_without_a_limit_the_budget_lasts() -> None:
    clock = Clock()
    budget = TimeBudget(clock=clock)
    for _ in range(3):
        budget.step_ended()
        clock.now += 1e9
    assert not budget.is_spent()


@pytest.mark.parametrize(
    ("end", "job", "max_seconds", "left", "reason"),
    [
        (None, None, 100.0, 90.0, "run.max_seconds = 100"),
        (50, "7", 100.0, 50.0, "the time limit of the Slurm job"),
        (500, "7", 100.0, 90.0, "run.max_seconds = 100"),
        (50, "7", None, 50.0, "the time limit of the Slurm job"),
        (50, None, None, float("inf"), ""),  # left over: this is not a job
        (-50, "7", None, float("inf"), ""),
        ("NONE", "7", None, float("inf"), ""),
    ],
)
def test_the_limit_is_the_earlier_of_the_config_and_slurm(
    end: Any, job: str | None, max_seconds: float | None, left: float, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_JOB_END_TIME", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    if end is not None:
        monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + end) if isinstance(end, int) else end)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    warnings: list[str] = []
    budget = time_budget(max_seconds, age=10.0, checkpoint_bytes=400_000_000, warn=warnings.append)
    assert budget.ends_at - time.monotonic() == pytest.approx(left, abs=5)
    assert budget.reason == reason
    assert len(warnings) == (end == -50)
    if reason:
        assert budget.save_seconds == 2.0


def test_a_run_stops_in_time(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock jumps in the second step, so that no third one fits."""
    config = tiny_config({**SHORT, "run.max_seconds": 7200.0})
    clock = Clock()
    clock.now = time.monotonic()
    original = TimeBudget.__init__
    monkeypatch.setattr(TimeBudget, "__init__", lambda self, *given: original(self, *given, clock=clock))
    after_step(monkeypatch, 1, lambda: setattr(clock, "now", clock.now + 3000))
    assert train(config) == 75
    assert steps_of(config)[-1] in (2, 3)
    assert len(saved_steps(config)) == 1
    assert "run.max_seconds" in RunFolder(config.run_folder).manifest()["stopped"]["reason"]  # type: ignore[index]
