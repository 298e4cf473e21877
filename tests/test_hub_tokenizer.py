"""A tokenizer on the Hub: pinned, fetched once, kept by the run, and not needed from the network again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from pretrain.cli import main
from pretrain.config import Config
from pretrain.config.data import DataConfig
from pretrain.config.tokenizer import TokenizerConfig
from pretrain.data import DataError, hub_tokenizer, load_tokenizer
from pretrain.data.errors import DataUnavailableError
from pretrain.data.lock import load_lock
from pretrain.data.sources.retries import patient
from pretrain.launch import train
from pretrain.processes.exit_codes import STOPPED
from pretrain.run.folder import RunFolder
from tests.conftest import TINY, merged
from tests.data.corpus import make_texts, write_jsonl
from tests.data.hub_server import Hub, hub_server

MakeConfig = Callable[..., Config]
TOKEN = "hf_secretsecretsecret"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of huggingface_hub, and little patience."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub_tokenizer._commit_of.cache_clear()
    with patient(first_wait_seconds=0.005, longest_wait_seconds=0.02, silence_seconds=0.25):
        yield tmp_path / "cache"
    hub_tokenizer._commit_of.cache_clear()


@pytest.fixture
def hub(cache: Path, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server with the tokenizer of the tiny config in `made/tiny`."""
    contents = Path(tiny_config().tokenizer.path).read_bytes()
    with hub_server({"tokenizer.json": contents, "sub/other.json": contents}, "made/tiny") as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        served.stall_seconds = 0.4
        yield served


def path_of(hub: Hub, revision: str | None = None, file: str = "") -> str:
    return f"hf://made/tiny@{revision or hub.refs['main']}{file}"


def original(hub: Hub) -> bytes:
    return hub.commits[hub.refs["main"]]["tokenizer.json"]


def test_it_is_fetched_once_and_then_found_without_network(hub: Hub) -> None:
    config = TokenizerConfig(path=path_of(hub))
    with pytest.raises(DataError, match="is not on this machine: fetch it once"):
        load_tokenizer(config)
    assert not hub.requests
    assert Path(hub_tokenizer.fetch(config).path).read_bytes() == original(hub)
    asked = len(hub.requests)
    assert asked
    load_tokenizer(config)
    hub_tokenizer.fetch(config)
    assert len(hub.requests) == asked
    # Where other programs look for it, too.
    found = huggingface_hub.hf_hub_download(
        "made/tiny", "tokenizer.json", revision=hub.refs["main"], local_files_only=True
    )
    assert Path(found).read_bytes() == original(hub)
    other = TokenizerConfig(path=path_of(hub, file="/sub/other.json"))
    assert Path(hub_tokenizer.fetch(other).path).name == "other.json"


