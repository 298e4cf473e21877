"""The comparison with the lm_eval command counts what differs, and says so."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import REPOSITORY

ITEM: dict[str, Any] = {"doc_id": 0, "doc_hash": "a", "acc": 1, "log_likelihoods": [-10.0, -10.001], "tokens": [5, 5]}


Outcomes = dict[int, dict[str, Any]]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    names = ("bench_eval", "bench_eval_page", "bench_data_page", "smollm2")
    modules = {name: __import__(name) for name in names}
    yield SimpleNamespace(**vars(modules["bench_eval"]), page=modules["bench_eval_page"].page)
    for name in names:
        del sys.modules[name]


def report_of(
    bench: SimpleNamespace, ours: dict[int, dict[str, Any]], theirs: dict[int, dict[str, Any]], off: float = 3e-5
) -> dict[str, Any]:
    figures = {"acc": 0.5, "acc_stderr": 0.1}
    metrics = bench.compare_metrics({"tasks": {"piqa": figures}}, {"piqa": {"acc,none": 0.5, "acc_stderr,none": 0.1}})
    compared = bench.compare({"piqa": ours}, {"piqa": theirs})
    for choice in compared["piqa"]["apart"]:
        choice |= {"aurora eval": off, "lm_eval": 2e-4}
    return {"float32": compared, "metrics": metrics, "bfloat16": {"None": compared, "float32": compared}}


def test_equal_outcomes_are_no_problem(bench: SimpleNamespace) -> None:
    result = {"tasks": {"piqa": {"items": [ITEM]}}}
    ours = bench.outcomes_of_ours(result)["piqa"]
    other = {0: ITEM | {"log_likelihoods": [-10.00005, -10.001]}}
    report = report_of(bench, ours, other)
    assert report["float32"]["piqa"]["largest_difference_per_token"] == pytest.approx(1e-5)
    assert bench.problems(report) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"log_likelihoods": [-10.001, -10.001]},
            "choice 0 of item 0 is 3.0e-05 a token from the model in float64, lm_eval's 2.0e-04",
        ),
        ({"acc": 0}, "item 0 flips with a margin of 1.0e-03"),
    ],
)
def test_what_differs_is_a_problem(bench: SimpleNamespace, change: dict[str, Any], message: str) -> None:
    report = report_of(bench, {0: ITEM}, {0: ITEM | change})
    assert any(message in problem for problem in bench.problems(report))


def test_who_is_off_where_the_sides_are_apart(bench: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that is farther from the model in float64, which scores only these choices."""
    theirs = ITEM | {"log_likelihoods": [-10.0, -10.002]}
    report = bench.compare({"piqa": {0: ITEM}}, {"piqa": {0: theirs}})
    assert report["piqa"]["apart"] == [{"doc_id": 0, "choice": 1}]
    asked = []

    class Model:
        def __init__(self, folder: Any, dtype: torch.dtype) -> None:
            assert dtype == torch.float64

        def log_likelihood(self, request: str) -> tuple[float, int]:
            asked.append(request)
            return -10.0011, 5

    monkeypatch.setattr(sys.modules["bench_eval"], "Exact", Model)
    samples = {"piqa": {"samples": [{"doc_id": 0, "arguments": {"gen_args_0": "first", "gen_args_1": "second"}}]}}
    bench.who_is_off("folder", report, samples, {"aurora eval": {"piqa": {0: ITEM}}, "lm_eval": {"piqa": {0: theirs}}})
    (choice,) = report["piqa"]["apart"]
    assert asked == ["second"]
    assert choice["aurora eval"] == pytest.approx(2e-5)
    assert choice["lm_eval"] == pytest.approx(1.8e-4)
    assert bench.problems(report_of(bench, {0: ITEM}, {0: theirs}, off=1e-5)) == []
    assert bench.problems(report_of(bench, {0: ITEM}, {0: theirs}, off=3e-5))


def test_a_flip_within_the_bound_is_listed_and_no_problem(bench: SimpleNamespace) -> None:
    close = ITEM | {"log_likelihoods": [-10.0, -10.0001]}
    report = report_of(bench, {0: close}, {0: close | {"acc": 0}})
    assert [flip["doc_id"] for flip in report["float32"]["piqa"]["flips"]] == [0]
    assert bench.problems(report) == []


def test_metrics_that_differ_without_a_flip_are_a_problem(bench: SimpleNamespace) -> None:
    report = report_of(bench, {0: ITEM}, {0: ITEM})
    report["metrics"]["piqa"]["acc_stderr"] = [0.1, 0.2]
    assert bench.problems(report) == ["piqa: acc_stderr is 0.1, lm_eval's 0.2"]


@pytest.mark.parametrize("other", [{1: ITEM | {"doc_id": 1}}, {0: ITEM | {"doc_hash": "b"}}])
def test_other_items_are_not_compared(bench: SimpleNamespace, other: Outcomes) -> None:
    with pytest.raises(RuntimeError, match=r"different items|differs between the two commands"):
        bench.compare({"piqa": {0: ITEM}}, {"piqa": other})


def test_the_page_holds_the_figures(bench: SimpleNamespace) -> None:
    flipped = copy.deepcopy(ITEM) | {"acc": 0}
    one = report_of(bench, {0: ITEM}, {0: flipped}) | {
        "seconds": {
            "aurora eval": [10.0, 12.0],
            "lm_eval": [30.0, 33.0],
            "aurora eval, start": [4.0, 4.0],
            "lm_eval, start": [8.0, 8.0],
        },
        "speed": 2.875,
        "speed_without_start": 3.4,
        "from_float64": {"aurora eval": 1e-7, "lm_eval": 8e-6},
        "model": {"name": "tiny", "parameters": 1_000_000, "sha256": "f" * 64},
        "num_truncated_requests": {"piqa": 0},
    }
    other = copy.deepcopy(one)
    other |= {name: {"arc_easy": other[name]["piqa"]} for name in ("float32", "metrics", "num_truncated_requests")}
    other["bfloat16"] = dict.fromkeys(other["bfloat16"], other["float32"])
    other["speed"], other["from_float64"]["lm_eval"] = 2.0, 9e-6
    report = bench.merge({"piqa": one, "arc_easy": other}) | {
        "machine": {"cores": 2, "machine": "cpu", "threads": 1, "versions": "torch 2"},
        "date": "26 November 2026",
        "limits": {"piqa": 500, "arc_easy": 0},
        "lm_eval_batch_size": 32,
        "sample": 20,
    }
    text = bench.page(report)
    for part in (
        "| piqa | 11.0 | 31.5 | 2.88 | 7.0 | 23.5 | 3.40 |",
        "| arc_easy | 11.0 | 31.5 | 2.00 | 7.0 | 23.5 | 3.40 |",
        "the first 500 items of piqa, all items of arc_easy",
        "- piqa, item 0, acc: margin",
        "- arc_easy, item 0, acc: margin",
        "All log-likelihoods are within 2e-5 a token of each other.",
        "9.0e-06 a token (`lm_eval`)",
    ):
        assert part in text
    assert text.count("0.5000 ± 0.1000 | 0.5000 ± 0.1000") == 2
    other["model"] = one["model"] | {"sha256": "0" * 64}
    with pytest.raises(RuntimeError, match="changed between"):
        bench.merge({"piqa": one, "arc_easy": other})
