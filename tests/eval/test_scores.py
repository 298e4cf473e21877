"""A score has the same interval wherever it is shown, and a group of tasks is one score."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from eval.paired import PairedOutcomes, score_interval
from eval.ratios import ratio_interval
from eval.result_table import format_table
from eval.results import read_result
from eval.scores import bits_interval, group_of, scores, shots_of
from pretrain.cli.compared_models import measured_models
from pretrain.cli.evaluated_runs import evaluations
from pretrain.report.evaluated import evaluation_panels
from tests.eval.results import a_group, a_result, write

SUBJECTS = [f"mmlu_subject{place}" for place in range(57)]


@pytest.mark.parametrize("right", [0, 1, 12, 200, 388, 399, 400])
def test_an_interval_lies_around_the_score_and_within_0_and_1(right: int) -> None:
    outcomes = [1] * right + [0] * (400 - right)
    low, high = score_interval(outcomes)
    assert 0 <= low <= right / 400 <= high <= 1
    assert high - low < 0.11
    assert (low == 0) == (right == 0)
    assert (high == 1) == (right == 400)
    if min(right, 400 - right) < 25:
        expected = binomtest(right, 400).proportion_ci(0.95, method="exact")
        assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_items_of_one_source_do_not_count_as_independent() -> None:
    outcomes = [outcome for outcome in (1, 0) for _ in range(300)]
    alone = score_interval(outcomes)
    alike = score_interval(outcomes, [str(place // 6) for place in range(600)])
    assert np.ptp(alike) == pytest.approx(np.sqrt(6) * np.ptp(alone), rel=0.1)


@pytest.mark.long
@pytest.mark.parametrize(
    ("share", "items", "per_source"), [(0.3, 200, 1), (0.6, 400, 4), (0.95, 300, 1), (0.02, 500, 1)]
)
def test_intervals_cover_the_truth(share: float, items: int, per_source: int) -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(1000):
        # The sources differ in how easy they are; on average, items are right with probability `share`.
        easy = rng.beta(share * 4, (1 - share) * 4, items // per_source) if per_source > 1 else np.full(items, share)
        outcomes = (rng.random(items) < np.repeat(easy, per_source)).astype(int).tolist()
        low, high = score_interval(outcomes, [str(place // per_source) for place in range(items)])
        covered += low <= share <= high
    few = min(share, 1 - share) * items < 25  # then it is exact, which covers more
    assert 930 <= covered <= (995 if few else 975)


def clustered(step: int = 20) -> dict[str, Any]:
    """A result with sources of several items, a group of tasks, and bits per byte."""
    rng = np.random.default_rng(step)
    outcomes = {
        "hellaswag": rng.integers(2, size=90).tolist(),
        "mmlu_law": [1, 0, 1, 1] * 9,
        "mmlu_virology": [0, 1] * 6,
    }
    result = a_result(outcomes, sources={"hellaswag": [f"video{place // 3}" for place in range(90)]})
    for name in ("mmlu_law", "mmlu_virology"):
        result["tasks"][name].update(num_fewshot=5, metric="acc")
    result["groups"] = {"mmlu": a_group(result, ["mmlu_law", "mmlu_virology"]) | {"acc_stderr": 0.02}}
    documents = [
        {"doc_hash": str(place), "bytes": 100 + place, "tokens": 9, "bits": float(place * place)} for place in range(30)
    ]
    total = sum(one["bytes"] for one in documents)
    result["bits_per_byte"] = {
        "sea": {
            **{"bits_per_byte": sum(one["bits"] for one in documents) / total, "stderr": 0.1, "bytes": total},
            **{"tokens": 270, "documents": 30, "documents_in_text": 30, "context": 128, "stride": 64},
            **{"first_token": "x", "documents_changed_by_tokenizer": 0, "sha256": "0", "origin": "file"},
            "per_document": documents,
        }
    }
    result["model"]["provenance"] = {"run_name": "a", "step": step, "tokens": 100 * step}
    return result


def test_every_table_and_page_has_the_same_interval(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write(run / "eval" / "step-20", clustered())
    result = read_result(run / "eval" / "step-20")
    items = result["tasks"]["hellaswag"]["items"]
    paired = PairedOutcomes([0] * 90, [item["acc_norm"] for item in items], [item["source"] for item in items])
    expected = {
        "hellaswag": paired.interval(),
        "mmlu": score_interval(
            [item["acc"] for name in ("law", "virology") for item in result["tasks"][f"mmlu_{name}"]["items"]]
        ),
    }
    found = evaluations({"a": run})
    assert found is not None
    assert {row["task"]: (row["low"], row["high"]) for row in found["series"]} == expected
    measured = measured_models({"m": "m"}, {"m": run / "eval" / "step-20"}, [], 0.02)["results"]["m"]["tasks"]
    assert {name: (task["low"], task["high"]) for name, task in measured.items()} == expected
    table = format_table(result)
    for name, (low, high) in expected.items():
        assert re.search(rf"95 % intervals.*{name}[a-z_ ]* {low:.4f} to {high:.4f}", table)
    text = result["bits_per_byte"]["sea"]["per_document"]
    ends = ratio_interval([one["bits"] for one in text], [one["bytes"] for one in text])
    assert bits_interval(result["bits_per_byte"]["sea"]) == ends
    (row,) = found["bits_per_byte"]
    assert (row["low"], row["high"]) == ends
    assert f"sea {ends[0]:.4f} to {ends[1]:.4f}" in table


def test_a_group_of_tasks_is_one_score_and_one_panel(tmp_path: Path) -> None:
    for step in (10, 20):
        result = a_result({"winogrande": [1, 0]} | {name: [1, 0, step // 20] for name in SUBJECTS}, suite="mmlu")
        result["groups"] = {"mmlu": a_group(result, SUBJECTS) | {"acc_stderr": 0.02}}
        for name in SUBJECTS:
            result["tasks"][name]["metric"] = "acc"
        result["model"]["provenance"] = {"run_name": "a", "step": step, "tokens": 100 * step}
        write(tmp_path / "eval" / f"step-{step}", result)
    found = evaluations({"a": tmp_path})
    assert found is not None
    assert [(row["task"], row["step"], row["num_items"]) for row in found["series"]] == [
        ("mmlu", 10, 171),
        ("mmlu", 20, 171),
        ("winogrande", 10, 2),
        ("winogrande", 20, 2),
    ]
    assert [row["score"] for row in found["series"][:2]] == [1 / 3, 2 / 3]
    assert len(found["scores"]) == 59  # the table of the newest has the subjects too
    alone: Any = SimpleNamespace(series=(), axes={}, seed_axis=None, baseline=None)
    panels = evaluation_panels(found, alone)
    assert [panel.title for panel in panels] == ["mmlu, acc", "winogrande, acc"]


def test_scores_have_their_shots_groups_and_standard_errors() -> None:
    result: Any = clustered()
    found = {score.name: score for score in scores(result)}
    assert list(found) == ["mmlu", "hellaswag"]
    assert (found["mmlu"].shots, found["mmlu"].stderr, found["mmlu"].is_group, len(found["mmlu"].tasks)) == (
        5,
        0.02,
        True,
        2,
    )
    assert (found["hellaswag"].shots, found["hellaswag"].metric, found["hellaswag"].is_group) == (0, "acc_norm", False)
    assert group_of(result) == {"mmlu_law": "mmlu", "mmlu_virology": "mmlu"}
    assert [shots_of(result, name) for name in ("mmlu", "mmlu_law", "hellaswag", "piqa")] == [5, 5, 0, None]
