"""The comparison page in a real browser without a network: no error, nothing fetched, no sideways scrolling."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.cli import main
from tests.comparison.files import MODELS, facts, outcomes, write_files, write_result
from tests.comparison.test_page import CONFIG
from tests.long.test_report_browser import ERRORS, Tab, pytestmark, tab  # noqa: F401

LONG = "x" * 70


def page_of(kind: str, root: Path) -> Path:
    """The shipped config without results, or made-up models of which some were run."""
    config, results = CONFIG, []
    if kind == "measured":
        data = facts(models__ours__note=f"unbroken{LONG}", by_data__0__scores={LONG: 0.7, "other": 0.6})
        config = write_files(root, data, {**MODELS, LONG: f"org/{LONG}"})
        results = [str(root)]
        for seed, (label, model) in enumerate([*MODELS.items(), (LONG, f"org/{LONG}")]):
            if label != "third":
                scores = {task: outcomes(500, 0.4 + 0.05 * seed, seed) for task in ("hellaswag", "winogrande", LONG)}
                write_result(root, label, scores, model)
    assert main(["compare-page", str(config), *results, "--out", str(root / "page")]) == 0
    return root / "page/comparison.html"


def rgb(colour: str) -> list[int]:
    return [int(part) for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]


@pytest.mark.parametrize("kind", ["paper", "measured"])
@pytest.mark.parametrize("width", [1280, 360])
def test_the_page_in_a_browser(kind: str, width: int, tab: Tab, tmp_path: Path) -> None:  # noqa: F811
    page = page_of(kind, tmp_path)
    tab.call("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
    tab.call("Page.navigate", url=page.as_uri())
    tab.wait_for("Page.loadEventFired")
    assert tab.evaluate("document.querySelectorAll('figure svg').length") > 0
    assert tab.evaluate("innerWidth") == width
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    right = "Math.max(...[...document.querySelectorAll('main *')].map(e => e.getBoundingClientRect().right))"
    assert tab.evaluate(right) <= width
    sizes = "[...document.querySelectorAll('figure svg text')].map(e => e.getBoundingClientRect().height)"
    assert tab.evaluate(f"Math.min(...{sizes}.filter(h => h > 0))") >= 9
    for scheme in ("light", "dark"):
        tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        ink, paper, label = (
            rgb(tab.evaluate(f"getComputedStyle(document.querySelector('{where}')).{what}"))
            for where, what in (("body", "color"), ("body", "backgroundColor"), ("figure svg text", "fill"))
        )
        darker, lighter = (paper, ink) if scheme == "dark" else (ink, paper)
        assert sum(lighter) - sum(darker) > 500
        assert (sum(label) > sum(paper)) == (scheme == "dark")
    asked = [e["params"]["request"]["url"] for e in tab.events if e.get("method") == "Network.requestWillBeSent"]
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
    assert not [e for e in tab.events if e.get("method") in ERRORS]
    logged = [e["params"] for e in tab.events if e.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled")]
    assert logged == []


def test_tables_are_sorted_by_the_column_that_is_pressed(tab: Tab, tmp_path: Path) -> None:  # noqa: F811
    tab.call("Emulation.setDeviceMetricsOverride", width=1280, height=800, deviceScaleFactor=1, mobile=False)
    tab.call("Page.navigate", url=page_of("measured", tmp_path).as_uri())
    tab.wait_for("Page.loadEventFired")
    table = "document.querySelector('#scores table')"
    order = f"[...{table}.tBodies[0].rows].map(row => row.cells[0].textContent)"
    press = f"{table}.tHead.rows[0].cells[1].click()"
    assert tab.evaluate(order) == ["ours", "theirs", "third", LONG]
    tab.evaluate(press)
    assert tab.evaluate(order) == ["ours", "theirs", LONG, "third"]
    assert tab.evaluate(f"{table}.tHead.rows[0].cells[1].getAttribute('aria-sort')") == "ascending"
    tab.evaluate(press)
    assert tab.evaluate(order) == [LONG, "theirs", "ours", "third"]  # what was not run stays last
    assert tab.evaluate(f"{table}.tHead.rows[0].cells[1].getAttribute('aria-sort')") == "descending"
    assert not [e for e in tab.events if e.get("method") in ERRORS]
