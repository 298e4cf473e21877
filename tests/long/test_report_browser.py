"""The report in a real browser without a network: no error, nothing fetched, no horizontal scrolling.

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

from pretrain.report.write import write_report
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
    """One run with arrays."""
    return write_report(write_run(root / "run", records(600), arrays=range(100, 601, 100)))


@pytest.mark.parametrize("report", [report_of_a_sweep, report_of_a_run])
@pytest.mark.parametrize("width", [1400, 400])
def test_the_report_in_a_browser(report: Any, width: int, tab: Tab, tmp_path: Path) -> None:
    page = report(tmp_path / "runs")
    tab.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
    tab.call("Page.navigate", url=page.as_uri())
    tab.wait_for("Page.loadEventFired")
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
    assert not [e for e in tab.events if e.get("method") in ERRORS]
    logged = [e["params"] for e in tab.events if e.get("method") in ("Log.entryAdded", "Runtime.consoleAPICalled")]
    assert logged == []
