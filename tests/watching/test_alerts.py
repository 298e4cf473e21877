"""What a webhook gets, and that nothing which goes wrong with it reaches the run or shows its URL."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli.check import check_webhook
from pretrain.config import ConfigError, parse_config
from pretrain.processes.errors import UserError
from pretrain.training.guards import Guards
from pretrain.training.state import TrainState
from pretrain.watching import alerts
from pretrain.watching.alerts import Alerts, read_webhook
from tests.conftest import TINY, merged
from tests.counting.where import configured, train

SECRET = "canary-4711"


class Server:
    """Answers with the next of `answers`, then with 200; a number of seconds instead of a status never answers."""

    def __init__(self) -> None:
        self.got: list[dict[str, Any]] = []
        self.answers: list[int] = []
        self.silent = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                status = outer.answers.pop(0) if outer.answers else 200
                if status == 0:
                    outer.silent.wait(30)
                self.send_response(status or 200)
                self.send_header("Location", f"{outer.url}/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/{SECRET}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.silent.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(alerts, "PAUSE_SECONDS", 0.01)
    opened = Server()
    yield opened
    opened.close()


def test_an_alert_says_what_happened_when_and_on_which_rank(server: Server) -> None:
    told = Alerts(server.url, "a-run", 3)
    told.send("failed", "MemoryError: no memory", step=17)
    told.send("failed", "MemoryError: no memory", step=18)  # the same again
    told.send("done", "after step 20 of https://user:password@example.test/a?token=b", step=20)
    told.close()
    first, second = server.got
    host = socket.gethostname()
    assert first["text"] == f"a-run: failed: MemoryError: no memory (rank 3 on {host})"
    assert (first["run"], first["kind"], first["rank"], first["host"], first["step"]) == (
        "a-run",
        "failed",
        3,
        host,
        17,
    )
    assert first["time"].startswith("20")
    assert (second["kind"], second["message"]) == ("done", "after step 20 of https://example.test/a")


@pytest.mark.parametrize(
    ("answers", "tries", "problem"),
    [
        ([503, 429], 3, None),
        ([500] * 9, 3, "the server answered 500"),
        ([404], 1, "the server answered 404"),
        ([302], 1, "the server answered 302"),
    ],
)
def test_tries_are_bounded(answers: list[int], tries: int, problem: str | None, server: Server) -> None:
    server.answers, said = answers, []
    told = Alerts(server.url, "a-run", 0, said.append)
    told.send("hang", "rank 1 hangs")
    told.close()
    assert len(server.got) == tries
    assert said == ([] if problem is None else [f"an alert could not be delivered to watch.webhook: {problem}"])


def test_a_server_that_is_silent_or_gone_delays_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.answers = [0]
    said: list[str] = []
    told = Alerts(server.url, "a-run", 0, said.append)
    started = time.monotonic()
    for number in range(3 * alerts.WAITING):
        told.send("warning", str(number))
    told.close(0.2)
    assert time.monotonic() - started < 3  # not the 5 seconds of a request, let alone of all of them
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        told = Alerts(f"http://127.0.0.1:{closed.getsockname()[1]}/{SECRET}", "a-run", 0, said.append)
        told.send("done", "after step 1")
        told.close()
    assert said
    assert SECRET not in "".join(said)


def test_the_url_comes_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_webhook(None) is None
    monkeypatch.setenv("HOOK", f" https://example.test/{SECRET}\n")
    assert read_webhook("env:HOOK") == f"https://example.test/{SECRET}"
    (tmp_path / "hook").write_text(f"http://127.0.0.1:1/{SECRET}\n")
    assert read_webhook(f"file:{tmp_path / 'hook'}") == f"http://127.0.0.1:1/{SECRET}"
    for bad in (
        "",
        SECRET,
        f"ftp://{SECRET}",
        f"https://[{SECRET}",
        f"https://a b/{SECRET}",
        "https://a/" + "b" * 5000,
    ):
        (tmp_path / "hook").write_text(bad)
        with pytest.raises(UserError, match=r"watch\.webhook") as error:
            read_webhook(f"file:{tmp_path / 'hook'}")
        assert SECRET not in str(error.value)
    for missing in (f"file:{tmp_path / 'none'}", f"file:{tmp_path}", "file:/dev/zero", "env:NO_SUCH_HOOK"):
        with pytest.raises(UserError, match=r"watch\.webhook"):
            read_webhook(missing)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"watch.webhook": f"https://example.test/{SECRET}"}, r"watch\.webhook: expected env:NAME"),
        ({"watch.webhook": "env:A B"}, r"watch\.webhook: expected env:NAME"),
        ({"watch.hang_seconds": 100, "watch.slow_seconds": 50}, r"watch\.slow_seconds: expected at least"),
        ({"watch.hang_seconds": None, "watch.slow_seconds": 50}, r"watch\.slow_seconds: has no effect"),
        ({"watch.hang_seconds": 0.5}, r"watch\.hang_seconds"),
        ({"watch.straggler_factor": 1}, r"watch\.straggler_factor"),
    ],
)
def test_bad_settings_are_refused_without_showing_the_url(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as error:
        parse_config(merged(TINY, changes))
    assert SECRET not in str(error.value)


def test_a_run_that_fails_tells_why_and_keeps_the_url_to_itself(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def die(self: Guards, state: TrainState) -> None:
        if state.step == 2:
            raise RuntimeError("kernel failed")

    monkeypatch.setenv("HOOK", server.url)
    config = configured(str(tmp_path), {"watch.webhook": "env:HOOK", "data.validation_fraction": 0.0})
    with monkeypatch.context() as patched:
        patched.setattr(Guards, "check", die)
        with pytest.raises(RuntimeError, match="kernel failed"):
            train(config)
    assert train(config, stop_at=3) == 75
    failed, stopped = server.got
    assert (failed["kind"], failed["message"], failed["step"]) == ("failed", "RuntimeError: kernel failed", 2)
    assert (stopped["kind"], stopped["step"]) == ("stopped", 3)
    files = [path for path in config.run_folder.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in "".join(capfd.readouterr())


def test_check_refuses_what_the_run_would_refuse_at_its_start(tmp_path: Path) -> None:
    (tmp_path / "hook").write_text(SECRET)
    for file in (tmp_path / "hook", tmp_path, Path("/dev/zero")):
        with pytest.raises(UserError, match=r"watch\.webhook") as error:
            check_webhook(parse_config(merged(TINY, {"watch.webhook": f"file:{file}"})))
        assert SECRET not in str(error.value)
    (tmp_path / "hook").write_text("https://example.test/x")
    # What is not on this machine may be on that of the run.
    for setting in (f"file:{tmp_path / 'hook'}", f"file:{tmp_path / 'none'}", "env:NO_SUCH_HOOK", None):
        check_webhook(parse_config(merged(TINY, {"watch.webhook": setting})))
