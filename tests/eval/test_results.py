"""Result files are checked when they are read, and not lost when another is written."""

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from eval.errors import EvalError
from eval.results import check_out, check_same_model, marks_of, read_result
from eval.suites import TaskChoice
from pretrain.cli import main
from tests.eval.results import a_result, write

Change = Callable[[dict[str, Any]], None]
GROUP = {"num_items": 3, "acc": 0.5, "acc_stderr": None}
SUBSET = {"num_items": 2, "acc": 0.5, "acc_stderr": 0.5, "origin": "file", "sha256": "0", "num_items_in_split": 2}
OUTCOMES = {"hellaswag": [1, 0, 1], "winogrande": [0, 1, 1]}


def test_a_result_is_read_from_its_file_or_folder(tmp_path: Path) -> None:
    result = a_result(OUTCOMES)
    folder = write(tmp_path / "out", result)
    assert read_result(folder) == read_result(folder / "results.json") == result


def test_keys_of_later_versions_are_ignored(tmp_path: Path) -> None:
    result = a_result(OUTCOMES, later="key")
    assert read_result(write(tmp_path, result)) == result


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not the result of an evaluation"),
        ("[" * 100_000, "is not the result of an evaluation"),
        ("[]", "schema_version is None, expected 1"),
        ('{"schema_version": 2}', "schema_version is 2, expected 1"),
        ('{"schema_version": true}', "schema_version is True"),
        ('{"schema_version": 1}', "model is missing"),
    ],
)
def test_what_is_not_a_result_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(EvalError, match=message):
        read_result(write(tmp_path, text))


def test_a_missing_result_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match=r"no result of an evaluation at .*nowhere; `aurora eval --out`"):
        read_result(tmp_path / "nowhere")
    with pytest.raises(EvalError, match="File name too long"):
        read_result(tmp_path / ("n" * 300))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(num_fewshot="0"), "num_fewshot is '0', expected int"),
        (lambda r: r.update(num_fewshot=True), "num_fewshot is True, expected int"),
        (lambda r: r.update(limit=1.5), "limit is 1.5, expected int | None"),
        (lambda r: r.update(selection="last"), "selection is 'last', expected one of 'first', 'spread'"),
        (lambda r: r["model"].pop("name"), "model.name is missing"),
        (lambda r: r.update(tasks=[]), "tasks is [], expected a mapping"),
        (lambda r: r["tasks"].update(piqa=None), "tasks.piqa is null, expected a mapping"),
        (lambda r: r["tasks"]["hellaswag"]["items"][1].update(acc="1"), "tasks.hellaswag.items.1.acc is '1', expected"),
        (lambda r: r["tasks"]["hellaswag"]["items"][1].update(acc_norm=2), "acc_norm is not 0 or 1 for every item"),
        (lambda r: r["tasks"]["hellaswag"]["items"][1].pop("acc_norm"), "acc_norm is not 0 or 1 for every item"),
        (lambda r: r["tasks"]["hellaswag"].update(acc=float("nan")), "tasks.hellaswag.acc is nan, expected a finite"),
        (lambda r: r["tasks"]["hellaswag"].update(acc=0.5), "acc is 0.5, which is not the mean of its items"),
        (lambda r: r["tasks"]["winogrande"]["items"].pop(), "num_items is 3, but it has 2 items"),
        (lambda r: r["tasks"]["winogrande"].update(items=[]), "it has no items"),
        (lambda r: r["tasks"]["winogrande"].update(metric="acc_norm"), "metric is acc_norm, but it has no acc_norm"),
        (lambda r: r["tasks"]["winogrande"]["items"][0].update(doc_id=2), "several items have the same doc_id"),
        (
            lambda r: r["tasks"]["winogrande"].update(subsets={"gold": SUBSET | {"doc_ids": [0, 7]}}),
            "tasks.winogrande: subsets.gold: its doc_ids are not 2 of the items",
        ),
        (
            lambda r: r["tasks"]["winogrande"].update(subsets={"gold": SUBSET | {"doc_ids": [1]}}),
            "tasks.winogrande: subsets.gold: its doc_ids are not 2 of the items",
        ),
        (lambda r: r["tasks"]["winogrande"]["items"][0].update(doc_id=3), "is not one of a split of 3 items"),
        (lambda r: r["tasks"]["winogrande"]["items"][0].update(doc_id=-1), "is not one of a split of 3 items"),
        (
            lambda r: r["tasks"]["winogrande"]["items"][0].update(greedy=[True], log_likelihoods=[-1, -2]),
            "an item has not as many log_likelihoods as greedy",
        ),
        (lambda r: r["tasks"]["winogrande"]["items"][0].update(source="x"), "some items have a source"),
        (lambda r: r.update(groups={"g": {**GROUP, "tasks": ["none"]}}), "groups.g.tasks: not in the result: none"),
        (lambda r: r.update(groups={"g": {**GROUP, "tasks": []}}), "groups.g: it has no tasks"),
        (
            lambda r: r.update(groups={"g": {**GROUP, "acc": 0.9, "tasks": ["winogrande"]}}),
            "groups.g: acc is 0.9, but those of its tasks are 0.66",
        ),
        (
            lambda r: r.update(groups={"g": {**GROUP, "tasks": ["winogrande", "hellaswag"]}}),
            "groups.g: num_items is 3, but its tasks have 6 items",
        ),
        (lambda r: r["tasks"]["winogrande"].update(num_items_in_split=2), "num_items_in_split is 2, but it has 3"),
        (lambda r: r.update(seconds=10**400), "seconds is 1000000000000000000000000000000000000000..., expected a fin"),
        (lambda r: r["model"].update(parameters=10**400), "expected a whole number of at most 18 digits"),
        (
            lambda r: r["tasks"]["winogrande"]["items"][0].update(log_likelihoods=[-1, float("inf")]),
            "log_likelihoods.1 is inf, expected a finite",
        ),
    ],
)
def test_a_malformed_result_is_refused_by_key(tmp_path: Path, change: Change, message: str) -> None:
    result = copy.deepcopy(a_result(OUTCOMES))
    change(result)
    with pytest.raises(EvalError) as caught:
        read_result(write(tmp_path, result))
    assert message in str(caught.value)
    assert str(tmp_path / "results.json") in str(caught.value)


