"""A server of S3 on loopback, with a bucket `data`; needs the extra `s3` and moto[server]."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest


@contextlib.contextmanager
def s3_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """Yield a client and the server, which this process's environment names; skip the test without the libraries."""
    pytest.importorskip("s3fs", reason="pip install 's3fs' 'moto[server]'")
    moto = pytest.importorskip("moto.server", reason="pip install 's3fs' 'moto[server]'")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name, value in {
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        }.items():
            monkeypatch.setenv(name, value)
        import boto3

        client = boto3.client("s3")
        client.create_bucket(Bucket="data")
        yield client, server
    finally:
        server.stop()
