"""The fingerprint names what was read and notices when it changed."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrain.config.data import DataConfig, SourceConfig
from pretrain.data import fingerprint
from tests.data.corpus import make_texts, write_jsonl, write_parquet

TEXTS = make_texts(41, 10)


def config(*paths: Path, licence: str | None = None) -> DataConfig:
    return DataConfig(sources=[SourceConfig(path=str(path), licence=licence) for path in paths])


def test_files_sizes_rows_and_hashes(tmp_path: Path) -> None:
    first = write_parquet(tmp_path / "a.parquet", TEXTS, 4)
    second = tmp_path / "b.jsonl"
    second.write_bytes(b'{"text": "a"}\n' * 200_000)  # more than 2 MiB
    found = fingerprint(config(tmp_path))
    data = second.read_bytes()
    digest = hashlib.sha256(data[: 1 << 20] + data[-(1 << 20) :] + str(len(data)).encode()).hexdigest()
    [source] = found["sources"]
    assert [(file["path"], file["rows"]) for file in source["files"]] == [(str(first), 10), (str(second), None)]
    assert source["files"][1]["sha256"] == digest
    assert source["bytes"] == found["bytes"] == first.stat().st_size + len(data)


def test_it_is_deterministic_json_and_changes_with_the_data(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    before = fingerprint(config(path))
    assert json.loads(json.dumps(before)) == before == fingerprint(config(path))
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)
    assert fingerprint(config(path)) != before


def test_sources_and_licences_come_from_the_columns_or_else_the_config(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b", "c"], "source": ["y", "x", "y"], "licence": ["CC0", "CC0", None]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    plain = write_jsonl(tmp_path / "b.jsonl", TEXTS)
    found = fingerprint(config(tmp_path / "a.parquet", plain, licence="MIT"))["sources"]
    assert (found[0]["sources"], found[0]["licences"]) == (["x", "y"], ["CC0"])
    assert (found[1]["sources"], found[1]["licences"]) == ([], ["MIT"])


def test_a_column_that_names_rows_is_not_listed(tmp_path: Path) -> None:
    urls = [f"page-{i}" for i in range(1000)]
    pq.write_table(pa.table({"text": urls, "source": urls}), tmp_path / "a.parquet")
    assert fingerprint(config(tmp_path / "a.parquet"))["sources"][0]["sources"] == []


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.large_list(pa.large_string())])
def test_lists_of_licences_are_taken_apart(tmp_path: Path, kind: pa.DataType) -> None:
    """As data sets of code have them."""
    licences = pa.array([["MIT", "Apache-2.0"], None, ["MIT"]], kind)
    pq.write_table(pa.table({"text": ["a", "b", "c"], "license": licences}), tmp_path / "a.parquet")
    assert fingerprint(config(tmp_path / "a.parquet"))["sources"][0]["licences"] == ["Apache-2.0", "MIT"]


@pytest.mark.parametrize("values", [[{"a": 1}], [7], [[1]]], ids=str)
def test_a_column_of_another_kind_names_no_source(tmp_path: Path, values: list[Any]) -> None:
    pq.write_table(pa.table({"text": ["a"], "source": values}), tmp_path / "a.parquet")
    assert fingerprint(config(tmp_path / "a.parquet"))["sources"][0]["sources"] == []
