"""The page and report.json: complete, self-contained, escaped, small, and the same for the same input."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pretrain.report.errors import ReportError
from pretrain.report.page import number, share
from pretrain.report.write import results, write_report
from tests.report.folders import BASELINE, CONFIG, LAUNCH, job, records, write_run, write_sweep

NASTY = "<script>alert(1)</script> & $x^2$ \"quoted\" 'twice' </style>"


class Page(HTMLParser):
    """Tags with their attributes, and the text outside <style>."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._in_style = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_style = tag in ("style", "script")

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if not self._in_style:
            self.text += data


def small_sweep(root: Path, **changes: Any) -> Path:
    """Two optimizers, two seeds, arrays for the first seed, one trial of another learning rate."""
    jobs = []
    for name, loss, dead in (("muon", 4.6, 0.3), ("aurora", 4.5, 0.01)):
        for seed in (1, 2):
            run = f"{name}-{seed}"
            arrays = range(100, 601, 100) if seed == 1 else ()
            rows = records(600, loss=loss + 0.01 * seed, dead=dead, seed=seed)
            write_run(root / run, rows, config={"optimizer": {"name": name}}, arrays=arrays)
            jobs.append(job(run, {"optimizer": name, "seed": str(seed)}, {"optimizer.lr": 0.02}))
    write_run(root / "muon-high", records(600, loss=4.7))
    jobs.append(job("muon-high", {"optimizer": "muon", "seed": "1"}, {"optimizer.lr": 0.05}, chosen=False))
    claim = {"claim": "Muon starves", "measure": "telemetry/starved", "where": {"optimizer": "muon"}, "above": 0.25}
    return write_sweep(
        root, {"optimizer": ["muon", "aurora"], "seed": ["1", "2"]}, jobs, **{"claims": [claim], **changes}
    )


def test_the_page_of_a_sweep_says_what_was_found(tmp_path: Path) -> None:
    folder = small_sweep(tmp_path)
    path = write_report(folder)
    assert path == folder / "report.html"
    page = Page(path.read_text())
    for part in (
        *("A made-up sweep", "Does it work?", "5 of 5 jobs done", "AMD EPYC", LAUNCH["git_commit"], "2026-11-24"),
        *(
            "Muon starves",
            "above 0.25",
            "undecided",
            "only 2 seeds",
            "4.2M parameters without embeddings",
            "step 600 of 500",
        ),
        *("4.6249 ±", "−0.1000 ± 0.0000", "baseline", "30.0 %", "chosen", "at the edge of the values tried"),
        *(
            "Starved rows",
            "still dead",
            "Rows dead at the reference step: muon ",
            "layer 1",
            "Time per step",
            "train.total_tokens: 2048000",
            "name: aurora",
        ),
    ):
        assert part in page.text
    found = json.loads((folder / "report.json").read_text())
    assert found == results(folder)
    claim = found["claims"][0]
    assert (claim["verdict"], claim["numbers"]) == ("undecided", {"1": 0.3, "2": 0.3})
    aurora = found["final"][1]
    assert aurora["difference"]["values"] == pytest.approx({"1": -0.1, "2": -0.1})
    assert (aurora["baseline"], aurora["runs"], aurora["steps"]) == ("muon", 2, [600, 600])
    assert found["timing"][0]["seconds"] == pytest.approx(
        {"data": 0.02, "forward_backward": 0.75, "optimizer": 0.2, "other": 0.03}
    )


def test_tuned_values(tmp_path: Path) -> None:
    """Means are over the seeds that every value was run with: the trial has only the first."""
    rows = results(small_sweep(tmp_path))["tuned"]
    muon = [row for row in rows if row["series"] == "muon"]
    assert [(row["tuned"]["optimizer.lr"], row["chosen"], row["at_edge"]) for row in muon] == [
        (0.02, True, ["optimizer.lr"]),
        (0.05, False, []),
    ]
    assert muon[0]["mean"] == muon[0]["losses"]["1"]
    assert set(muon[0]["losses"]) == {"1", "2"}
    assert [row["alone"] for row in rows if row["series"] == "aurora"] == [True]


def test_the_page_of_a_run(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "one", records(120), arrays=[50, 100], finished=False)
    out = tmp_path / "elsewhere" / "one.html"
    assert write_report(folder, out) == out
    page = Page(out.read_text())
    assert "running, step 120 of 500" in page.text
    assert "layer 0" in page.text
    for part in ("Claims", "Tuned values", "Difference to baseline", "Jobs", "seeds"):
        assert part not in page.text
    found = json.loads(out.with_suffix(".json").read_text())
    assert found["kind"] == "run"
    assert found["final"][0]["validation_loss"]["half_width"] is None


