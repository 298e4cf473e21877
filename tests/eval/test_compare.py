"""`aurora compare`: verdicts, refusals, formats, and examples of flipped items."""

import csv
import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval.compare import DEFAULT_MARGIN, compare
from eval.compare_schema import SCOPE, ComparedModel, Comparison, Flip, TaskComparison
from eval.compare_tables import HEADS, latex_text, markdown_text, render, verdict
from eval.errors import EvalError
from eval.flips import flipped_items
from eval.harness import evaluate
from eval.results import write_result
from pretrain.cli import main
from pretrain.cli.command import build_parser
from tests.eval.conftest import export_model, made_up_items, small_llama
from tests.eval.results import a_result, write
from tests.eval.test_harness import check_against

Change = Callable[[dict[str, Any]], None]


def outcomes(items: int, accuracy: float, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [int(rng.random() < accuracy) for _ in range(items)]


def flipped(values: list[int], won: int, lost: int) -> list[int]:
    """The same with some wrong ones right and some right ones wrong."""
    changed = list(values)
    for place in [place for place, value in enumerate(values) if not value][:won]:
        changed[place] = 1
    for place in [place for place, value in enumerate(values) if value][:lost]:
        changed[place] = 0
    return changed


def compared(tmp_path: Path, *results: dict[str, Any], **options: Any) -> Comparison:
    return compare([write(tmp_path / f"r{place}", result) for place, result in enumerate(results)], **options)


# --- verdicts -----------------------------------------------------------------------------------


def test_a_model_against_itself_is_undecided_on_20_items_and_equivalent_on_all(tmp_path: Path) -> None:
    sizes = {"winogrande": 1267, "piqa": 1838, "arc_easy": 570, "openbookqa": 500, "arc_challenge": 299}
    every = a_result({task: outcomes(size, 0.4) for task, size in sizes.items()})
    few = a_result({task: outcomes(20, 0.4) for task in sizes}, limit=20)
    assert {row["outcome"] for row in compared(tmp_path, every, every)["comparisons"]} == {"equivalent"}
    assert {row["outcome"] for row in compared(tmp_path, few, few)["comparisons"]} == {"undecided"}


@pytest.mark.parametrize(
    ("won", "lost", "outcome", "better", "within"),
    [
        (150, 50, "different", "b", False),
        (50, 150, "different", "a", False),
        (40, 40, "equivalent", None, True),
        (100, 76, "undecided", None, False),
        (26, 6, "different", "b", True),  # 1 %, surely less than the margin of 2 %
    ],
)
def test_the_three_outcomes(
    tmp_path: Path, won: int, lost: int, outcome: str, better: str | None, within: bool
) -> None:
    base = outcomes(2000, 0.5)
    a, b = a_result({"winogrande": base}, "a"), a_result({"winogrande": flipped(base, won, lost)}, "b")
    (row,) = compared(tmp_path, a, b)["comparisons"]
    assert (row["outcome"], row.get("better"), row["within_margin"]) == (outcome, better, within)
    assert (row["won"], row["lost"]) == (won, lost)
    assert row["difference"] == pytest.approx((won - lost) / 2000)
    assert row["score"] - row["baseline_score"] == pytest.approx(row["difference"])
    low, high = row["interval"]
    assert low < row["difference"] < high


def test_the_margin_decides_what_is_equivalent(tmp_path: Path) -> None:
    base = outcomes(2000, 0.5)
    results = a_result({"piqa": base}), a_result({"piqa": flipped(base, 80, 80)})
    verdicts = [compared(tmp_path, *results, margin=m)["comparisons"][0]["outcome"] for m in (0.005, 0.02)]
    assert verdicts == ["undecided", "equivalent"]


def test_many_tasks_are_corrected(tmp_path: Path) -> None:
    """p = 0.03 alone is a difference, but not as one of five."""
    base = outcomes(200, 0.5)
    tasks = ["winogrande", "piqa", "arc_easy", "arc_challenge", "openbookqa"]
    same = dict.fromkeys(tasks, base)
    other = {**same, "winogrande": flipped(base, 16, 5)}
    alone = compared(tmp_path, a_result(same), a_result(other), tasks=["winogrande"])["comparisons"][0]
    among = compared(tmp_path, a_result(same), a_result(other))["comparisons"][0]
    assert alone["difference_p"] == among["difference_p"] == pytest.approx(0.0266, abs=1e-4)
    assert (alone["outcome"], among["outcome"]) == ("different", "undecided")
    assert among["difference_p_corrected"] == pytest.approx(5 * alone["difference_p"])


def test_items_of_a_source_count_together(tmp_path: Path) -> None:
    """12 wins against 1 are clear for separate items, but not if they come from two sources."""
    base = [0] * 12 + [1] + [0] * 187
    won = [1] * 12 + [0] + [0] * 187
    one_each = [f"s{place}" for place in range(200)]
    shared = [f"s{max(place // 6, place - 20)}" for place in range(200)]
    rows = []
    for sources in (one_each, shared):
        results = [a_result({"hellaswag": values}, sources={"hellaswag": sources}) for values in (base, won)]
        rows += compared(tmp_path, *results)["comparisons"]
    assert [row["outcome"] for row in rows] == ["different", "undecided"]
    assert rows[0]["mcnemar_p"] == rows[1]["mcnemar_p"] == rows[0]["difference_p"] < 0.01
    assert rows[1]["difference_p"] > 0.05
    assert rows[1]["interval"][0] < 0 < rows[0]["interval"][0]
    assert (rows[0]["num_sources"], rows[1]["num_sources"]) == (200, len(set(shared)))


def test_a_result_without_sources_takes_those_of_the_other(tmp_path: Path) -> None:
    base, sources = outcomes(100, 0.5), [str(place // 2) for place in range(100)]
    new = a_result({"hellaswag": base}, sources={"hellaswag": sources})
    old = a_result({"hellaswag": flipped(base, 10, 12)})
    rows = [compared(tmp_path, *pair)["comparisons"][0] for pair in ((new, old), (old, new), (old, old))]
    assert [row["num_sources"] for row in rows] == [50, 50, 100]


def test_several_models_are_compared_with_the_first(tmp_path: Path) -> None:
    base = {task: outcomes(300, 0.5) for task in ("winogrande", "hellaswag")}
    results = [a_result(base, name) for name in "abc"]
    found = compared(tmp_path, *results)
    assert [(row["model"], row["baseline"], row["task"], row["metric"]) for row in found["comparisons"]] == [
        (model, "a", task, metric)
        for model in "bc"
        for task, metric in (("winogrande", "acc"), ("hellaswag", "acc_norm"))
    ]


def test_order_of_items_does_not_matter(tmp_path: Path) -> None:
    one, two = a_result({"piqa": outcomes(300, 0.5)}), a_result({"piqa": outcomes(300, 0.5, seed=1)})
    straight = compared(tmp_path, one, two)
    two["tasks"]["piqa"]["items"].reverse()
    assert compared(tmp_path, one, two) == straight


# --- names and notes -----------------------------------------------------------------------------


def test_models_have_names_that_differ(tmp_path: Path) -> None:
    hub = {"source": "hub", "name": "owner/model", "parameters": 1, "context_length": 1}
    run = {"run_name": "run", "step": 7, "tokens": 1}
    results = [a_result({"piqa": [0, 1]}, name) for name in ("a", "a", "b", "c", "d")]
    results[3]["model"] = hub
    results[4]["model"]["provenance"] = run
    labels = [model["label"] for model in compared(tmp_path, *results)["models"]]
    assert labels == [str(tmp_path / "r0"), str(tmp_path / "r1"), "b", "owner/model", "run@7"]
    file = write(tmp_path / "one", results[0])
    assert [m["label"] for m in compare([file, file, file])["models"]] == ["a", "a (2)", "a (3)"]
    assert [m["label"] for m in compare([file, file], labels=[None, "a"])["models"]] == ["a (2)", "a"]
    with pytest.raises(EvalError, match="the labels x, x are not all different"):
        compare([file, file], labels=["x", "x"])


def test_notes_say_what_a_reader_should_know(tmp_path: Path) -> None:
    one = a_result({"piqa": [0, 1], "winogrande": [1, 1]}, "a")
    two = a_result({"piqa": [0, 1]}, "b", dtype="bfloat16", versions={"lm_eval": "0.4.9"})
    two["tasks"]["piqa"]["num_truncated_requests"] = 3
    one["model"]["weights_sha256"] = two["model"]["weights_sha256"] = {"model.safetensors": "0"}
    assert compared(tmp_path, one, two)["notes"] == [
        "not compared, of a: winogrande",
        "the dtype of the weights differs: a float32, b bfloat16",
        "the version of lm-eval differs: a 0.4.13, b 0.4.9",
        "piqa: 3 texts were cut to the context of b (128 tokens)",
        "a and b have the same weights",
    ]
    hub = [a_result({"piqa": [0, 1]}, "a") for _ in range(3)]
    for result, digest in zip(hub, "001", strict=True):
        result["model"].update(source="hub", revision="0" * 40, sha256=digest)
    assert compared(tmp_path, *hub)["notes"] == [f"{tmp_path}/r0 and {tmp_path}/r1 have the same weights"]


# --- refusals -----------------------------------------------------------------------------------


def without_norm(result: dict[str, Any]) -> None:
    task = result["tasks"]["hellaswag"]
    for part in (task, *task["items"]):
        for key in ("acc_norm", "acc_norm_stderr"):
            part.pop(key, None)


def fewer(result: dict[str, Any]) -> None:
    task = result["tasks"]["winogrande"]
    task["items"] = task["items"][:4]
    task.update(num_items=4, acc=sum(item["acc"] for item in task["items"]) / 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(num_fewshot=5), "a and b differ in the number of solved examples in the prompt: 0 and 5"),
        (
            lambda r: r["tasks"]["winogrande"].update(num_fewshot=5),
            "winogrande: a and b differ in the number of solved examples in the prompt: 0 and 5",
        ),
        (lambda r: r["tasks"]["winogrande"].update(version=2.0), "winogrande: a and b differ in the version"),
        (lambda r: r["tasks"]["winogrande"].update(split="test"), "winogrande: a and b differ in the split"),
        (without_norm, "hellaswag: a and b cannot be compared by acc_norm, which b lacks; --metric acc"),
        (fewer, "winogrande: a and b are not of the same items: 6 and 4 items, 4 in both"),
        (lambda r: r["tasks"]["hellaswag"]["items"][2].update(doc_hash="other"), "6 and 6 items, 5 in both"),
        (lambda r: [i.update(source="x") for i in r["tasks"]["hellaswag"]["items"]], "6 items have different sources"),
    ],
)
def test_results_that_do_not_match_are_refused(tmp_path: Path, change: Change, message: str) -> None:
    outcome, sources = {"hellaswag": [0, 1] * 3, "winogrande": [1, 1, 0] * 2}, {"hellaswag": list("ssssss")}
    one, two = a_result(outcome, "a", sources), a_result(outcome, "b", sources)
    compared(tmp_path, one, two)
    change(two)
    with pytest.raises(EvalError, match=re.escape(message)) as caught:
        compared(tmp_path, one, two)
    assert len(str(caught.value).splitlines()) == 1


def test_every_problem_has_its_line(tmp_path: Path) -> None:
    one = a_result({"hellaswag": [0, 1], "winogrande": [1, 1]}, "a")
    two = a_result({"hellaswag": [0, 1, 1], "winogrande": [1]}, "b", num_fewshot=1)
    three = a_result({"hellaswag": [0, 1], "winogrande": [1, 1]}, "c")
    three["tasks"]["winogrande"]["version"] = None
    with pytest.raises(EvalError) as caught:
        compared(tmp_path, one, two, three)
    lines = str(caught.value).splitlines()
    assert [line.partition(" differ")[0].partition(" are")[0] for line in lines] == [
        "a and b",
        "hellaswag: a and b",
        "winogrande: a and b",
        "winogrande: a and c",
    ]
    assert "the version of the task: 1.0 and None" in lines[3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"margin": 0}, "margin is 0"),
        ({"margin": 1}, "margin is 1"),
        ({"margin": float("nan")}, "margin is nan"),
        ({"metric": "acc_norm", "tasks": ["winogrande"]}, "cannot be compared by acc_norm, which a and b lack"),
        ({"tasks": ["winogrand"]}, "a has no task 'winogrand'; did you mean winogrande"),
        ({"tasks": []}, "no task given"),
    ],
)
def test_bad_requests_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    one, two = (a_result({"winogrande": [1, 0]}, name) for name in "ab")
    with pytest.raises(EvalError, match=re.escape(message)):
        compared(tmp_path, one, two, **options)


