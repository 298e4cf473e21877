"""Object stores, against moto's server on loopback; needs an environment with the extra `s3` and moto[server]."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from pretrain.data import DataError
from pretrain.data.errors import DataUnavailableError
from pretrain.data.sources import list_files, objects, open_bytes
from pretrain.data.sources.retries import patient

pytestmark = pytest.mark.long
SUFFIXES = (".jsonl",)
DATA = random.Random(1).randbytes(3_000_000)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """A client of a bucket `data`, and the server."""
    pytest.importorskip("s3fs", reason="pip install 's3fs' 'moto[server]'")
    server = pytest.importorskip("moto.server", reason="pip install 's3fs' 'moto[server]'").ThreadedMotoServer(
        ip_address="127.0.0.1", port=0
    )
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    objects._system.cache_clear()
    import boto3

    client = boto3.client("s3")
    client.create_bucket(Bucket="data")
    for key, body in {"d/a.jsonl": DATA, "d/e/b.jsonl": b"xyz", "d/README.md": b"", "top.jsonl": b"q"}.items():
        client.put_object(Bucket="data", Key=key, Body=body)
    with patient(first_wait_seconds=0.01, total_seconds=2):
        yield client, server
    server.stop()


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("data", ["d/a.jsonl", "d/e/b.jsonl", "top.jsonl"]),
        ("data/d/", ["d/a.jsonl", "d/e/b.jsonl"]),
        ("data/d/*.jsonl", ["d/a.jsonl"]),
        ("data/**/*.jsonl", ["d/a.jsonl", "d/e/b.jsonl", "top.jsonl"]),
        ("data/top.jsonl", ["top.jsonl"]),
    ],
)
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