def test_a_partial_sweep_says_what_is_missing(tmp_path: Path) -> None:
    folder = small_sweep(tmp_path)
    for path in (tmp_path / "aurora-2").iterdir():
        path.unlink()
    (tmp_path / "aurora-1" / "manifest.json").write_text(json.dumps({"run": "aurora-1", "launches": [LAUNCH]}))
    page = Page(write_report(folder).read_text())
    assert "3 of 5 jobs done, 1 running, 1 pending" in page.text
    assert "pending: aurora, seed 2" in page.text
    assert "running: aurora, seed 1, at step 600" in page.text
    assert results(folder)["final"][1]["validation_loss"] is None
    assert "–" in page.text


def test_a_sweep_without_any_run_has_a_page(tmp_path: Path) -> None:
    jobs = [job(f"{o}-{s}", {"optimizer": o, "seed": s}) for o in ("muon", "aurora") for s in ("1", "2")]
    folder = write_sweep(tmp_path, {"optimizer": ["muon", "aurora"], "seed": ["1", "2"]}, jobs)
    assert "0 of 4 jobs done, 4 pending" in Page(write_report(folder).read_text()).text


def test_runs_from_before_the_telemetry_have_a_page(tmp_path: Path) -> None:
    old = [{"step": step, "tokens": 10 * step, "loss": 5.0 - step / 10} for step in range(1, 6)]
    folder = write_run(tmp_path / "old", old, launches=[{}])
    (folder / "config.yaml").unlink()
    page = Page(write_report(folder).read_text())
    assert "Training loss" in page.text
    assert "Neurons" not in page.text
    assert "Time per step" not in page.text


def test_text_from_data_is_escaped(tmp_path: Path) -> None:
    """Title, question, labels, claims, configs, manifests; dollar signs do not start formulas."""
    jobs = []
    for seed in ("1", NASTY):
        for label in (NASTY, "plain"):
            run = f"run-{len(jobs)}"
            launch = {**LAUNCH, "git_commit": NASTY, "hardware": {"processor": NASTY, "threads": 1}}
            write_run(tmp_path / run, records(20), config={"note": NASTY}, launches=[launch, launch], arrays=[10])
            jobs.append(job(run, {NASTY: label, "width": "1", "seed": seed}, {NASTY: NASTY}))
    claim = {"claim": NASTY, "measure": NASTY, "where": {NASTY: NASTY, "width": "1"}, "above": 0, "source": NASTY}
    axes = {NASTY: [NASTY, "plain"], "width": ["1"], "seed": ["1", NASTY]}
    texts = dict.fromkeys(("title", "question", "source"), NASTY)
    folder = write_sweep(
        tmp_path, axes, jobs, **texts, claims=[claim], overrides={NASTY: NASTY}, baseline={NASTY: "plain"}
    )
    html = write_report(folder).read_text()
    page = Page(html)
    assert html.count("<script") == 1  # ours
    assert [tag for tag, _ in page.tags if tag == "script"] == ["script"]
    assert page.text.count(NASTY) >= 12
    assert [tag for tag, _ in page.tags].count("style") == 1


def test_panels_of_many_series_escape_their_labels(tmp_path: Path) -> None:
    """More than six series over two axes are spread over panels, whose titles hold labels."""
    jobs = []
    for optimizer in ("a", "b", "c", "d"):
        for label in (NASTY, "other"):
            run = f"run-{len(jobs)}"
            write_run(tmp_path / run, records(20))
            jobs.append(job(run, {"optimizer": optimizer, "data": label}))
    folder = write_sweep(tmp_path, {"optimizer": list("abcd"), "data": [NASTY, "other"]}, jobs, baseline=None)
    html = write_report(folder).read_text()
    assert html.count("<script") == 1
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", html)
    assert sum(caption.startswith("data &lt;script&gt;") for caption in captions) == len(captions) / 2


def test_nothing_is_fetched(tmp_path: Path) -> None:
    html = write_report(small_sweep(tmp_path)).read_text()
    page = Page(html)
    ids = [attributes["id"] for _, attributes in page.tags if attributes.get("id")]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert tag not in {"iframe", "object", "embed", "base", "form"}
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "srcset", "action", "poster", "data"):
            value = attributes.get(name) or "data:,"
            assert value.startswith(("data:", "#"))
            assert not value.startswith("#") or value[1:] in ids
    assert "@import" not in html
    assert not re.search("https?:", html)
    targets = re.findall(r"url\((.*?)\)", html)
    assert targets
    assert {target[1:] for target in targets} <= set(ids)


def test_the_same_folder_gives_the_same_page(tmp_path: Path) -> None:
    folder = small_sweep(tmp_path)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert not list(folder.glob("*.tmp"))


