"""The scripts behind docs/claims: pages, picture, overhead."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import yaml

from pretrain.report.recorded import read_recorded
from tests.conftest import REPOSITORY, TINY, merged
from tests.report.folders import job, records, write_run, write_sweep

sys.path.insert(0, str(REPOSITORY / "scripts"))
bench_overhead = importlib.import_module("bench_overhead")
claims_pages = importlib.import_module("claims_pages")
claims_picture = importlib.import_module("claims_picture")

CLAIM = {
    "claim": "Aurora | is better",
    "measure": "validation_loss",
    "where": {"optimizer": "aurora"},
    "minus": {"optimizer": "muon"},
    "below": 0,
}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two optimizers, three seeds, complete."""
    jobs = []
    for optimizer, loss in (("muon", 4.0), ("aurora", 3.5)):
        for seed in ("1", "2", "3"):
            name = f"{optimizer}-{seed}"
            spread = 0.01 * int(seed) ** 2 if optimizer == "muon" else 0.0
            write_run(tmp_path / "runs" / name, records(100, loss=loss + spread), config={"run": {"seed": int(seed)}})
            jobs.append(job(name, {"optimizer": optimizer, "seed": seed}))
    axes = {"optimizer": ["muon", "aurora"], "seed": ["1", "2", "3"]}
    return write_sweep(tmp_path / "runs", axes, jobs, claims=[CLAIM])


def test_a_page_gets_its_tables_and_keeps_its_text(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "claims"
    assert claims_pages.main([str(sweep), "--out", str(out)]) == 0
    page = out / "made-up.md"
    first = page.read_text()
    assert first.startswith("# A made-up sweep")
    assert r"| Aurora \| is better | below 0 | -0.5467 ± 0.1004 | -0.5100, -0.5400, -0.5900 | **holds** |" in first
    assert "Intervals over seeds cover the initialisation only" in first
    assert "| muon | 3 |" in first
    assert json.loads((out / "made-up.json").read_text())["claims"][0]["verdict"] == "holds"
    assert sorted(file.name for file in out.iterdir()) == ["made-up.json", "made-up.md"]

    page.write_text(first + "\nOur words.\n")
    assert claims_pages.main([str(sweep), "--out", str(out)]) == 0
    assert page.read_text() == first + "\nOur words.\n"


def test_recorded_values_are_judged_again(sweep: Path, tmp_path: Path) -> None:
    """Without the runs, by the present rules; what was written by hand stays."""
    out = tmp_path / "claims"
    claims_pages.main([str(sweep), "--out", str(out)])
    page, numbers = out / "made-up.md", out / "made-up.json"
    text, recorded = page.read_text(), json.loads(numbers.read_text())
    assert claims_pages.main([str(numbers), "--out", str(out)]) == 0
    assert page.read_text() == text
    assert json.loads(numbers.read_text()) == recorded

    old = json.loads(numbers.read_text())
    old["schema_version"] = 1
    del old["varied_keys"], old["intervals_cover"], old["claims"][0]["reservations"]
    del old["claims"][0]["numbers"]["3"]
    old["claims"][0]["numbers"] |= {"2": None, "4": -0.5101}
    old["claims"][0]["note"] = "provisional: some seeds are missing; seed 2: muon is stopped"
    numbers.write_text(json.dumps(old))
    assert claims_pages.main([str(numbers), "--out", str(out)]) == 0
    assert "*undecided* (only 2 seeds; a verdict needs at least 3; seed 2: muon is stopped)" in page.read_text()
    numbers.write_text(json.dumps({"schema_version": 7}))
    assert claims_pages.main([str(numbers), "--out", str(out)]) == 2


def test_a_page_without_markers_is_not_touched(sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "made-up.md").write_text("no markers")
    assert claims_pages.main([str(sweep), "--out", str(tmp_path)]) == 2
    assert "expected the markers" in capsys.readouterr().err
    assert (tmp_path / "made-up.md").read_text() == "no markers"
    assert claims_pages.main([str(tmp_path / "nothing"), "--out", str(tmp_path)]) == 2


def test_the_picture_shows_every_series(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "picture.svg"
    assert claims_picture.main([str(sweep), str(out)]) == 0
    text = out.read_text()
    assert "Muon" in text
    assert "Aurora" in text
    assert claims_picture.main([str(tmp_path / "nothing"), str(out)]) == 2


def test_the_committed_pages_have_their_numbers_and_no_reports() -> None:
    pages = REPOSITORY / "docs" / "claims"
    found = [page for page in pages.glob("*.md") if claims_pages.BEGIN in page.read_text()]
    assert len(found) == 9
    assert not list(pages.glob("*.html"))
    for page in found:
        numbers = json.loads(page.with_suffix(".json").read_text())
        assert "\n".join(claims_pages.tables(numbers)) in page.read_text(), page
        assert read_recorded(page.with_suffix(".json")) == numbers, page


def test_overhead_is_measured_by_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "config.yaml", tmp_path / "overhead.json"
    tiny = merged(TINY, {"optimizer": {"polar": "gram", "adamw": {"lr": 3e-3}}})
    config.write_text(yaml.safe_dump(tiny))
    options = ["--optimizers", "aurora", "--rounds", "2", "--steps", "1", "--json", str(out)]
    assert bench_overhead.main([str(config), *options]) == 0
    muon, aurora = json.loads(out.read_text())["rows"]
    assert muon["step_time_ratio"] == muon["optimizer_flops_ratio"] == muon["step_flops_ratio"] == 1
    assert 1 < aurora["optimizer_flops_ratio"] < 3
    assert 1 < aurora["step_flops_ratio"] < aurora["optimizer_flops_ratio"]
    assert "| aurora |" in capsys.readouterr().out
    assert bench_overhead.main([str(config), "--optimizers", "auroar"]) == 2