def test_a_file_full_of_problems_shows_ten(tmp_path: Path) -> None:
    result = a_result({"winogrande": [0, 1] * 50})
    for item in result["tasks"]["winogrande"]["items"]:
        del item["doc_hash"]
    with pytest.raises(EvalError) as caught:
        read_result(write(tmp_path, result))
    assert len(str(caught.value).splitlines()) == 10


# --- earlier results ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "tasks", "limit", "selection", "message"),
    [
        ("/models/other", ["winogrande", "hellaswag"], None, "first", "it is of the model /models/model"),
        ("/models/model", ["winogrande"], None, "first", "it also has hellaswag"),
        ("/models/model", ["winogrande", "hellaswag"], 2, "first", "it is of 3 items a task, the new one of 2"),
        ("/models/model", ["winogrande", "hellaswag"], 3, "spread", "its items were selected by 'first'"),
    ],
)
def test_an_earlier_result_is_not_lost(
    tmp_path: Path, model: str, tasks: list[str], limit: int | None, selection: str, message: str
) -> None:
    folder = write(tmp_path, a_result(OUTCOMES, limit=3))
    with pytest.raises(EvalError, match=f"{message}; choose another --out or pass --overwrite"):
        check_out(folder, model, tasks, limit, selection)


def test_a_result_that_covers_the_earlier_one_may_replace_it(tmp_path: Path) -> None:
    folder = write(tmp_path, a_result(OUTCOMES, limit=3))
    for limit in (3, 4, None):
        check_out(folder, "/models/model", ["piqa", "winogrande", "hellaswag"], limit, "first")
    check_out(folder, "/models/model", ["winogrande", "hellaswag"], None, "spread")
    check_out(tmp_path / "new" / "folder", "/models/other", ["piqa"], 1, "first")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("limit", [None, 1_000_000])
def test_a_limit_beyond_the_last_item_is_none(tmp_path: Path, limit: int | None) -> None:
    folder = write(tmp_path, a_result({"winogrande": [0, 1, 1], "piqa": [1]}, limit=limit))
    for new in (3, 1_000, None):
        check_out(folder, "/models/model", ["winogrande", "piqa"], new, "first")
    with pytest.raises(EvalError, match=f"of {'3' if limit else 'all'} items a task, the new one of 2;"):
        check_out(folder, "/models/model", ["winogrande", "piqa"], 2, "first")