def test_thirty_runs_of_500_steps_stay_under_5_mb(tmp_path: Path) -> None:
    """Fifteen series: heatmaps only for the baseline and the claimed one, and the page says so."""
    axes = {"optimizer": ["muon", "aurora", "normuon"], "expansion": ["1", "2", "4", "6", "8"], "seed": ["1", "2"]}
    jobs = []
    for optimizer in axes["optimizer"]:
        for expansion in axes["expansion"]:
            for seed in axes["seed"]:
                run = f"{optimizer}-{expansion}-{seed}"
                write_run(tmp_path / run, records(500, seed=int(seed)), arrays=range(50, 501, 50), layers=4)
                jobs.append(job(run, {"optimizer": optimizer, "expansion": expansion, "seed": seed}))
    where = {"optimizer": "aurora", "expansion": "4"}
    claim = {"claim": "x", "measure": "validation_loss", "where": where, "minus": BASELINE, "below": 0}
    path = write_report(write_sweep(tmp_path, axes, jobs, claims=[claim]))
    assert path.stat().st_size < 5_000_000
    text = Page(path.read_text()).text
    assert "Only the baselines and the series named in claims are shown; 9 other series are not" in text
    assert text.count("layer 0") == 6


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", records(3))
    with pytest.raises(ReportError, match=r"expected a file name that ends in \.html"):
        write_report(folder, tmp_path / "report.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="cannot write the report"):
        write_report(folder, tmp_path / "file" / "report.html")


def test_a_loss_that_is_not_finite_is_said_and_not_replaced(tmp_path: Path) -> None:
    folder = small_sweep(tmp_path)
    rows = records(600)
    rows[-1]["validation_loss"] = None
    write_run(tmp_path / "aurora-2", rows)
    final = results(folder)["final"][1]
    assert final["not_finite"] == ["2"]
    assert set(final["validation_loss"]["values"]) == set(final["difference"]["values"]) == {"1"}
    assert "aurora: last validation loss not finite, seed 2" in Page(write_report(folder).read_text()).text


def test_skipped_steps_are_counted(tmp_path: Path) -> None:
    rows = records(20)
    rows[3] |= {"loss": None, "grad_norm": None, "skipped": True}
    folder = write_run(tmp_path / "run", rows)
    assert results(folder)["jobs"][0]["skipped_steps"] == 1
    assert "run: steps skipped: gradients not finite 1." in Page(write_report(folder).read_text()).text


def test_skipped_steps_are_named_by_what_they_were(tmp_path: Path) -> None:
    rows = records(20)
    rows[3] |= {"loss": None, "skipped": True, "skipped_because": "loss not finite"}
    for step in (5, 6):
        rows[step] |= {"skipped": True, "skipped_because": "loss spike", "loss_spike": True}
    rows[8] |= {"loss_spike": True}
    folder = write_run(tmp_path / "run", rows)
    job = results(folder)["jobs"][0]
    assert job["skipped_because"] == {"loss not finite": 1, "loss spike": 2}
    assert (job["skipped_steps"], job["loss_spikes"]) == (3, 3)
    text = Page(write_report(folder).read_text()).text
    assert "run: steps skipped: loss not finite 1, loss spike 2." in text
    assert "run: steps taken although their loss was a spike: 1." in text
    assert "gradients" not in text[text.index("run: steps skipped") : text.index("Starved")]


def test_final_numbers_over_a_numeric_axis(tmp_path: Path) -> None:
    """The axis' name is text in a figure: escaped, and no mathematics."""
    jobs = []
    for optimizer in ("muon", "aurora"):
        for width in ("2", "4", "8"):
            run = f"{optimizer}-{width}"
            write_run(tmp_path / run, records(50))
            jobs.append(job(run, {"optimizer": optimizer, NASTY: width}))
    folder = write_sweep(tmp_path, {"optimizer": ["muon", "aurora"], NASTY: ["2", "4", "8"]}, jobs)
    html = write_report(folder).read_text()
    page = Page(html)
    assert f"Over {NASTY}" in page.text
    assert html.count("<script") == 1
    section = html[html.index("<h2>Over ") :].partition("</section>")[0]
    figures = re.findall(r"<svg viewBox.*?</svg>", section, re.DOTALL)
    assert len(figures) == 4
    for figure in figures:
        assert [text for text in re.findall(r"<text[^>]*>(.*?)</text>", figure) if text in {"2", "4", "8"}] == [
            "2",
            "4",
            "8",
        ]
        assert NASTY in Page(figure).text


def test_disturbed_runs_are_named_and_left_out_of_times(tmp_path: Path) -> None:
    folder = small_sweep(tmp_path)
    write_run(tmp_path / "muon-2", records(600, seconds=99.0), launches=[LAUNCH, LAUNCH])
    found = results(folder)
    assert found["timing"][0]["left_out"] == ["muon-2: 2 launches"]
    assert found["timing"][0]["seconds"]["forward_backward"] == 0.75
    assert set(found["final"][0]["tokens_per_second"]["values"]) == {"1"}
    text = Page(write_report(folder).read_text()).text
    assert "Timings exclude runs that were interrupted or shared their CPU core: muon-2: 2 launches" in text


def test_numbers_for_people() -> None:
    assert [number(v) for v in (None, 0.0, 4.123456, -0.0123456, 12345.678, 0.00001234)] == [
        *("–", "0", "4.123", "−0.0123", "12,346", "0.0000")
    ]
    assert [share(v) for v in (None, 0.0, 0.0061, 0.25, 1.0)] == ["–", "0.0 %", "0.6 %", "25.0 %", "100 %"]
    assert CONFIG["train"]["global_batch_tokens"] == 4096
