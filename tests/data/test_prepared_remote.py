"""Prepared data on a server gives the stream of the same folder on this machine, through a mirror or a cache."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data import DataError, TokenStream, make_catalog, survey
from pretrain.data.catalog import resolve_sources
from pretrain.data.estimate import AT_START, estimate_sources
from pretrain.data.lock import Lock, load_lock, locked_sources, save_lock
from pretrain.data.mirror import fetch, mirror_path
from pretrain.data.prepared import speedrun
from pretrain.data.prepared.layout import load_index
from pretrain.data.prepared.plan import PrepareOptions
from pretrain.data.prepared.prepare import prepare
from pretrain.data.sources.retries import patient
from pretrain.data.tokenizer import DocumentEncoder, load_tokenizer
from tests.data.corpus import Setting, drain, make_setting, make_texts, write_parquet
from tests.data.hub_server import Hub, hub_server
from tests.data.store import remote_config
from tests.data.test_prepared import contents
from tests.data.test_speedrun_shards import gpt2, sample, write_bin

pytestmark = pytest.mark.usefixtures("warm")

__all__ = ["gpt2"]


@pytest.fixture(autouse=True)
def _impatient() -> Iterator[None]:
    with patient(first_wait_seconds=0.005, longest_wait_seconds=0.02, silence_seconds=0.25):
        yield


@pytest.fixture
def local(tmp_path: Path, tokenizer: TokenizerConfig) -> Setting:
    """A prepared folder of several shards, each of several units."""
    text = make_setting(tokenizer, write_parquet(tmp_path / "a.parquet", make_texts(3, 150), 6), lanes=3, epochs=2)
    prepare(text.config, tokenizer, tmp_path / "served" / "deep", options=PrepareOptions(900))
    return text.changed(sources=[{"path": str(tmp_path / "served" / "deep")}], validation_fraction=0.2)


def connect(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub.stall_seconds = 0.4


def address(hub: Hub, kind: str, name: str) -> str:
    return hub.path(name) if kind == "hub" else f"{hub.endpoint}/plain/{hub.repository}/{name}"


def remote(setting: Setting, path: str, **data: Any) -> tuple[DataConfig, Lock]:
    """A config that reads a remote path instead, and its lock."""
    config = setting.changed(sources=[{"path": path}], **data).config
    return config, resolve_sources(config)


def batches(
    setting: Setting, config: DataConfig | None = None, lock: Lock | None = None, workers: int = 0
) -> list[str]:
    config = (config or setting.config).model_copy(update={"workers": workers})
    catalog = make_catalog(config, locked_sources(lock, config, "lock") if lock else None)
    stream = TokenStream(config, setting.tokenizer, setting.sequence_length, epochs=setting.epochs, catalog=catalog)
    try:
        return [batch.sha256() for batch in drain(stream, 3)]
    finally:
        stream.close()


@pytest.mark.parametrize(("kind", "name"), [("hub", "deep"), ("hub", "deep/index.json"), ("http", "deep/index.json")])
def test_a_mirror_and_a_cache_give_the_stream_of_the_folder(
    local: Setting, tmp_path: Path, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = batches(local)
    assert len(expected) > 5
    folder = contents(tmp_path / "served" / "deep")
    with hub_server(tmp_path / "served") as hub:
        connect(hub, monkeypatch)
        hub.fault_share = 0.2
        path = address(hub, kind, name)
        cached, lock = remote(local, path, cache_dir=str(tmp_path / "cache"))
        save_lock(lock, tmp_path / "x.lock")
        assert load_lock(tmp_path / "x.lock") == lock
        assert survey(cached, locked_sources(lock, cached, "lock"), DocumentEncoder.load(local.tokenizer))[1] == []
        assert batches(local, cached, lock) == expected
        catalog = make_catalog(cached, locked_sources(lock, cached, "lock"))
        [found] = estimate_sources(cached, catalog, load_tokenizer(local.tokenizer), AT_START)
        assert found.tokens.value == load_index(str(tmp_path / "served" / "deep")).tokens
        assert sum(hub.injected.values()) > 1
        fetch(lock.files, tmp_path / "mirror")
        hub.dead = True
        asked = len(hub.requests)
        mirrored = local.changed(sources=[{"path": path}], mirror=str(tmp_path / "mirror")).config
        assert batches(local, mirrored, lock) == expected
        assert len(hub.requests) == asked
    [index] = [file for file in lock.files if file.path.endswith("index.json")]
    copy = mirror_path(tmp_path / "mirror", index.path).parent
    assert {n: d for n, d in folder.items() if n != "plan.json"} == contents(copy)


def test_workers_read_it_through_a_cache_that_is_too_small_for_all_of_it(
    local: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard that is deleted while it is mapped stays readable."""
    with hub_server(tmp_path / "served") as hub:
        connect(hub, monkeypatch)
        cached, lock = remote(local, hub.path("deep"), cache_dir=str(tmp_path / "cache"), cache_gib=6_000 / (1 << 30))
        assert batches(local, cached, lock, workers=1) == batches(local)
        kept = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert kept <= 6_000 < sum(file.bytes for file in lock.files)


