"""Evaluations reach the wandb run of the training run, each once, on an axis of their own."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli.log_scores import ScoreLog, values_of
from pretrain.run.reader import read_run
from pretrain.run.wandb_scores import AXIS, ScoreQueue
from pretrain.training.guards import Guards
from pretrain.training.state import TrainState
from tests.counting.test_wandb import SHORT, history, offline_runs, records
from tests.counting.where import configured, train
from tests.eval.results import a_result


def scored(step: int, outcomes: list[int]) -> Any:
    result = a_result({"winogrande": outcomes, "piqa": [1, 0]})
    result["model"]["provenance"] = {"run_name": "tiny", "step": step, "tokens": 100 * step}
    return result


def of_scores(files: list[Path], expected: int) -> list[tuple[int, float]]:
    """The results in offline runs; wandb may still be writing when a run is finished."""
    end = time.monotonic() + 30
    while True:
        lines = [line for file in files for line in history(file) if AXIS in line]
        if len(lines) >= expected or time.monotonic() > end:
            assert all("step" not in line for line in lines)
            return [(line[AXIS], line["eval/winogrande/acc"]) for line in lines]
        time.sleep(0.05)


def test_each_result_is_sent_once_whoever_sends_it(tmp_path: Path) -> None:
    queue, sent = ScoreQueue(tmp_path / "wandb"), []
    assert queue.send(sent.append) == 0
    assert not (tmp_path / "wandb").exists()
    queue.add(2, {"eval/a": 0.5})
    queue.add(4, {"eval/a": 0.75})
    assert queue.send(sent.append) == 2
    assert ScoreQueue(tmp_path / "wandb").send(sent.append) == 0
    with next((tmp_path / "wandb").glob("*.jsonl")).open("a") as file:
        file.write('{"eval/st')  # cut off by a crash
    queue.add(6, {"eval/a": 1.0})
    threads = [threading.Thread(target=ScoreQueue(tmp_path / "wandb").send, args=(sent.append,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sent == [{AXIS: 2, "eval/a": 0.5}, {AXIS: 4, "eval/a": 0.75}, {AXIS: 6, "eval/a": 1.0}]


def test_a_result_that_could_not_be_sent_is_sent_later(tmp_path: Path) -> None:
    queue, sent = ScoreQueue(tmp_path), []
    for step in (2, 4):
        queue.add(step, {})

    def fail_at_4(scores: dict[str, Any]) -> None:
        if scores[AXIS] == 4:
            raise RuntimeError("gone")
        sent.append(scores[AXIS])

    with pytest.raises(RuntimeError):
        queue.send(fail_at_4)
    queue.send(lambda scores: sent.append(scores[AXIS]))
    assert sent == [2, 4]


def test_metrics_and_standard_errors_are_logged_and_counts_are_not() -> None:
    result = scored(2, [1, 0, 1, 1])
    result["groups"] = {"both": {"tasks": ["winogrande", "piqa"], "num_items": 6, "acc": 0.5, "acc_stderr": None}}
    result["bits_per_byte"] = {"sea": {"bits_per_byte": 1.25, "bytes": 80, "tokens": 20, "documents": 1, "context": 8}}
    assert values_of(result) == {
        "eval/both/acc": 0.5,
        "eval/bits_per_byte/sea": 1.25,
        "eval/winogrande/acc": 0.75,
        "eval/winogrande/acc_stderr": 0.01,
        "eval/piqa/acc": 0.0,
        "eval/piqa/acc_stderr": 0.01,
        "eval/piqa/acc_norm": 0.5,
        "eval/piqa/acc_norm_stderr": 0.01,
    }


def test_results_are_logged_while_the_run_trains_and_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training process sends what is evaluated meanwhile; no step and no result is lost or sent twice."""
    config = configured(str(tmp_path), SHORT | {"wandb.mode": "offline", "checkpoint.save_every_steps": 2})
    said: list[str] = []

    def evaluate(self: Guards, state: TrainState) -> None:
        if state.step == 3:  # of step 2, when training is ahead
            ScoreLog(config.run_folder, said.append).add(scored(2, [1, 0]))

    with monkeypatch.context() as patched:
        patched.setattr(Guards, "check", evaluate)
        assert train(config) == 0
    assert said == ["wandb: the process that trains the run sends the result"]
    [file] = offline_runs(config.run_folder)
    assert of_scores([file], 1) == [(2, 0.5)]
    assert [line["step"] for line in history(file) if "loss" in line] == [1, 2, 3, 4]
    axes = {record.metric.name: record.metric.step_metric for record in records(file) if record.HasField("metric")}
    assert axes["eval/winogrande/acc"] == axes["eval/tokens"] == AXIS

    ScoreLog(config.run_folder, said.append).add(scored(4, [1, 1]))
    files = offline_runs(config.run_folder)
    assert len(files) == 2
    assert of_scores(files, 2) == [(2, 0.5), (4, 1.0)]
    ids = {record.run.run_id for file in files for record in records(file) if record.HasField("run")}
    assert ids == {read_run(config.run_folder).manifest["id"]}
    ScoreLog(config.run_folder, said.append).send()
    assert len(offline_runs(config.run_folder)) == 2  # nothing to send: wandb is not started
    assert json.loads((config.run_folder / "wandb" / "aurora-scores-sent.json").read_text()) == {"lines": 2}


class Unreachable:
    """wandb, whose server or process fails at `where`."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.fail("start")

    def fail(self, where: str) -> None:
        if where == self.where:
            raise RuntimeError("server: 500 at https://user:hunter2@example.test/x\nmore")

    def log_scores(self, scores: dict[str, Any]) -> None:
        self.fail("log")

    def close(self) -> None:
        self.fail("close")


@pytest.mark.parametrize("where", ["start", "log", "close"])
def test_an_error_of_wandb_leaves_scores_queued_and_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    config = configured(str(tmp_path), SHORT | {"wandb.mode": "offline"})
    config.run_folder.mkdir(parents=True)
    (config.run_folder / "manifest.json").write_text(json.dumps({"id": "0123"}))
    (config.run_folder / "config.yaml").write_text(config.to_yaml())
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setattr("pretrain.cli.log_scores.WandbTracker", lambda *_: Unreachable(where))
    said: list[str] = []
    ScoreLog(config.run_folder, said.append).add(scored(2, [1, 0]))
    [line] = said
    assert line.startswith("warning: wandb: RuntimeError: server: 500")
    assert "queued" in line
    assert "hunter2" not in line
    sent: list[dict[str, Any]] = []
    ScoreQueue(config.run_folder / "wandb").send(sent.append)
    assert [scores[AXIS] for scores in sent] == ([] if where == "close" else [2])
