"""The report in a real browser without a network: no error, nothing fetched, no horizontal scrolling; its first screen,
its dark mode, sorting, and the values under the pointer.

Headless Chromium is driven over its debugging port.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websocket

from pretrain.cli.evaluated_runs import evaluations
from pretrain.report.write import write_report
from tests.eval.results import a_result, write
from tests.report.folders import job, records, write_run, write_sweep

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = [pytest.mark.long, pytest.mark.skipif(BROWSER is None, reason="not run: no chromium")]

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-port=0",
)
# Relative luminance and contrast as WCAG 2.1 defines them.
LUMINANCE = """
const luminance = (colour) => {
  const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map((part) => {
    const c = part / 255;
    return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
"""
CONTRASTS = f"""(() => {{ {LUMINANCE}
const paper = luminance(getComputedStyle(document.body).backgroundColor);
const texts = [...document.querySelectorAll("main *")].filter(
  (e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length);
return texts.map((e) => {{
  const style = getComputedStyle(e);
  const ink = luminance(e.closest("svg") ? style.fill : style.color);
  return (Math.max(paper, ink) + 0.05) / (Math.min(paper, ink) + 0.05);
}});
}})()"""
ERRORS = ("Runtime.exceptionThrown", "Network.loadingFailed")


class Tab:
    """A page of the browser: sends commands, keeps the events."""

    def __init__(self, address: str) -> None:
        # Without an origin header: the browser refuses those that it was not told of.
        self._socket = websocket.create_connection(address, timeout=30, suppress_origin=True)
        self._sent = 0
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._sent += 1
        self._socket.send(json.dumps({"id": self._sent, "method": method, "params": parameters}))
        while (message := json.loads(self._socket.recv())).get("id") != self._sent:
            self.events.append(message)
        assert "error" not in message, message
        return message["result"]

    def wait_for(self, event: str) -> None:
        """Wait until an event has come."""
        while not any(message.get("method") == event for message in self.events):
            self.events.append(json.loads(self._socket.recv()))

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


@pytest.fixture
def tab(tmp_path: Path) -> Iterator[Tab]:
    """A tab of a browser of its own, without a network."""
    assert BROWSER is not None
    folder = tmp_path / "browser"
    with (tmp_path / "browser.log").open("w") as log:
        process = subprocess.Popen(
            [BROWSER, *FLAGS, f"--user-data-dir={folder}", "about:blank"], stderr=log, stdout=log
        )
    try:
        found = Tab(_address(folder / "DevToolsActivePort", process))
        for domain in ("Page", "Log", "Runtime", "Network"):
            found.call(f"{domain}.enable")
        found.call(
            "Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0
        )
        yield found
        found.close()
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _address(file: Path, process: subprocess.Popen[bytes]) -> str:
    """Address of the first page, once the browser has written its port."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and (lines := file.read_text().split()):
            with urllib.request.urlopen(f"http://127.0.0.1:{lines[0]}/json", timeout=10) as answer:
                pages = [target for target in json.load(answer) if target["type"] == "page"]
            if pages:
                return str(pages[0]["webSocketDebuggerUrl"])
        time.sleep(0.1)
    raise AssertionError("the browser did not open its debugging port")


def report_of_a_sweep(root: Path) -> Path:
    """Eight series with long names, one job missing, arrays, claims with long texts."""
    axes = {"optimizer": ["muon", "aurora", "u_normuon", "adamw"], "expansion": ["2", "4"], "seed": ["1", "2"]}
    jobs = []
    for optimizer in axes["optimizer"]:
        for expansion in axes["expansion"]:
            for seed in axes["seed"]:
                run = f"{optimizer}-{expansion}-{seed}-0123456789abcdef0123456789abcdef"
                if (optimizer, expansion, seed) != ("adamw", "4", "2"):
                    write_run(
                        root / run, records(600, seed=int(seed)), arrays=range(100, 601, 100) if seed == "1" else ()
                    )
                jobs.append(
                    job(run, {"optimizer": optimizer, "expansion": expansion, "seed": seed}, {"optimizer.lr": 0.02})
                )
    where = {"optimizer": "aurora"}
    claims = [
        {"claim": "long " * 40, "measure": "validation_loss", "where": {**where, "expansion": "4"}, "below": 5},
        {"claim": "x" * 90, "measure": "validation_loss", "where": where, "slope_over": "expansion", "above": 0},
    ]
    return write_report(write_sweep(root, axes, jobs, claims=claims, question="unbroken" * 30))


def report_of_a_run(root: Path) -> Path:
    """One run with arrays, samples, and evaluations of three checkpoints."""
    folder = write_run(root / "run", records(600), arrays=range(100, 601, 100))
    for step in (200, 400, 600):
        write(
            folder / "eval" / f"step-{step}", a_result({"winogrande": [1] * step + [0] * 400, "unbroken" * 20: [1, 0]})
        )
    samples = [{"step": step, "prompt": "So", "text": "unbroken" * 40} for step in (300, 600)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return write_report(folder, None, evaluations)


def open_page(tab: Tab, page: Path, width: int, height: int = 900, scheme: str = "light") -> None:
    """Open a page in a window of this size and a colour scheme."""
    tab.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
    tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    tab.events[:] = [e for e in tab.events if e.get("method") != "Page.loadEventFired"]  # of an earlier page
    tab.call("Page.navigate", url=page.as_uri())
    tab.wait_for("Page.loadEventFired")


def problems(tab: Tab) -> list[Any]:
    """What the browser reported: errors, messages on the console, violations of the page's security policy."""
    logged = [e["params"] for e in tab.events if e.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled")]
    return logged + [e for e in tab.events if e.get("method") in ERRORS]


@pytest.mark.parametrize("report", [report_of_a_sweep, report_of_a_run])
@pytest.mark.parametrize("width", [1400, 400])
def test_the_report_in_a_browser(report: Any, width: int, tab: Tab, tmp_path: Path) -> None:
    page = report(tmp_path / "runs")
    open_page(tab, page, width)
    assert tab.evaluate("document.querySelectorAll('figure svg').length") > 10
    opened = "document.querySelectorAll('details').forEach(d => d.open = true), document.documentElement.scrollWidth"
    assert tab.evaluate("innerWidth") == width
    assert tab.evaluate(opened) <= width
    # Nothing sticks out of the page, and text in the figures can be read.
    assert (
        tab.evaluate("Math.max(...[...document.querySelectorAll('main *')].map(e => e.getBoundingClientRect().right))")
        <= width
    )
    sizes = "[...document.querySelectorAll('figure svg text')].map(e => e.getBoundingClientRect().height)"
    assert tab.evaluate(f"Math.min(...{sizes}.filter(h => h > 0))") >= 9
    asked = [e["params"]["request"]["url"] for e in tab.events if e.get("method") == "Network.requestWillBeSent"]
    assert {url for url in asked if not url.startswith("data:")} == {page.as_uri()}
    assert problems(tab) == []


@pytest.mark.parametrize("report", [report_of_a_sweep, report_of_a_run])
def test_a_telephone_shows_the_result_first(report: Any, tab: Tab, tmp_path: Path) -> None:
    open_page(tab, report(tmp_path / "runs"), 400, 800)
    places = "[...document.querySelectorAll('{}')].map(e => e.getBoundingClientRect().top)"
    tiles = tab.evaluate(places.format(".tiles li"))
    assert len(tiles) >= 2
    assert max(tiles) < 760
    assert tab.evaluate(places.format("#provenance dt"))[0] > 800


def test_dark_mode_can_be_read(tab: Tab, tmp_path: Path) -> None:
    """Every text of the page and of its figures has a contrast of 4.5 to the background (WCAG 2.1, AA)."""
    page = report_of_a_run(tmp_path / "runs")
    for scheme in ("light", "dark"):
        open_page(tab, page, 1400, scheme=scheme)
        contrasts = tab.evaluate(CONTRASTS)
        assert len(contrasts) > 50
        assert min(contrasts) >= 4.5, scheme
        bright = tab.evaluate(f"{LUMINANCE} luminance(getComputedStyle(document.body).backgroundColor)")
        assert (bright > 0.5) == (scheme == "light")
    assert problems(tab) == []


def test_a_click_sorts_and_the_pointer_shows_values(tab: Tab, tmp_path: Path) -> None:
    open_page(tab, report_of_a_sweep(tmp_path / "runs"), 1400)
    column = "[...document.querySelectorAll('#final tbody tr')].map(r => r.cells[2].textContent.trim())"
    click = "document.querySelector('#final thead').rows[0].cells[2].click()"
    before = tab.evaluate(column)
    tab.evaluate(click)
    rising = tab.evaluate(column)
    assert sorted(rising) == sorted(before)
    numbers = [float(text.split()[0]) for text in rising if text != "–"]
    assert numbers == sorted(numbers)
    assert len(numbers) >= 7
    tab.evaluate(click)
    falling = [float(text.split()[0]) for text in tab.evaluate(column) if text != "–"]
    assert falling == numbers[::-1]
    assert tab.evaluate("document.querySelectorAll('[aria-sort=descending]').length") == 1

    tab.evaluate("document.querySelector('#loss svg[data-hover]').scrollIntoView({block: 'center'})")
    time.sleep(0.3)
    place = "(r => [r.left + r.width * 0.6, r.top + r.height * 0.5])"
    x, y = tab.evaluate(f"{place}(document.querySelector('#loss svg[data-hover]').getBoundingClientRect())")
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    shown = tab.evaluate("document.querySelector('.tip').hidden ? '' : document.querySelector('.tip').innerText")
    assert shown.startswith("tokens ")
    assert "muon" in shown
    assert "aurora" in shown
    tab.call("Input.dispatchMouseEvent", type="mouseMoved", x=1, y=1)
    assert tab.evaluate("document.querySelector('.tip').hidden")
    assert problems(tab) == []


def test_a_foreign_script_does_not_run(tab: Tab, tmp_path: Path) -> None:
    """Should something escape the escaping, the page's policy stops it."""
    page = report_of_a_run(tmp_path / "runs")
    page.write_text(page.read_text().replace("<main>", "<main><script>window.ran = true</script>", 1))
    open_page(tab, page, 1400)
    assert tab.evaluate("window.ran === undefined")
    assert "Content Security Policy" in str(problems(tab))
