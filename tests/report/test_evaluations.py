"""The report shows the evaluations that lie in run folders, and paired differences between runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from eval.paired import score_interval
from pretrain.cli import main
from pretrain.report import schema
from tests.eval.results import a_result, write
from tests.report.folders import job, records, write_run, write_sweep
from tests.report.test_looks import hovers, section
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
    assert [tag for tag, _ in page.tags if tag == "script"] == ["script"]  # ours


def test_without_results_nothing_changes(tmp_path: Path) -> None:
    found, page = report(write_run(tmp_path / "one", records(20)))
    assert "evaluations" not in found
    assert "Evaluations" not in page.text


def at_step(result: dict[str, Any], step: int) -> dict[str, Any]:
    result["model"]["provenance"] = {"run_name": "one", "step": step, "tokens": 10 * step}
    return result


def bits(value: float, stderr: float | None = 0.01) -> dict[str, Any]:
    """Bits per byte on twelve documents of rising difficulty, 5,000 bytes in all."""
    sizes = [450] * 11 + [50]
    documents = [
        {"doc_hash": f"document-{place}", "bytes": size, "tokens": size // 4, "bits": size * value}
        for place, size in enumerate(sizes)
    ]
    text = {
        **{"bits_per_byte": value, "stderr": stderr, "bytes": sum(sizes), "tokens": sum(size // 4 for size in sizes)},
        **{"documents": 12, "documents_in_text": 12, "context": 128, "stride": 64, "first_token": "<|endoftext|>"},
        **{"documents_changed_by_tokenizer": 0, "sha256": "0", "origin": "file", "per_document": documents},
    }
    return {"bits_per_byte": {"passages": text}}


def test_checkpoints_are_curves_with_bands(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", records(20))
    for step, right in ((10, 30), (20, 60), (5, 20)):
        result = a_result({"winogrande": [1] * right + [0] * (100 - right)}, **bits(2 - step / 100))
        write(folder / "eval" / "core" / f"step-{step}", at_step(result, step))
    found, page = report(folder)
    rows = found["evaluations"]["series"]
    assert [(row["step"], row["score"], row["tokens"]) for row in rows] == [
        (5, 0.2, 50),
        (10, 0.3, 100),
        (20, 0.6, 200),
    ]
    assert set(rows[0]) == set(get_type_hints(schema.SeriesRow))
    html = (folder / "report.html").read_text()
    curves = hovers(section(html, "evaluations"))
    points = curves["winogrande, acc over steps"]["lines"][0]["points"]
    low, high = score_interval([1] * 60 + [0] * 40)
    assert points[-1] == [20, 0.6, pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5)]
    assert [point[:2] for point in points] == [[5, 0.2], [10, 0.3], [20, 0.6]]
    assert curves["winogrande, acc over steps"]["share"]
    of_text = curves["passages, bits per byte over steps"]["lines"][0]["points"]
    assert of_text[0] == [5, 1.95]  # without a band: resamples of documents that are alike do not differ
    # The tables and the top of the page have the newest checkpoint only.
    assert page.text.count("0.6000 ± 0.0100") == 2
    assert "0.3000 ±" not in page.text
    assert "1.8000 ± 0.0100" in page.text
    assert "1.9500 ±" not in page.text


def test_a_single_checkpoint_is_no_curve(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", records(20))
    write(folder / "eval" / "step-20", at_step(a_result({"winogrande": [1, 0]}, **bits(1.5, None)), 20))
    found, page = report(folder)
    assert "Over training" not in page.text
    assert [row["text"] for row in found["evaluations"]["bits_per_byte"]] == ["passages"]
    assert set(found["evaluations"]["bits_per_byte"][0]) == set(get_type_hints(schema.BitsRow))
    for part in ("1.5000", "5,000", "eval/step-20/results.json"):
        assert part in page.text


def test_the_newest_common_checkpoints_are_compared(tmp_path: Path) -> None:
    folder = two_runs(tmp_path)
    for name, step, value in (("muon", 10, 0), ("muon", 20, 0), ("aurora", 10, 1), ("aurora", 30, 1)):
        write(tmp_path / name / "eval" / f"step-{step}", at_step(a_result({"winogrande": [value] * 50}), step))
    found, _ = report(folder)
    (row,) = found["evaluations"]["differences"]
    assert (row["run"], row["won"], row["difference"]) == ("aurora", 50, 1.0)
    curves = hovers(section((folder / "report.html").read_text(), "evaluations"))
    names = {line["name"] for line in curves["winogrande, acc over steps"]["lines"]}
    assert names == {"muon, seed 1", "aurora, seed 1"}


def test_scores_beyond_accuracy(tmp_path: Path) -> None:
    """A suite with LAMBADA's perplexity, shots per task, a group of tasks, items without overlap, and a subset."""
    folder = write_run(tmp_path / "one", records(20))
    tasks = {"lambada_openai": [1, 0], "mmlu_anatomy": [1, 1], "mmlu_law": [0, 1], "hellaswag": [1, 0]}
    result = a_result(tasks, suite="everything")
    for name, task in result["tasks"].items():
        if name != "hellaswag":
            task.update(num_fewshot=5, metric="acc")
        if name == "lambada_openai":
            task.update(acc=task.pop("acc_norm"), acc_stderr=task.pop("acc_norm_stderr"))
            for item in task["items"]:
                item["acc"] = item.pop("acc_norm")
    result["tasks"]["lambada_openai"].update(perplexity=12.5, perplexity_stderr=0.7, note="other items than published")
    part = {"num_items": 1, "acc": 0.0, "acc_stderr": None, "acc_norm": 0.75}
    overlap = {"report_sha256": "0", "ngram": 13, "complete": True, "text_bytes": 9, "too_short_in_split": 0}
    subset = {**part, "acc_norm": 0.125, "origin": "file", "sha256": "0", "num_items_in_split": 1, "doc_ids": [0]}
    result["tasks"]["hellaswag"].update(
        overlap={**overlap, "overlapping": part, "without": part}, subsets={"goldenswag": subset}
    )
    members = ["mmlu_anatomy", "mmlu_law"]
    result["groups"] = {"mmlu": {"tasks": members, "num_items": 4, "acc": 0.75, "acc_stderr": 0.02}}
    write(folder / "eval" / "all", result)
    found, page = report(folder)
    rows = {row["task"]: row for row in found["evaluations"]["scores"]}
    assert list(rows) == ["mmlu", "lambada_openai", "mmlu_anatomy", "mmlu_law", "hellaswag"]
    assert (rows["mmlu"]["score"], rows["mmlu"]["num_items"], rows["mmlu"]["group"]) == (0.75, 4, None)
    assert [rows[name]["group"] for name in members] == ["mmlu", "mmlu"]
    assert rows["lambada_openai"]["other"] == {"perplexity": 12.5}
    assert rows["lambada_openai"]["num_fewshot"] == 5
    assert rows["hellaswag"]["num_fewshot"] == 0
    assert rows["hellaswag"]["other"] == {
        "acc": 0.0,
        "acc_norm: without overlap": 0.75,
        "acc_norm: goldenswag": 0.125,
    }
    assert {row["suite"] for row in rows.values()} == {"everything"}
    whole, _, hidden = section((folder / "report.html").read_text(), "evaluations").partition("<details>")
    for part_of, names in ((whole, ["mmlu", "lambada_openai", "hellaswag"]), (hidden, members)):
        assert [name for name in rows if f"<span>{name} " in part_of] == names
    for text in ("everything", "perplexity 12.50", "acc_norm: goldenswag 0.1250", "other items than published"):
        assert text in page.text