def test_results_without_a_common_task_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EvalError, match="no task is in all results: a has piqa; b has winogrande"):
        compared(tmp_path, a_result({"piqa": [1]}, "a"), a_result({"winogrande": [1]}, "b"))
    with pytest.raises(EvalError, match="at least two"):
        compare([write(tmp_path / "one", a_result({"piqa": [1]}))])


def test_one_item_is_enough_to_be_undecided(tmp_path: Path) -> None:
    (row,) = compared(tmp_path, a_result({"piqa": [1]}), a_result({"piqa": [0]}))["comparisons"]
    assert row["outcome"] == "undecided"


# --- formats ------------------------------------------------------------------------------------

NASTY = "a|b_<i>*x*</i>&%$#{}~^\\ \n\x1b[31m`c`"


@pytest.fixture(scope="module")
def nasty(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    base, tmp_path = outcomes(500, 0.5), tmp_path_factory.mktemp("nasty")
    one, two = a_result({"piqa": base, "winogrande": base}, "a"), a_result({"piqa": base, "winogrande": base}, "b")
    found = compared(tmp_path, one, two, labels=[NASTY, "=HYPERLINK(1)"])
    choice = {"text": "- [x] $1", "correct": True, "baseline_log_likelihood": -1.5, "log_likelihood": -2.0}
    other = {"text": "1. <b>", "correct": False, "baseline_log_likelihood": None, "log_likelihood": None}
    found["flips"] = [
        {
            "task": "piqa",
            "model": "=HYPERLINK(1)",
            "won": False,
            "doc_id": 3,
            "prompt": "# Title\n[link](http://x)",
            "choices": [choice, other],  # type: ignore[list-item]
        }
    ]
    return found


def test_json_is_the_comparison_with_the_documented_keys(nasty: Comparison) -> None:
    content = json.loads(render(nasty, "json"))
    assert content == json.loads(json.dumps(nasty))
    check_against(Comparison, content)
    for kind, parts in ((ComparedModel, "models"), (TaskComparison, "comparisons"), (Flip, "flips")):
        for part in content[parts]:
            check_against(kind, part)


@pytest.mark.parametrize("form", ["text", "markdown", "csv", "latex", "json"])
def test_every_format_says_what_verdicts_cover(nasty: Comparison, form: Any) -> None:
    assert "not training seeds" in SCOPE
    text = render(nasty, form)
    assert SCOPE in text.replace("\\", "")
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert "\x1b" not in text or form == "csv"


def test_text_has_a_line_a_task_and_no_control_characters(nasty: Comparison) -> None:
    lines = render(nasty, "text").splitlines()
    assert lines[1].split()[:3] == list(HEADS[:3])
    assert [line.split()[0] for line in lines[2:4]] == ["piqa", "winogrande"]
    assert all(line.isprintable() for line in lines)
    assert any(line == "    # Title [link](http://x)" for line in lines)
    assert any(line.startswith("  *     -1.50     -2.00  - [x] $1") for line in lines)


def test_markdown_shows_labels_and_items_as_they_are(nasty: Comparison) -> None:
    text = render(nasty, "markdown")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {len(HEADS) + 1}
    assert "<" not in text
    assert "> \\# Title" in text
    assert "\\[link\\]\\(http" in text
    assert "- 1\\. &lt;b&gt;" in text
    assert markdown_text("a\nb`c`|<&") == "a b\\`c\\`\\|&lt;&amp;"


def test_csv_has_a_line_a_comparison_and_no_formula(nasty: Comparison) -> None:
    rows = list(csv.DictReader(io.StringIO(render(nasty, "csv"))))
    assert [row["task"] for row in rows] == ["piqa", "winogrande"]
    assert {row["model"] for row in rows} == {"'=HYPERLINK(1)"}
    assert {row["baseline"] for row in rows} == {NASTY}
    assert float(rows[0]["difference_p"]) == nasty["comparisons"][0]["difference_p"]
    assert (float(rows[0]["interval_low"]), float(rows[0]["interval_high"])) == nasty["comparisons"][0]["interval"]
    assert (rows[0]["within_margin"], rows[0]["better"]) == ("true", "")


def test_latex_is_escaped_and_balanced(nasty: Comparison) -> None:
    text = render(nasty, "latex")
    assert text.count(r"\begin{") == text.count(r"\end{")
    bare = re.sub(r"\\[\\&%$#_{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert not set('~^<>|`"') & set(bare)
    rows = [line for line in bare.splitlines() if line.startswith(("piqa", "winogrande"))]
    assert {row.count("&") for row in rows} == {len(HEADS) - 1}
    assert latex_text("50% [a] --- *") == r"50\% {[}a{]} -{}-{}- {*}"


def test_the_verdict_in_words() -> None:
    row: Any = {"outcome": "different", "better": "b", "within_margin": True, "smallest_difference": 0.0123}
    assert verdict(row) == "b is better, within the margin"
    assert verdict({**row, "within_margin": False}) == "b is better"
    assert verdict({**row, "outcome": "equivalent"}) == "equivalent"
    assert verdict({**row, "outcome": "undecided"}) == "undecided (could show 0.012)"


# --- the command --------------------------------------------------------------------------------


def test_the_commands_margin_is_the_functions() -> None:
    assert build_parser().parse_args(["compare", "a", "b"]).margin == DEFAULT_MARGIN


def test_the_command_prints_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = outcomes(2000, 0.5)
    one = write(tmp_path / "one", a_result({"piqa": base, "winogrande": base}))
    two = write(tmp_path / "x=two", a_result({"piqa": flipped(base, 200, 20), "winogrande": base}, "other"))
    assert main(["compare", f"ours={one}", str(two), "--tasks", "piqa,", "--margin", "0.01", "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [model["label"] for model in found["models"]] == ["ours", "other"]
    assert [row["task"] for row in found["comparisons"]] == ["piqa"]
    assert found["margin"] == 0.01
    assert main(["compare", str(one), str(two)]) == 0
    assert "is better" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no result of an evaluation at nowhere"),
        (["one"], "at least two"),
        (["one", "one", "--examples", "3", "--format", "csv"], "--format json"),
    ],
)
def test_the_command_refuses_with_exit_code_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("one"), a_result({"piqa": [1, 0]}))
    assert main(["compare", *arguments, *(["one"] if arguments == ["nowhere"] else [])]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err


@pytest.mark.parametrize("arguments", [[], ["a", "b", "--margin", "2"], ["a", "b", "--examples", "0"]])
def test_a_wrong_command_line_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["compare", *arguments])
    assert caught.value.code == 2


# --- real results, and flipped items --------------------------------------------------------------


def test_two_models_from_scoring_to_flipped_items(tmp_path: Path, model_folder: Path, fetched: dict[str, Any]) -> None:
    tasks = ["hellaswag", "winogrande", "piqa"]
    other = export_model(tmp_path / "other", small_llama(seed=1))
    results = [evaluate(folder, tasks, **fetched) for folder in (model_folder, other)]
    files = [write_result(result, tmp_path / str(place)) for place, result in enumerate(results)]
    found = compare(files, metric="acc")
    for row in found["comparisons"]:
        values = [[item["acc"] for item in result["tasks"][row["task"]]["items"]] for result in results]
        assert row["won"] == sum(b > a for a, b in zip(*values, strict=True))
        assert row["lost"] == sum(b < a for a, b in zip(*values, strict=True))
    flips = flipped_items(found, 2, **fetched)
    assert len(flips) == sum(min(2, row["won"]) + min(2, row["lost"]) for row in found["comparisons"])
    assert {flip["task"] for flip in flips} == set(tasks)
    for flip in flips:
        right = [choice["correct"] for choice in flip["choices"]].index(True)
        for key, wins in (("baseline_log_likelihood", not flip["won"]), ("log_likelihood", flip["won"])):
            figures: list[float] = [choice[key] for choice in flip["choices"]]  # type: ignore[literal-required]
            assert (figures.index(max(figures)) == right) == wins
    piqa = next(flip for flip in flips if flip["task"] == "piqa")
    item = made_up_items()["piqa"][piqa["doc_id"]]
    assert item["goal"] in piqa["prompt"]
    assert [choice["text"] for choice in piqa["choices"]] == [item["sol1"], item["sol2"]]
    shown = render({**found, "flips": flips}, "text")
    assert f"piqa, item {piqa['doc_id']}: " in shown
    assert flipped_items(compare([files[0], files[0]]), 2, **fetched) == []

    results[1]["tasks"]["piqa"]["items"][piqa["doc_id"]]["doc_hash"] = "another item"
    results[0]["tasks"]["piqa"]["items"][piqa["doc_id"]]["doc_hash"] = "another item"
    changed = [write_result(result, tmp_path / str(place)) for place, result in enumerate(results)]
    with pytest.raises(EvalError, match=r"piqa: the item .* of the results is not the one at hand"):
        flipped_items(compare(changed, metric="acc"), 23, **fetched)
