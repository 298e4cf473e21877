"""Values of `data` that nobody should write: a clear message for each, and no secret in it."""

import logging
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import main
from pretrain.config.data import DataConfig, SourceConfig
from pretrain.data import check_sources
from tests.conftest import TINY

SECRET = "SECRETSECRET"
PASSWORD = "data.sources.0.path: a URL with a password, a query or a fragment cannot be used"
HUB = "data.sources.0.path: expected hf://datasets/ORG/NAME@REVISION/PATH"
PATHS = {
    f"https://user:{SECRET}@host/a.jsonl": PASSWORD,
    f"https://{SECRET}@host/a.jsonl": PASSWORD,
    f"https://host/a.jsonl?sig={SECRET}": PASSWORD,
    f"https://host/a.jsonl#{SECRET}": PASSWORD,
    f"s3://key:{SECRET}@bucket/a.jsonl": PASSWORD,
    f"gs://bucket/a.jsonl?token={SECRET}": PASSWORD,
    f"hf://user:{SECRET}@datasets/a/b/c.jsonl": PASSWORD,
    f"hf://datasets/a/b/c.jsonl?token={SECRET}": PASSWORD,
    f"ftp://user:{SECRET}@host/a.jsonl": PASSWORD,
    "ftp://host/a.jsonl": "unknown kind of URL ftp://, expected hf://, https://, http://, s3://, gs://",
    "file:///data/a.jsonl": "unknown kind of URL file://",
    "hf://": HUB,
    "hf://datasets": HUB,
    "hf://datasets/a": HUB,
    "hf://datasets/a/b@": HUB,
    "hf://datasets/a/b@main@x/y": HUB,
    "hf://models/a/b/c.parquet": HUB,
    "hf://datasets/a b/c/d.parquet": HUB,
    "hf://datasets/a/../b@main/c.parquet": HUB,
    "HF://datasets/a/b": HUB,
    "https://host": "expected https://HOST/PATH of a file",
    "https:///a.jsonl": "expected https://HOST/PATH of a file",
    "http://host:99999/a.jsonl": "expected https://HOST/PATH of a file",
    "http://[::1/a.jsonl": "expected https://HOST/PATH of a file",
    "https://host/*.jsonl": "folders and patterns cannot be listed over HTTP",
    "https://host/folder/": "folders and patterns cannot be listed over HTTP",
    "s3://": "expected s3://BUCKET/PATH",
    "gs:///a.jsonl": "expected gs://BUCKET/PATH",
}


def refusal(capsys: pytest.CaptureFixture[str], folder: Path, data: dict[str, Any]) -> str:
    import yaml

    (folder / "run.yaml").write_text(yaml.safe_dump({**TINY, "data": {"lanes": 1, **data}}))
    assert main(["check", str(folder / "run.yaml")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize("path", PATHS)
def test_a_url_that_cannot_be_is_refused_offline_and_never_shown(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    err = refusal(capsys, tmp_path, {"sources": [{"path": path}]})
    assert PATHS[path] in err
    assert err.count("\n") == 1
    assert SECRET not in err


def test_a_secret_is_not_shown_where_something_else_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = f"https://user:{SECRET}@host/a.jsonl"
    for sources in ({"path": path}, [path], [[path]], [{"path": "a", "name": path}], path):
        assert SECRET not in refusal(capsys, tmp_path, {"sources": sources})


@pytest.mark.parametrize(
    "path",
    [
        "hf://datasets/a/b",
        "hf://datasets/a-b/c.d_e@refs/convert/parquet/x/**/*.parquet",
        "hf://datasets/a/b@main/x?.parquet",
        "hf://datasets/a/b@refs%2Fpr%2F1/c.json.gz",
        "https://host:8080/a%20b.jsonl.gz",
        "http://[::1]:80/a.jsonl",
        "s3://bucket",
        "s3://bucket/a?/[bc]*.jsonl",
        "GS://bucket/a",
        "hf:/datasets/a",
        "a@b/c?d=e.jsonl",
    ],
)
def test_other_paths_are_taken(path: str) -> None:
    assert DataConfig(sources=[SourceConfig(path=path)]).sources[0].path == path


TWO = [{"path": "a", "name": "x"}, {"path": "b", "name": "y"}]
STAGES = [{"mixture": {"x": 1}, "until_tokens": 1000}, {"mixture": {"x": 1, "y": 1e-300}}]
VALUES: list[tuple[dict[str, Any], str]] = [
    ({"sources": TWO, "mixture": {"x": 1e300, "y": 1e-300}}, "data.mixture.y: 1e-300 is so small a share"),
    ({"sources": TWO, "mixture": {"x": 1, "y": 1e-13}}, "data.mixture.y: 1e-13 is so small a share"),
    ({"sources": TWO, "stages": STAGES}, "data.stages.1.mixture.y: 1e-300 is so small a share"),
    ({"sources": TWO, "mixture": {"x": 1, "y": float("nan")}}, "data.mixture.y: input should be a finite number"),
    ({"sources": [{"path": "a", "split_units": 10**9}]}, "data.sources.0.split_units: input should be less than"),
    ({"sources": [{"path": "a"}], "max_document_mib": 10**15}, "data.max_document_mib: input should be less than"),
    ({"sources": [{"path": "x" * 5000}]}, "no such file or folder"),
]


@pytest.mark.parametrize(("data", "message"), VALUES)
def test_a_value_beyond_all_bounds_is_refused(
    data: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refusal(capsys, tmp_path, data)


def test_sources_that_read_the_same_files_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "n": 1}\n')

    def warnings(*sources: SourceConfig) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert check_sources(DataConfig(sources=sources, lanes=1, validation_fraction=0.0)) == []
        return [record.message for record in caplog.records]

    whole = SourceConfig(path=str(tmp_path), name="x")
    glob = SourceConfig(path=f"{tmp_path}/*.jsonl", name="y")
    said = "the sources x and y both read 1 files, whose documents come twice"
    assert warnings(whole, glob) == [said]
    assert warnings(whole.model_copy(update={"where": "n == 1"}), glob) == []