def test_items_of_another_source_and_marks_are_not_lost(tmp_path: Path) -> None:
    result = a_result(OUTCOMES)
    part = {"num_items": 0, "acc": None, "acc_stderr": None}
    subset = {"origin": "file", "sha256": "0", "num_items_in_split": 1, "doc_ids": [], **part}
    overlap = {"report_sha256": "0", "ngram": 13, "complete": True, "text_bytes": 1, "too_short_in_split": 0}
    result["tasks"]["hellaswag"] |= {"subsets": {"golden": subset}}
    result["tasks"]["winogrande"] |= {"overlap": {**overlap, "overlapping": part, "without": part}}
    folder, asked = write(tmp_path, result), ("/models/model", ["winogrande", "hellaswag"], None, "first")
    marks = marks_of(read_result(folder))
    check_out(folder, *asked, items="packaged", marks=marks, source="folder")
    with pytest.raises(EvalError, match="would be lost: its items are the packaged ones; choose"):
        check_out(folder, *asked, items="hub", marks=marks)
    with pytest.raises(EvalError, match="would be lost: it has marks of overlap; it has the subset golden; choose"):
        check_out(folder, *asked, items="packaged", marks=[])
    with pytest.raises(EvalError, match="it is of the model /models/model"):
        check_out(folder, *asked, source="hub")


def test_a_model_is_the_same_however_its_path_is_spelled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = a_result(OUTCOMES)
    result["model"]["name"] = "runs/x"
    folder = write(tmp_path / "out", result)
    for name in ("runs/x", "runs/x/", "./runs/x", str(tmp_path / "runs" / "x")):
        check_out(folder, name, ["winogrande", "hellaswag"], None, "first", source="folder")
    with pytest.raises(EvalError, match="it is of the model runs/x"):
        check_out(folder, "runs/y", ["winogrande", "hellaswag"], None, "first")


def of_step(step: int, **changes: Any) -> dict[str, Any]:
    found = {"run_name": "x", "step": step, "tokens": step, "checkpoint_sha256": f"of {step}"} | changes
    return {"provenance": {key: value for key, value in found.items() if value is not None}}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({"revision": "a" * 40}, {"revision": "b" * 40}, "it is of the revision aaaaaaaaaaaa, the new one of bbbbbbbb"),
        ({"revision": "a" * 40, "sha256": "1"}, {"revision": "a" * 40, "sha256": "2"}, None),
        (of_step(1000), of_step(2000), "it is of step 1,000, the new one of step 2,000"),
        (of_step(10, checkpoint_sha256=None), of_step(20), "it is of step 10, the new one of step 20"),
        (of_step(10), of_step(10, checkpoint_sha256="x"), "it is of another checkpoint of step 10"),
        (of_step(10) | {"sha256": "1"}, of_step(10) | {"sha256": "2"}, None),  # exported by another version
        ({"sha256": "1"}, {"sha256": "2"}, "it is of other weights"),
        ({}, {"sha256": "2", "dtype": "float32"}, None),  # of an earlier version
        ({}, {"dtype": "bfloat16"}, "it is in float32, the new one in bfloat16"),
        ({"dtype": "float16"}, {"dtype": "float32"}, "it is in float16, the new one in float32"),
    ],
)
def test_a_result_of_other_weights_is_not_lost(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], message: str | None
) -> None:
    result = a_result(OUTCOMES)
    result["model"] |= before
    folder, model = write(tmp_path, result), result["model"] | after
    if message is None:
        check_same_model(folder, model)
        return
    with pytest.raises(EvalError, match=f"would be lost: {message}.*; choose another --out or pass --overwrite"):
        check_same_model(folder, model)
    check_same_model(tmp_path / "nowhere", model)


def test_the_command_refuses_before_it_scores(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []

    class Prepared:
        def run(self, model: str, **_: Any) -> Any:
            asked.append(model)
            return a_result({"winogrande": [1]})

    @contextmanager
    def evaluation(tasks: list[TaskChoice], **_: Any) -> Iterator[Prepared]:
        asked.append([task.name for task in tasks])
        yield Prepared()

    monkeypatch.setattr("pretrain.cli.evaluation_run.evaluation", evaluation)
    folder = write(tmp_path / "out", a_result(OUTCOMES))
    before = read_result(folder)
    command = ["eval", str(model_folder), "--tasks", "winogrande,", "--out", str(folder)]
    assert main(command) == 2
    assert "pass --overwrite" in capsys.readouterr().err
    assert (asked, read_result(folder)) == ([], before)
    assert main([*command, "--overwrite"]) == 0
    assert asked == [["winogrande"], str(model_folder)]
    assert read_result(folder) == a_result({"winogrande": [1]})


def test_an_unreadable_file_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="cannot be read as a result"):
        check_out(write(tmp_path, "notes"), "m", ["piqa"], None, "first")


def test_a_folder_that_cannot_be_written_is_refused_before_scoring(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps({}))
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(EvalError, match="is not a folder that you may write to"):
            check_out(folder, "m", ["piqa"], None, "first")
