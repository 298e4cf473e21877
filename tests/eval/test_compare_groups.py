"""`aurora compare`: groups of tasks, and results that were made with other settings."""

import re
from pathlib import Path
from typing import Any

import pytest

from eval.compare_tables import render
from eval.errors import EvalError
from eval.flips import flipped_items
from eval.item_texts import ItemView
from tests.eval.results import a_group, a_result
from tests.eval.test_compare import compared, outcomes

# --- groups of tasks ----------------------------------------------------------------------------

SUBJECTS = {"mmlu_anatomy": 40, "mmlu_law": 60, "mmlu_virology": 100}


def with_group(name: str, seed: int, **changes: int) -> dict[str, Any]:
    sizes = {"winogrande": 50, **SUBJECTS, **changes}
    sources = {task: [f"{place // 2}" for place in range(size)] for task, size in sizes.items() if task != "winogrande"}
    result = a_result({task: outcomes(size, 0.5, seed) for task, size in sizes.items()}, name, sources)
    result["groups"] = {"mmlu": a_group(result, [*SUBJECTS])}
    return result


def test_a_group_is_one_comparison_over_the_items_of_its_tasks(tmp_path: Path) -> None:
    one, two = with_group("a", 1), with_group("b", 2)
    found = compared(tmp_path, one, two)
    assert [row["task"] for row in found["comparisons"]] == ["winogrande", "mmlu"]
    group = found["comparisons"][1]
    assert group["tasks"] == [*SUBJECTS]
    assert (group["num_items"], group["num_items_in_split"]) == (200, 200)
    assert group["num_sources"] == 100  # sources of one name in two tasks are not one
    members = found["members"]
    assert [row["task"] for row in members] == [*SUBJECTS]
    for key in ("won", "lost"):
        assert group[key] == sum(row[key] for row in members) > 0  # type: ignore[literal-required]
    assert group["difference"] == pytest.approx(sum(row["difference"] * row["num_items"] for row in members) / 200)
    # Two comparisons are corrected together, however many tasks the group has.
    smallest = min(row["difference_p"] for row in found["comparisons"])
    assert min(row["difference_p_corrected"] for row in found["comparisons"]) == min(1.0, 2 * smallest)
    assert found["notes"] == []


def test_tasks_of_a_group_can_be_chosen(tmp_path: Path) -> None:
    one, two = with_group("a", 1), with_group("b", 2)
    found = compared(tmp_path, one, two, tasks=["mmlu_law", "mmlu"])
    assert [row["task"] for row in found["comparisons"]] == ["mmlu_law", "mmlu"]
    with pytest.raises(EvalError, match="did you mean mmlu"):
        compared(tmp_path, one, two, tasks=["mmluu"])


def test_groups_of_different_tasks_are_compared_task_by_task(tmp_path: Path) -> None:
    one, two = with_group("a", 1), with_group("b", 2)
    two["groups"]["mmlu"] = a_group(two, ["mmlu_law"])
    found = compared(tmp_path, one, two)
    assert [row["task"] for row in found["comparisons"]] == ["winogrande", *SUBJECTS]
    assert "members" not in found
    one["groups"]["mmlu"]["tasks"] = []
    with pytest.raises(EvalError, match=r"groups\.mmlu: it has no tasks"):
        compared(tmp_path, two, one)


def test_a_member_that_cannot_be_compared_is_named(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="mmlu_law: a and b are not of the same items") as caught:
        compared(tmp_path, with_group("a", 1), with_group("b", 2, mmlu_law=61))
    assert "\n" not in str(caught.value)


def test_overlap_in_a_task_is_left_out_of_its_group(tmp_path: Path) -> None:
    one, two = with_group("a", 1), with_group("b", 2)
    for item in one["tasks"]["mmlu_law"]["items"][:7]:
        item["overlap"] = True
    [part] = compared(tmp_path, one, two)["parts"]
    assert (part["task"], part["part"], part["num_items"]) == ("mmlu", "without overlap", 193)


