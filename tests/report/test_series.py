"""The report knows the scores of a run's checkpoints as a series, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import get_type_hints

from pretrain.cli.evaluated_runs import evaluations
from pretrain.report import schema
from tests.eval.results import a_result, write


def results(run: Path, steps: dict[int, list[int]], under: str = ".") -> None:
    for step, outcomes in steps.items():
        result = a_result({"winogrande": outcomes})
        result["model"]["provenance"] = {"run_name": run.name, "step": step, "tokens": 100 * step}
        write(run / "eval" / under / f"step-{step:08d}", result)


def test_a_series_has_every_checkpoint_and_the_scores_the_newest(tmp_path: Path) -> None:
    results(tmp_path / "a", {20: [1, 1, 1, 0], 3: [0, 0, 0, 0], 100: [1, 1, 1, 1]})
    results(tmp_path / "a", {3: [0, 1]}, under="few")
    write(tmp_path / "a" / "eval" / "final", a_result({"winogrande": [1]}))
    found = evaluations({"a": tmp_path / "a"})
    assert found is not None
    rows = found["series"]
    assert [(row["series"], row["step"], row["tokens"], row["score"]) for row in rows] == [
        (".", 3, 300, 0.0),
        (".", 20, 2000, 0.75),
        (".", 100, 10000, 1.0),
        ("few", 3, 300, 0.5),
    ]
    assert all(set(row) == set(get_type_hints(schema.SeriesRow)) for row in rows)
    assert all(0 <= row["low"] <= row["score"] <= row["high"] <= 1 for row in rows)
    assert rows[0]["high"] > 0.2  # none of four right does not mean never
    assert [row["file"] for row in found["scores"]] == [
        "eval/final/results.json",
        "eval/step-00000100/results.json",
        "eval/few/step-00000003/results.json",
    ]


def test_runs_are_compared_at_the_newest_step_that_both_have(tmp_path: Path) -> None:
    results(tmp_path / "a", {10: [0] * 30, 20: [1] * 30, 30: [1] * 30})
    results(tmp_path / "b", {10: [1] * 30, 20: [0] * 30})
    found = evaluations({"a": tmp_path / "a", "b": tmp_path / "b"})
    assert found is not None
    (row,) = found["differences"]
    assert (row["won"], row["lost"]) == (0, 30)
    results(tmp_path / "c", {40: [1] * 30})
    found = evaluations({name: tmp_path / name for name in "abc"})
    assert found is not None
    assert found["differences"] == []
