"""The looks of the page: results first, labels and units, both colour schemes, values under the pointer."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from pretrain.report.arrays import survival, why_no_survival
from pretrain.report.write import results, write_report
from pretrain.run.reader import read_run
from tests.report.folders import CONFIG, job, records, write_run, write_sweep
from tests.report.test_page import NASTY, Page, small_sweep

HASH = "0123456789abcdef0123456789abcdef01234567"


def section(html: str, name: str) -> str:
    return html[html.index(f'<section id="{name}">') :].partition("</section>")[0]


def hovers(html: str) -> dict[str, Any]:
    """The data of the page's figures, by label."""
    found = re.findall(r'aria-label="([^"]*)" data-hover="([^"]*)"', html)
    return {unescape(label): json.loads(unescape(data)) for label, data in found}


def three_seeds(root: Path, losses: dict[str, list[float]], **changes: Any) -> Path:
    jobs = []
    for name, values in losses.items():
        for seed, loss in enumerate(values, start=1):
            write_run(root / f"{name}-{seed}", records(100, loss=loss), config={"run": {"seed": seed}})
            jobs.append(job(f"{name}-{seed}", {"optimizer": name, "seed": str(seed)}))
    axes = {"optimizer": list(losses), "seed": [str(seed) for seed in range(1, 1 + max(map(len, losses.values())))]}
    return write_sweep(root, axes, jobs, **changes)