@pytest.mark.parametrize("form", ["text", "markdown", "csv", "latex", "json"])
def test_formats_show_groups(tmp_path: Path, form: Any) -> None:
    shown = render(compared(tmp_path, with_group("a", 1), with_group("b", 2)), form)
    assert "mmlu" in shown
    assert ("virology" in shown) == (form in ("csv", "json"))


def test_flipped_items_of_a_group_are_those_of_its_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = with_group("a", 1), with_group("b", 2)
    asked: dict[str, list[int]] = {}

    def show(wanted: dict[str, list[int]], **_: Any) -> dict[str, dict[int, ItemView]]:
        asked.update(wanted)
        return {
            task: {place: ItemView("?", ["x"], frozenset([0]), f"{task}-{place}") for place in places}
            for task, places in wanted.items()
        }

    monkeypatch.setattr("eval.flips.show_items", show)
    flips = flipped_items(compared(tmp_path, one, two, tasks=["mmlu"]), 3)
    assert len(flips) == 6
    assert {flip["task"] for flip in flips} == asked.keys() == SUBJECTS.keys()
    assert all(flip["doc_id"] < SUBJECTS[flip["task"]] for flip in flips)


# --- settings -----------------------------------------------------------------------------------

SETTINGS = {"normalization": "none", "target_delimiter": " ", "fewshot_seed": 1234}


@pytest.mark.parametrize(
    ("changes", "shots", "message"),
    [
        ({"target_delimiter": ""}, 0, "winogrande: a and b differ in the setting target_delimiter: ' ' and ''"),
        ({"normalization": "characters"}, 0, "winogrande: a and b differ in the setting normalization: 'none' and"),
        ({"fewshot_seed": 1}, 5, "winogrande: a and b differ in the setting fewshot_seed: 1234 and 1"),
        ({"fewshot_seed": 1}, 0, None),
    ],
)
def test_results_with_other_settings_are_refused(
    tmp_path: Path, changes: dict[str, Any], shots: int, message: str | None
) -> None:
    one, two = a_result({"winogrande": [0, 1]}, "a"), a_result({"winogrande": [0, 1]}, "b")
    for result, settings in ((one, SETTINGS), (two, SETTINGS | changes)):
        result["tasks"]["winogrande"].update(settings=settings, num_fewshot=shots)
    if message is None:
        compared(tmp_path, one, two)
    else:
        with pytest.raises(EvalError, match=re.escape(message)):
            compared(tmp_path, one, two)
    del two["tasks"]["winogrande"]["settings"]  # of an earlier version
    compared(tmp_path, one, two)


def test_tokens_before_a_text_and_sources_of_items_that_differ_are_noted(tmp_path: Path) -> None:
    one, two, three = (a_result({"winogrande": [0, 1]}, name) for name in "abc")
    one["model"]["bos"], two["model"]["bos"] = "<s>", "none"
    two["items_source"] = {"kind": "hub"}
    assert compared(tmp_path, one, two, three)["notes"] == [
        "the token before each text differs: a <s>, b none, c unknown",
        "the source of the items differs: a made-up-1 (sha256 0), b the Hub, c made-up-1 (sha256 0)",
    ]


def test_subsets_of_one_name_are_of_the_same_items(tmp_path: Path) -> None:
    one, two = a_result({"winogrande": [0, 1, 1]}, "a"), a_result({"winogrande": [0, 1, 0]}, "b")
    for result, digest in ((one, "0"), (two, "1")):
        subset = {"origin": "file", "sha256": digest, "num_items_in_split": 2, "doc_ids": [0, 1], "num_items": 2}
        result["tasks"]["winogrande"]["subsets"] = {"gold": subset | {"acc": 0.5, "acc_stderr": 0.1}}
    with pytest.raises(EvalError, match="winogrande: a and b have different subsets of the name 'gold'"):
        compared(tmp_path, one, two)
    two["tasks"]["winogrande"]["subsets"]["gold"]["sha256"] = "0"
    assert [part["part"] for part in compared(tmp_path, one, two)["parts"]] == ["gold"]
