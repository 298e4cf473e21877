"""A tokenizer on the Hub: fetched once, kept by the run, and not needed from the network again."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from pretrain.config import Config
from pretrain.config.tokenizer import TokenizerConfig
from pretrain.data import DataError, hub_tokenizer, load_tokenizer
from pretrain.launch import train
from pretrain.processes.exit_codes import STOPPED

MakeConfig = Callable[..., Config]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PATH = f"hf://made/tiny@{COMMIT}"


class Server(ThreadingHTTPServer):
    """Serves one file under two names, in one repository."""

    contents = b""
    requests = 0


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        if self.answer():
            self.wfile.write(self.server.contents)

    def answer(self) -> bool:
        self.server.requests += 1
        names = [
            f"/made/tiny/resolve/{revision}/{name}" for revision in (COMMIT, "main") for name in ("tokenizer.json",)
        ]
        found = self.path in [*names, f"/made/tiny/resolve/{COMMIT}/sub/other.json"]
        self.send_response(200 if found else 404)
        self.send_header("X-Repo-Commit", COMMIT)
        if not found:
            known = self.path.startswith("/made/tiny/")
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        self.send_header("ETag", f'"{hashlib.sha256(self.server.contents).hexdigest()}"')
        self.send_header("Content-Length", str(len(self.server.contents) if found else 0))
        self.end_headers()
        return found

    def log_message(self, *_: Any) -> None:
        """Silent."""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: MakeConfig) -> Iterator[Server]:
    """A server with the tokenizer of the tiny config, and an empty cache."""
    with Server(("127.0.0.1", 0), Handler) as server:
        server.contents = Path(tiny_config().tokenizer.path).read_bytes()
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("NO_PROXY", "*")
        yield server
        server.shutdown()


def test_it_is_fetched_once_and_then_found_without_network(hub: Server) -> None:
    config = TokenizerConfig(path=PATH)
    with pytest.raises(DataError, match="is not in the cache of huggingface_hub: fetch it once"):
        load_tokenizer(config)
    assert not hub.requests
    assert Path(hub_tokenizer.fetch(config).path).read_bytes() == hub.contents
    asked = hub.requests
    assert asked
    load_tokenizer(config)
    hub_tokenizer.fetch(config)
    assert hub.requests == asked
    other = TokenizerConfig(path=f"{PATH}/sub/other.json")
    assert Path(hub_tokenizer.fetch(other).path).name == "other.json"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hf://made/tiny", r"expected hf://ORG/NAME@REVISION"),
        ("hf://tiny@main", r"expected hf://ORG/NAME@REVISION"),
        (f"hf://made/gone@{COMMIT}", "no such repository"),
        (f"{PATH}/none.json", "no such file"),
    ],
)
def test_what_is_not_there_is_an_error_of_the_user(hub: Server, path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        hub_tokenizer.fetch(TokenizerConfig(path=path))


def test_a_run_keeps_it_and_resumes_without_network(hub: Server, tiny_config: MakeConfig) -> None:
    changes = {"tokenizer.path": PATH, "train.total_tokens": 4 * 768, "schedule.warmup_tokens": 0}
    config = tiny_config(changes)
    assert train(config, stop_at=2) == STOPPED
    assert (config.run_folder / "tokenizer.json").read_bytes() == hub.contents
    assert PATH in (config.run_folder / "config.yaml").read_text()
    hub.shutdown()
    huggingface_hub.constants.HF_HUB_CACHE += "-gone"
    asked = hub.requests
    assert train(config) == 0
    assert hub.requests == asked
