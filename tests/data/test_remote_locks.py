"""Locks of files behind HTTP and of gated data sets, from a server on loopback."""

import concurrent.futures
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.config.data import DataConfig
from pretrain.data import DataError
from pretrain.data.cache import DiskCache
from pretrain.data.catalog import resolve_sources
from pretrain.data.described import remote_file
from pretrain.data.lock import Lock, load_lock, save_lock
from pretrain.data.mirror import fetch, mirror_path
from pretrain.data.sources import open_bytes, retries
from pretrain.data.sources.retries import patient
from tests.data.corpus import make_texts, write_parquet
from tests.data.hub_server import Hub, hub_server

TOKEN = "hf_secretsecretsecret"
LINES = [b'{"text": "%d"}\n' % number * 50 for number in range(3)]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with patient(first_wait_seconds=0.005, longest_wait_seconds=0.02, silence_seconds=2):
        yield


def resolved(hub: Hub, folder: Path, kind: str) -> Lock:
    """The lock of all files, written and read again."""
    paths = [hub.path("l/*")] if kind == "hf" else [hub.url(f"l/{number}.jsonl") for number in range(3)]
    save_lock(resolve_sources(DataConfig(sources=[{"path": path} for path in paths], lanes=1)), folder / "lock")
    return load_lock(folder / "lock")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server({f"l/{number}.jsonl": text for number, text in enumerate(LINES)}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


@pytest.mark.parametrize("kind", ["http", "hf"])
@pytest.mark.parametrize("change", ["same size", "longer", "deleted"])
def test_a_file_that_is_not_that_of_the_lock_is_named(kind: str, change: str, hub: Hub, tmp_path: Path) -> None:
    """By training, by the mirror and by the cache; under a commit of the Hub, only if its history was rewritten."""
    hub.fail(0.2, "503", "reset", "truncated")
    lock = resolved(hub, tmp_path, kind)
    files = lock.files
    fetch(files, tmp_path / "mirror")
    assert [mirror_path(tmp_path / "mirror", file.path).read_bytes() for file in files] == LINES
    cache = DiskCache(str(tmp_path / "cache"), 1 << 20)
    with cache.open(remote_file(files[1])) as stream:
        assert stream.read() == LINES[1]

    before = hub.refs["main"]
    changed = {"same size": LINES[2].replace(b"2", b"7"), "longer": LINES[2] + b"\n"}.get(change)
    new = {f"l/{number}.jsonl": text for number, text in enumerate([*LINES[:2], changed]) if text is not None}
    hub.push(new)
    if kind == "hf":
        with open_bytes(remote_file(files[2])) as stream:  # the branch has moved, the commit has not
            assert stream.read() == LINES[2]
        hub.commits[before] = new
    message = r"l/2\.jsonl: .*(404 Not Found|the file has changed)"
    with pytest.raises(DataError, match=message):
        fetch(files, tmp_path / "other")
    assert not mirror_path(tmp_path / "other", files[2].path).exists()
    with pytest.raises(DataError, match=message), cache.open(remote_file(files[2])):
        pass
    with pytest.raises(DataError, match=message), open_bytes(remote_file(files[2])) as stream:
        stream.read()
    if change == "deleted":
        with pytest.raises(DataError, match=r"l/2\.jsonl|no such"):
            resolved(hub, tmp_path, "http")
    else:
        assert resolved(hub, tmp_path, kind).digest != lock.digest
    with cache.open(remote_file(files[1])) as stream:  # does not ask again
        assert stream.read() == LINES[1]


def test_a_gated_data_set_needs_a_token_which_nobody_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    table = write_parquet(tmp_path / "x.parquet", make_texts(1, 40), 10).read_bytes()
    with hub_server({"l/0.parquet": table, "l/1.parquet": table}, token=TOKEN) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        for wrong in (None, TOKEN + "x"):
            if wrong:
                monkeypatch.setenv("HF_TOKEN", wrong)
            with pytest.raises(DataError, match="set HF_TOKEN") as error:
                resolved(hub, tmp_path, "hf")
            assert "hf_secret" not in str(error.value)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub.fail(0.3, "503", "expired", "429 with Retry-After")
        lock = resolved(hub, tmp_path, "hf")
        fetch(lock.files, tmp_path / "mirror")
        cdn = [headers for path, headers in hub.requests if path.startswith("/cdn/")]
        assert cdn
        assert all("authorization" not in headers for headers in cdn)
    for said in (caplog.text, (tmp_path / "lock").read_text(), *capfd.readouterr()):
        assert "hf_secret" not in said
        assert "Signature" not in said


@pytest.mark.parametrize("work", ["resolve", "fetch"])
def test_an_interrupt_does_not_wait_for_a_dead_server(
    work: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = write_parquet(tmp_path / "x.parquet", make_texts(1, 40), 10).read_bytes()
    with hub_server({f"l/{number}.parquet": table for number in range(4)}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        lock = resolved(hub, tmp_path, "hf")
        waiting = threading.Event()
        sleep = retries._sleep

        def sleep_long(seconds: float) -> None:
            waiting.set()
            sleep(10_000)

        def interrupted(*_: object, **__: object) -> None:
            assert waiting.wait(60)
            raise KeyboardInterrupt

        monkeypatch.setattr(retries, "_sleep", sleep_long)
        calls = iter([interrupted])
        real = concurrent.futures.wait
        monkeypatch.setattr("pretrain.data.resolve.wait", lambda *some, **more: next(calls, real)(*some, **more))
        monkeypatch.setattr("pretrain.data.mirror.as_completed", interrupted)
        hub.link_uses = 0  # listings work, files do not
        works = {
            "fetch": lambda: fetch(lock.files, tmp_path / "mirror"),
            "resolve": lambda: resolved(hub, tmp_path, "hf"),
        }
        with pytest.raises(KeyboardInterrupt):
            works[work]()
