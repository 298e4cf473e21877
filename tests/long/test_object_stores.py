"""Object stores, against servers on loopback; needs the extras `s3` and `gcs`, and moto[server]."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.data import DataConfig
from pretrain.data import DataError
from pretrain.data.cache import DiskCache
from pretrain.data.catalog import resolve_sources
from pretrain.data.described import remote_file
from pretrain.data.errors import DataUnavailableError
from pretrain.data.lock import load_lock, save_lock
from pretrain.data.mirror import fetch, mirror_path
from pretrain.data.sources import list_files, objects, open_bytes, retries
from pretrain.data.sources.retries import patient
from tests.data.gcs_server import Storage, gcs_server
from tests.data.s3_server import s3_server

pytestmark = pytest.mark.long
SUFFIXES = (".jsonl",)
DATA = random.Random(1).randbytes(3_000_000)
OBJECTS = {"d/a.jsonl": DATA, "d/e/b.jsonl": b"xyz", "d/README.md": b"", "top.jsonl": b"q"}
LISTINGS = [
    ("data", ["d/a.jsonl", "d/e/b.jsonl", "top.jsonl"]),
    ("data/d/", ["d/a.jsonl", "d/e/b.jsonl"]),
    ("data/d/*.jsonl", ["d/a.jsonl"]),
    ("data/**/*.jsonl", ["d/a.jsonl", "d/e/b.jsonl", "top.jsonl"]),
    ("data/top.jsonl", ["top.jsonl"]),
]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """A client of a bucket `data`, and the server."""
    with s3_server(monkeypatch) as (client, server):
        objects._system.cache_clear()
        for key, body in OBJECTS.items():
            client.put_object(Bucket="data", Key=key, Body=body)
        with patient(first_wait_seconds=0.01, total_seconds=2):
            yield client, server


@pytest.mark.parametrize(("path", "found"), LISTINGS)
def test_buckets_are_listed_and_read(store: tuple[Any, Any], path: str, found: list[str]) -> None:
    files = list_files(f"s3://{path}", SUFFIXES)
    assert [file.path for file in files] == [f"s3://data/{name}" for name in found]
    assert all(file.etag and file.bytes for file in files)
    if found[0] == "d/a.jsonl":
        with open_bytes(files[0]) as stream:
            assert stream.read() == DATA
            stream.seek(-9, 2)
            assert stream.read() == DATA[-9:]


def test_an_object_that_changes_is_noticed(store: tuple[Any, Any]) -> None:
    client, _ = store
    [file] = list_files("s3://data/d/*.jsonl", SUFFIXES)
    with open_bytes(file) as stream:
        assert stream.read(10) == DATA[:10]
        client.put_object(Bucket="data", Key="d/a.jsonl", Body=DATA[::-1])
        with pytest.raises(DataError, match="the file has changed"):
            stream.read()
    with pytest.raises(DataError, match="the file has changed"), open_bytes(file):
        pass


def test_what_is_missing_is_bad_input_and_a_dead_server_is_not(store: tuple[Any, Any]) -> None:
    _, server = store
    for path in ("data/gone", "data/*.parquet", "nobucket/x.jsonl"):
        with pytest.raises(DataError, match="no such object"):
            list_files(f"s3://{path}", SUFFIXES)
    server.stop()
    with pytest.raises(DataUnavailableError):
        list_files("s3://data/d", SUFFIXES)
    server.start()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """A bucket `data` of GCS."""
    pytest.importorskip("gcsfs", reason="pip install gcsfs")
    with gcs_server() as storage:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", storage.endpoint)
        objects._system.cache_clear()
        for name, data in OBJECTS.items():
            storage.put(name, data)
        with patient(first_wait_seconds=0.01, longest_wait_seconds=0.02, total_seconds=2):
            yield storage
    objects._system.cache_clear()


@pytest.mark.parametrize(("path", "found"), LISTINGS)
def test_a_bucket_of_gcs_is_listed_page_by_page_and_read(bucket: Storage, path: str, found: list[str]) -> None:
    bucket.page = 1
    files = list_files(f"gs://{path}", SUFFIXES)
    assert [file.path for file in files] == [f"gs://data/{name}" for name in found]
    assert all(file.etag and file.bytes for file in files)
    if found[0] == "d/a.jsonl":
        with open_bytes(files[0]) as stream:
            assert stream.read() == DATA
            stream.seek(-9, 2)
            assert stream.read() == DATA[-9:]


def test_an_object_of_gcs_that_changes_is_noticed_and_its_metadata_may(bucket: Storage) -> None:
    [file] = list_files("gs://data/d/*.jsonl", SUFFIXES)
    bucket.put("d/a.jsonl", DATA)
    with open_bytes(file) as stream:
        assert stream.read(10) == DATA[:10]
        bucket.put("d/a.jsonl", DATA[::-1])
        with pytest.raises(DataError, match=r"gs://data/d/a\.jsonl: the file has changed"):
            stream.read()
    with pytest.raises(DataError, match="the file has changed"), open_bytes(file):
        pass
    del bucket.objects["d/a.jsonl"]
    with pytest.raises(DataError, match=r"gs://data/d/a\.jsonl: no such object"), open_bytes(file):
        pass


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503])
def test_gcs_is_asked_again_by_one_loop_only(bucket: Storage, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retries, "_sleep", waits.append)
    [file] = list_files("gs://data/top.jsonl", SUFFIXES)
    with open_bytes(file) as stream:
        bucket.answers = [code] * 4
        before = len(bucket.requests)
        assert stream.read() == b"q"
        assert len(bucket.requests) - before == 5
        assert len(waits) == 4


@pytest.mark.parametrize(("code", "message"), [(401, "answered 401"), (403, "access is refused"), (404, "no such")])
def test_what_gcs_refuses_is_not_asked_for_again(bucket: Storage, code: int, message: str) -> None:
    bucket.answers = [code] * 20
    with pytest.raises(DataError, match=message):
        list_files("gs://data/top.jsonl", SUFFIXES)
    assert len(bucket.requests) <= 4


def test_a_dead_gcs_is_no_bad_input(bucket: Storage) -> None:
    bucket.dead = True
    with pytest.raises(DataUnavailableError):
        list_files("gs://data/d", SUFFIXES)


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_a_lock_of_an_object_store_holds(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Resolve, mirror and cache; a changed object is named by each, and no log holds a secret."""
    caplog.set_level(logging.DEBUG)
    texts = [b'{"text": "%d"}\n' % number * 50 for number in range(3)]
    if kind == "s3":
        client, _ = request.getfixturevalue("store")

        def put(name: str, data: bytes) -> None:
            client.put_object(Bucket="data", Key=name, Body=data)
    else:
        put = request.getfixturevalue("bucket").put
    for number, text in enumerate(texts):
        put(f"l/{number}.jsonl", text)
    config = DataConfig(sources=[{"path": f"{kind}://data/l"}], lanes=1)
    save_lock(resolve_sources(config), tmp_path / "lock")
    files = load_lock(tmp_path / "lock").files
    assert [(file.path, file.bytes) for file in files] == [
        (f"{kind}://data/l/{number}.jsonl", len(text)) for number, text in enumerate(texts)
    ]
    fetch(files, tmp_path / "mirror")
    assert [mirror_path(tmp_path / "mirror", file.path).read_bytes() for file in files] == texts
    cache = DiskCache(str(tmp_path / "cache"), 1 << 20)
    with cache.open(remote_file(files[1])) as stream:
        assert stream.read() == texts[1]
    put("l/0.jsonl", texts[0][::-1])
    message = rf"{kind}://data/l/0\.jsonl: .*the file has changed"
    with pytest.raises(DataError, match=message):
        fetch(files, tmp_path / "other")
    with pytest.raises(DataError, match=message), cache.open(remote_file(files[0])):
        pass
    with pytest.raises(DataError, match=message), open_bytes(remote_file(files[0])):
        pass
    for secret in ("Signature", "AWS4-HMAC", os.environ.get("AWS_SECRET_ACCESS_KEY", "Signature")):
        assert secret not in caplog.text
