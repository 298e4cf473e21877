"""The report shows the evaluations that lie in run folders, and paired differences between runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from pretrain.cli import main
from pretrain.report import schema
from tests.eval.results import a_result, write
from tests.report.folders import job, records, write_run, write_sweep
from tests.report.test_page import NASTY, Page


def report(folder: Path) -> tuple[dict[str, Any], Page]:
    assert main(["report", str(folder)]) == 0
    page = Page((folder / "report.html").read_text())
    return json.loads((folder / "report.json").read_text()), page


def two_runs(root: Path) -> Path:
    jobs = []
    for name in ("muon", "aurora"):
        write_run(root / name, records(20), config={"optimizer": {"name": name}})
        jobs.append(job(name, {"optimizer": name, "seed": "1"}, {}))
    return write_sweep(root, {"optimizer": ["muon", "aurora"], "seed": ["1"]}, jobs, claims=[])


def test_a_run_shows_its_scores(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", records(20))
    write(folder / "eval" / "all", a_result({"hellaswag": [1, 0, 0, 0], "winogrande": [1, 0, 1, 1]}))
    result = a_result({"piqa": [1]})
    result["tasks"]["piqa"].update(acc_norm_stderr=None, num_items_in_split=1838)
    write(folder / "eval", result)
    found, page = report(folder)
    rows = found["evaluations"]["scores"]
    assert [(row["task"], row["metric"], row["score"], row["file"]) for row in rows] == [
        ("piqa", "acc_norm", 1.0, "eval/results.json"),
        ("hellaswag", "acc_norm", 0.25, "eval/all/results.json"),
        ("winogrande", "acc", 0.75, "eval/all/results.json"),
    ]
    assert found["evaluations"]["differences"] == []
    for part in ("Evaluations", "0.2500 ± 0.0100", "1 of 1,838"):
        assert part in page.text
    assert "paired by item" not in page.text
    assert set(rows[0]) == set(get_type_hints(schema.ScoreRow))
    assert set(found["evaluations"]) == set(get_type_hints(schema.Evaluations))


def test_runs_of_a_sweep_are_compared_by_item(tmp_path: Path) -> None:
    folder = two_runs(tmp_path)
    write(tmp_path / "muon" / "eval" / "wg", a_result({"winogrande": [0] * 60 + [1] * 240}))
    write(tmp_path / "aurora" / "eval" / "wg", a_result({"winogrande": [1] * 300}))
    found, page = report(folder)
    (row,) = found["evaluations"]["differences"]
    assert (row["run"], row["baseline"], row["won"], row["lost"]) == ("aurora", "muon", 60, 0)
    assert row["difference"] == pytest.approx(0.2)
    assert row["low"] < 0.2 < row["high"]
    assert set(row) == set(get_type_hints(schema.DifferenceRow))
    for part in ("aurora is better", "+0.2000 [+0.1", "60/0", "not training seeds"):
        assert part in page.text


def test_what_cannot_be_read_or_compared_is_a_note(tmp_path: Path) -> None:
    folder = two_runs(tmp_path)
    write(tmp_path / "muon" / "eval" / "a", a_result({"winogrande": [0, 1]}))
    write(tmp_path / "aurora" / "eval" / "a", a_result({"winogrande": [0, 1, 1]}))
    write(tmp_path / "aurora" / "eval" / "b", "{")
    found, page = report(folder)
    notes = found["evaluations"]["notes"]
    assert len(notes) == 2
    assert "aurora: " in notes[0]
    assert "is not the result of an evaluation" in notes[0]
    assert "eval/a/results.json: not compared: winogrande: muon and aurora are not of the same items" in notes[1]
    assert all(note in page.text for note in notes)
    assert found["evaluations"]["differences"] == []


def test_names_of_tasks_are_escaped(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", records(20))
    write(folder / "eval", a_result({NASTY: [1, 0]}))
    _, page = report(folder)
    assert NASTY in page.text
    assert not [tag for tag, _ in page.tags if tag == "script"]


def test_without_results_nothing_changes(tmp_path: Path) -> None:
    found, page = report(write_run(tmp_path / "one", records(20)))
    assert "evaluations" not in found
    assert "Evaluations" not in page.text