def test_without_a_mirror_or_a_cache_it_is_refused_with_the_cure(
    local: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_server(tmp_path / "served") as hub:
        connect(hub, monkeypatch)
        config, lock = remote(local, hub.path("deep"))
        [problem] = survey(config, locked_sources(lock, config, "lock"))[1]
    assert "set data.cache_dir to a folder on a local disk, or copy it with `aurora data fetch`" in problem


def test_what_is_not_a_complete_folder_is_refused(
    local: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {f"deep/{name}": data for name, data in contents(tmp_path / "served" / "deep").items()}
    without_index = {name: data for name, data in whole.items() if "index" not in name}
    without_shard = {name: data for name, data in whole.items() if name != "deep/shard-00001.documents"}
    name = "deep/shard-00001.tokens"
    other_bytes = {**whole, name: whole[name][::-1]}
    cases = [
        (without_index, "holds prepared data without index.json"),
        (without_shard, r"lacks shard-00001\.documents, which its index names"),
        ({**whole, name: whole[name][2:]}, r"shard-00001\.tokens: is not the file that the index describes"),
        (other_bytes, r"shard-00001\.tokens: is not the file that the index describes"),
        ({**whole, **{f"more/{name}": data for name, data in whole.items()}}, "several prepared folders"),
        ({**whole, "deep/index.json": b"{}"}, "is not the index of prepared data"),
    ]
    for files, message in cases:
        with hub_server(files) as hub:
            connect(hub, monkeypatch)
            with pytest.raises(DataError, match=message):
                remote(local, hub.path())
    with hub_server(other_bytes, lfs_from=1 << 20) as hub:  # the Hub states no sha256 of small files
        connect(hub, monkeypatch)
        cached, lock = remote(local, hub.path("deep"), cache_dir=str(tmp_path / "cache"))
        with pytest.raises(DataError, match=r"shard-00001\.tokens: has sha256 .*, expected"):
            batches(local, cached, lock)


def test_another_tokenizer_is_noticed_from_the_lock_alone(
    local: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "tokenizer.json"
    other.write_text(Path(local.tokenizer.path).read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with hub_server(tmp_path / "served") as hub:
        connect(hub, monkeypatch)
        cached, lock = remote(local, hub.path("deep"), cache_dir=str(tmp_path / "cache"))
        asked = len(hub.requests)
        catalog = make_catalog(cached, locked_sources(lock, cached, "lock"))
        with pytest.raises(DataError, match="was prepared with another tokenizer"):
            TokenStream(cached, TokenizerConfig(path=str(other)), 7, catalog=catalog)
        assert len(hub.requests) == asked


def test_a_file_of_text_may_be_called_index(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_server({"d/index.json": json.dumps([{"text": "a"}, {"text": "b"}]).encode()}) as hub:
        connect(hub, monkeypatch)
        [source] = resolve_sources(remote_config(hub.path("d"))).sources.values()
    assert (source.tokenizer, len(source.files)) == (None, 1)


def test_shards_of_the_speedrun_are_read_from_the_hub(
    tmp_path: Path, gpt2: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speedrun, "UNIT_TOKENS", 100)
    (tmp_path / "served").mkdir()
    for seed in range(3):
        tokens = [token for part in sample(seed, 30) for token in (50256, *part)]
        write_bin(tmp_path / "served" / f"train_{seed}.bin", tokens)
    local = make_setting(gpt2, tmp_path / "served" / "*.bin", lanes=2)
    with hub_server(tmp_path / "served") as hub:
        connect(hub, monkeypatch)
        cached, lock = remote(local, hub.path("train_*.bin"), cache_dir=str(tmp_path / "cache"))
        assert batches(local, cached, lock) == batches(local)
        hub.push({"bad.bin": b"\0" * 2000})
        with pytest.raises(DataError, match=r"bad\.bin: is not a token shard of the speedrun"):
            remote(local, hub.path("bad.bin"))