def test_parts_and_texts_are_compared_too(tmp_path: Path) -> None:
    """Items without overlap, and bits per byte, of which fewer are better."""
    folder = two_runs(tmp_path)
    for name, right, value in (("muon", 10, 2.0), ("aurora", 40, 1.75)):
        result = a_result({"winogrande": [1] * right + [0] * (60 - right)}, **bits(value))
        for item in result["tasks"]["winogrande"]["items"]:
            item["overlap"] = item["doc_id"] >= 20
        write(tmp_path / name / "eval", result)
    found, page = report(folder)
    rows = found["evaluations"]["differences"]
    assert [(row["task"], row["metric"], row["num_items"], row["difference"]) for row in rows] == [
        ("winogrande", "acc", 60, 0.5),
        ("winogrande: without overlap", "acc", 20, 0.5),
        ("passages", "bits per byte", 12, pytest.approx(-0.25)),
    ]
    assert (rows[2]["won"], rows[2]["lost"], rows[2]["verdict"]) == (12, 0, "aurora is better")
    assert {frozenset(row) for row in rows} == {frozenset(get_type_hints(schema.DifferenceRow))}
    for part in ("winogrande: without overlap", "+0.5000 [", "-0.2500", "12/0", "aurora is better"):
        assert part in page.text


def test_several_runs_are_compared_with_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also if they have the same name: then they are called by their paths."""
    folders = [tmp_path / root / "one" for root in ("a", "b")]
    for number, folder in enumerate(folders):
        write_run(folder, records(20, loss=4.0 - number / 8), config={"optimizer": {"name": "muon"}})
        write(folder / "eval", a_result({"winogrande": [number] * 50}))
    other = write_run(tmp_path / "c", records(20, loss=3.75))
    out = tmp_path / "page.html"
    assert main(["report", *map(str, folders), str(other), "--out", str(out)]) == 0
    found, page = json.loads(out.with_suffix(".json").read_text()), Page(out.read_text())
    names = [*map(str, folders), "c"]
    assert [job["run"] for job in found["jobs"]] == names
    assert [row["run"] for row in found["evaluations"]["scores"]] == names[:2]
    (row,) = found["evaluations"]["differences"]
    assert (row["run"], row["baseline"], row["won"]) == (names[1], names[0], 50)
    differences = [row["difference"] for row in found["final"]]
    assert [difference and difference["mean"] for difference in differences] == [
        None,
        pytest.approx(-0.125),
        pytest.approx(-0.25),
    ]
    for part in ("3 of 3 runs done", "Differences to the baseline", f"{names[1]} is better", "3.7599"):
        assert part in page.text

    capsys.readouterr()
    for arguments, said in (
        ([*folders], "name the page: --out FILE.html"),
        ([folders[0], folders[0], "--out", out], "given twice"),
        ([folders[0], two_runs(tmp_path / "s"), "--out", out], "a sweep; a report about several folders compares runs"),
        ([folders[0], tmp_path / "no", tmp_path / "nor", "--out", out], "no: no such folder"),
    ):
        assert main(["report", *map(str, arguments)]) == 2
        assert said in capsys.readouterr().err