MUON = [4.0, 4.1, 4.2]
LOSSES = {"muon": MUON, "aurora": [3.99, 4.088, 4.191], "adamw-0.5": [6.0, 6.1, 6.3]}
CLAIM = {"measure": "validation_loss", "where": {"optimizer": "aurora"}}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sweep with a claim of each outcome."""
    claims = [
        {**CLAIM, "claim": "it is lower", "minus": {"optimizer": "muon"}, "below": 0},
        {**CLAIM, "claim": "it is above nine", "above": 9},
        {**CLAIM, "claim": "it is below 4.1", "below": 4.1},
        {**CLAIM, "claim": "no such thing", "measure": "telemetry/no", "below": 4.1},
    ]
    return write_report(three_seeds(tmp_path_factory.mktemp("runs"), LOSSES, claims=claims)).read_text()


def test_results_come_before_questions_and_commits(page: str) -> None:
    text = Page(page).text
    places = [text.index(part) for part in ("A made-up sweep", "1 of 4", "Does it work?", "it is lower", "AMD EPYC")]
    assert places == sorted(places)
    assert text.index(HASH) > text.index("Time per step")
    tiles = re.findall(r'<li class="(\w+)"><span class="label">([\w ]+)</span><span class="value">([^<]*)', page)
    assert tiles == [
        ("holds", "holds", "1 of 4"),
        ("contradicted", "does not hold", "1 of 4"),
        ("undecided", "undecided", "1 of 4"),
        ("untested", "not tested", "1 of 4"),
    ]
    assert "lowest validation loss" in text
    assert "aurora; −0.0103 ± 0.0038 against muon" in text


def test_an_undecided_claim_does_not_look_like_a_contradicted_one(page: str) -> None:
    badges = re.findall(r'<span class="badge (\w+)">([\w ]+)</span>', page)
    assert badges == [
        ("holds", "holds"),
        ("contradicted", "does not hold"),
        ("undecided", "undecided"),
        ("untested", "not tested"),
    ]
    assert "Intervals over seeds cover the initialisation only" in section(page, "claims")


def test_every_figure_has_labels_and_units(tmp_path: Path, page: str) -> None:
    run = write_report(write_run(tmp_path / "run", records(100), arrays=range(50, 101, 50))).read_text()
    for html in (page, run):
        for svg in re.findall(r"<svg viewBox.*?</svg>", section(html, "loss"), re.DOTALL):
            assert ">nats per token<" in svg
        assert html.count(">share of rows<") >= 2
    for label in (">bits per byte<", ">L2 norm<", ">learning rate<"):
        assert label in section(run, "training")
    assert '<section id="training">' not in page


def test_differences_of_a_hundredth_can_be_seen(page: str) -> None:
    """The baseline has none; AdamW, two nats behind, is an arrow at the edge of the panel."""
    panel = section(page, "differences")
    assert "aurora: −0.0103 ± 0.0038" in panel
    assert "adamw-0.5: +2.0333 ± 0.1434" in panel
    assert "muon:" not in panel
    ticks = [float(text.replace("−", "-")) for text in re.findall(r">([−-]?[0-9.]+)</text>", panel)]
    assert max(ticks) - min(ticks) <= 0.05
    curve = hovers(page)["Difference of validation loss to the baseline"]
    assert [line["name"] for line in curve["lines"]] == ["aurora", "adamw-0.5"]
    x, mean, low, high = curve["lines"][0]["points"][-1]
    assert (x, mean) == (409600, pytest.approx(-0.0103333, abs=1e-6))
    assert (low, high) == (pytest.approx(mean - 0.0037946, abs=1e-5), pytest.approx(mean + 0.0037946, abs=1e-5))


def test_loss_against_learning_rate(tmp_path: Path) -> None:
    html = write_report(small_sweep(tmp_path)).read_text()
    found = hovers(section(html, "tuned"))["Validation loss against optimizer.lr over optimizer.lr"]
    points = {line["name"]: [point[:2] for point in line["points"]] for line in found["lines"]}
    assert points["muon"] == [[0.02, pytest.approx(4.61991, abs=1e-4)], [0.05, pytest.approx(4.70991, abs=1e-4)]]
    assert found["logarithmic"]


def test_both_colour_schemes(page: str) -> None:
    """No figure has a colour of its own: lines, text, axes and marks follow the page."""
    assert "prefers-color-scheme: dark" in page
    body = page[page.index("<main>") :]
    for colour in ("#0072b2", "#d55e00", "#3d434b", "#8a8f98", "#e6e8eb", "#000000"):
        assert f": {colour}" not in body.lower()
    used = set(re.findall(r"var\((--[\w-]+)\)", page))
    light, dark = (set(re.findall(r"(--[\w-]+):", part)) for part in page.split("prefers-color-scheme: dark")[:2])
    assert used <= light
    assert light <= dark


def test_colours_in_texts_stay(tmp_path: Path) -> None:
    label = ' style="fill: #000000" '
    write_run(tmp_path / "run", records(50))
    jobs = [job("run", {"optimizer": "muon", label: width}) for width in ("2",)]
    write_run(tmp_path / "other", records(50))
    jobs.append(job("other", {"optimizer": "muon", label: "4"}))
    html = write_report(write_sweep(tmp_path, {"optimizer": ["muon"], label: ["2", "4"]}, jobs)).read_text()
    assert Page(html).text.count(label) >= 5
    assert "var(--line-6)" not in html[html.index("<main>") :]


def test_the_only_script_that_may_run_is_ours(page: str) -> None:
    tags = Page(page).tags
    policy = next(
        attributes["content"] for tag, attributes in tags if tag == "meta" and "content-sec" in str(attributes).lower()
    )
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(script) == 1
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in str(policy)
    assert str(policy).startswith("default-src 'none'")


def test_values_under_the_pointer_are_those_of_the_records(tmp_path: Path) -> None:
    rows = records(40)
    html = write_report(write_run(tmp_path / "run", rows)).read_text()
    found = hovers(html)["Learning rate of the matrices"]
    assert found["lines"][0]["points"][0] == [1, 0.02]
    assert found["label"] == "steps"
    losses = hovers(html)["Validation loss against tokens"]["lines"][0]["points"]
    assert losses == [[4096 * 40, pytest.approx(rows[-1]["validation_loss"], rel=1e-5)]]
    assert 0 < found["box"][0] < found["box"][2] <= 1
    assert hovers(html)["Activation-dead neurons"]["share"]


def test_names_in_the_data_of_figures_are_escaped(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_run(tmp_path / name, records(50))
    jobs = [job("a", {"optimizer": NASTY}), job("b", {"optimizer": "muon"})]
    html = write_report(write_sweep(tmp_path, {"optimizer": [NASTY, "muon"]}, jobs)).read_text()
    assert hovers(html)["Validation loss against tokens"]["lines"][0]["name"] == NASTY


def test_a_run_shows_its_samples(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", records(20))
    samples = [
        {"step": step, "prompt": prompt, "text": f"{NASTY} {step}."} for step in range(1, 71) for prompt in ("", "So")
    ]
    lines = [json.dumps(sample) for sample in samples]
    (folder / "samples.jsonl").write_text("\n".join([*lines, '{"step": 20, "prompt": 3}', '{"step": 2']))
    assert results(folder)["samples"] == samples
    html = write_report(folder).read_text()
    shown, _, earlier = section(html, "samples").partition("<details>")
    assert Page(shown).text.count(f"{NASTY} 70.") == 2
    assert Page(earlier).text.count(f"{NASTY} 20.") == 2
    assert f"{NASTY} 19." not in Page(earlier).text
    assert "The newest 100 of 138" in earlier
    assert "samples" not in results(write_run(tmp_path / "none", records(5)))


@pytest.mark.parametrize(
    ("arrays", "config", "said"),
    [
        ((), {}, "there are no telemetry arrays"),
        ((400, 500), {}, "no telemetry arrays with the leverage of all matrices are later than step 500"),
        (
            (50, 100),
            {"telemetry": {"reference_step": 20}},
            "the first telemetry arrays, of step 50, are later than step 20",
        ),
        ((1, 100), {"telemetry": {"reference_step": 2}}, "no row was dead at step 1"),
    ],
)
def test_arrays_are_said_to_be_missing_only_where_they_are(
    arrays: tuple[int, ...], config: dict[str, Any], said: str, tmp_path: Path
) -> None:
    folder = write_run(tmp_path / "run", records(100), arrays=arrays, config=config)
    assert survival(read_run(folder)) is None
    assert why_no_survival(read_run(folder)) == said


def test_the_page_says_why_dead_rows_are_not_followed(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", records(100), arrays=(1, 100), config={"telemetry": {"reference_step": 2}})
    text = Page(write_report(folder).read_text()).text
    assert "Whether dead rows stay dead is not shown: no row was dead at step 1." in text
    assert "missing" not in text
    assert CONFIG["model"]["num_layers"] == 4


def test_rows_that_are_followed_miss_nothing(tmp_path: Path) -> None:
    assert why_no_survival(read_run(write_run(tmp_path / "run", records(3), arrays=(500, 600)))) == ""