@pytest.mark.parametrize("path", ["hf://made/tiny@main", "hf://made/tiny", "hf://made/tiny@v1.0/tokenizer.json"])
def test_a_branch_is_pinned_to_its_commit(hub: Hub, path: str) -> None:
    hub.refs["v1.0"] = hub.refs["main"]
    config, data = TokenizerConfig(path=path), DataConfig(sources=[{"path": "a"}], lanes=1)
    fetched = hub_tokenizer.fetch(config, data)
    commit = hub.refs["main"]
    assert commit in fetched.path
    assert hub_tokenizer.record(config, data) == {"path": path, "pinned": f"hf://made/tiny@{commit}/tokenizer.json"}
    asked = len(hub.requests)
    load_tokenizer(config)  # as `aurora check` does, offline
    assert len(hub.requests) == asked


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hf://tiny@main", r"expected hf://ORG/NAME@REVISION"),
        ("hf://datasets/made/tiny@main", r"expected hf://ORG/NAME@REVISION"),
        (f"hf://made/gone@{40 * 'a'}", r"^tokenizer\.path hf://made/gone@.*no such repository"),
        ("hf://made/gone@main", r"^tokenizer\.path hf://made/gone@main: .*no such repository"),
        ("hf://made/tiny@v9", r"^tokenizer\.path .*no such revision"),
        ("hf://made/tiny@main/none.json", r"^tokenizer\.path .*/none\.json: .*no such file"),
    ],
)
def test_what_is_not_there_is_an_error_of_the_user(hub: Hub, path: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        hub_tokenizer.fetch(TokenizerConfig(path=path))


def test_requests_that_fail_are_repeated_in_one_place_for_as_long_as_the_config_says(hub: Hub) -> None:
    config = TokenizerConfig(path="hf://made/tiny@main")
    hub.fault_share = 0.5
    for _ in range(6):
        assert Path(hub_tokenizer.fetch(config).path).read_bytes() == original(hub)
        shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
        hub_tokenizer._commit_of.cache_clear()
    assert sum(hub.injected.values()) > 5
    hub.dead = True
    data = DataConfig(sources=[{"path": "a"}], lanes=1, retry_minutes=0.002)
    with patient(), pytest.raises(DataUnavailableError, match=r"unavailable for 0\.002 minutes \(data\.retry_minutes"):
        hub_tokenizer.fetch(config, data)


def test_a_download_that_breaks_off_leaves_no_tokenizer(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TokenizerConfig(path=path_of(hub))
    with monkeypatch.context() as broken:
        broken.setattr("pretrain.data.mirror.sync", lambda _: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            hub_tokenizer.fetch(config)
    with pytest.raises(DataError, match="is not on this machine"):
        load_tokenizer(config)
    load_tokenizer(hub_tokenizer.fetch(config))
    assert not list(cache.rglob("*.part"))


def test_a_gated_one_is_read_with_the_token_which_the_cdn_does_not_get(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    hub.token = TOKEN
    config = TokenizerConfig(path="hf://made/tiny@main")
    with pytest.raises(DataError, match="set HF_TOKEN") as error:
        hub_tokenizer.fetch(config)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub_tokenizer.fetch(config)
    to_cdn = [headers for path, headers in hub.requests if path.startswith("/cdn")]
    assert to_cdn
    assert not any("authorization" in headers for headers in to_cdn)
    assert TOKEN not in str(error.value) + caplog.text


def test_a_run_keeps_it_records_its_commit_and_resumes_without_network(hub: Hub, tiny_config: MakeConfig) -> None:
    path, commit = "hf://made/tiny@main", hub.refs["main"]
    changes = {"tokenizer.path": path, "train.total_tokens": 4 * 768, "schedule.warmup_tokens": 0}
    config = tiny_config(changes)
    assert train(config, stop_at=2) == STOPPED
    recorded = {"path": path, "pinned": f"hf://made/tiny@{commit}/tokenizer.json"}
    assert (RunFolder(config.run_folder).manifest() or {})["tokenizer"] == recorded
    assert (config.run_folder / "tokenizer.json").read_bytes() == original(hub)
    assert path in (config.run_folder / "config.yaml").read_text()
    hub.push({"tokenizer.json": b"{}"})  # the branch moves
    huggingface_hub.constants.HF_HUB_CACHE += "-gone"
    hub_tokenizer._commit_of.cache_clear()
    asked = len(hub.requests)
    assert train(config) == 0
    assert len(hub.requests) == asked
    assert (RunFolder(config.run_folder).manifest() or {})["tokenizer"] == recorded


def test_resolve_and_fetch_bring_it_to_nodes_without_internet(
    cache: Path,
    tmp_path: Path,
    tiny_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    contents = Path(tiny_config().tokenizer.path).read_bytes()
    text = write_jsonl(tmp_path / "a.jsonl", make_texts(1, 300, longest=60)).read_bytes()
    path = tmp_path / "run.yaml"
    changes: dict[str, Any] = {
        "run.root": str(tmp_path / "runs"),
        "tokenizer.path": "hf://made/tiny@main",
        "data.sources": [{"path": "hf://datasets/made/text@main/d"}],
        "data.lanes": 1,
        "data.validation_fraction": 0.0,
        "data.retry_minutes": 0.002,
        "train.total_tokens": 2 * 768,
        "schedule.warmup_tokens": 0,
    }
    path.write_text(yaml.safe_dump(merged(TINY, changes)))
    with hub_server({"tokenizer.json": contents, "d/a.jsonl": text}, "*") as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        commit = served.refs["main"]
        assert main(["data", "resolve", str(path)]) == 0
        lock = load_lock(tmp_path / "run.lock.json")
        assert lock.sources["hf://made/tiny@main"].revision == commit
        served.push({"tokenizer.json": b"{}", "d/a.jsonl": b"{}"})  # the branch moves
        shutil.rmtree(cache)
        assert main(["data", "fetch", str(path), "--to", str(tmp_path / "mirror")]) == 0
        shutil.rmtree(cache, ignore_errors=True)
        hub_tokenizer._commit_of.cache_clear()
        served.dead = True
        asked = len(served.requests)
        mirror = f"data.mirror={tmp_path / 'mirror'}"
        assert main(["check", str(path), mirror]) == 0
        assert main(["data", "prepare", str(path), mirror, "--to", str(tmp_path / "to")]) == 0
        assert main(["train", str(path), mirror]) == 0
        assert len(served.requests) == asked
        manifest = json.loads((tmp_path / "runs" / "tiny" / "manifest.json").read_text())
        assert manifest["tokenizer"]["pinned"] == f"hf://made/tiny@{commit}/tokenizer.json"
        assert (tmp_path / "to" / "tokenizer.json").read_bytes() == contents
        # What lacks the tokenizer says so, and does not wait for the network.
        shutil.rmtree(tmp_path / "mirror" / "hf" / "made")
        capsys.readouterr()
        assert main(["data", "prepare", str(path), mirror, "--to", str(tmp_path / "other")]) == 2
        assert "the mirror lacks the tokenizer hf://made/tiny@" in capsys.readouterr().err
        other = "tokenizer.path=hf://made/tiny@v2"
        assert main(["data", "prepare", str(path), mirror, other, "--to", str(tmp_path / "other")]) == 2
        assert "does not hold the tokenizer hf://made/tiny@v2" in capsys.readouterr().err
        assert len(served.requests) == asked
