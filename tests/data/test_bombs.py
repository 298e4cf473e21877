"""A few bytes of a parquet file can stand for gigabytes: read in bounded memory, or refused by name."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrain.config.data import DataConfig, SourceConfig
from pretrain.data import check_sources, make_catalog, parquet_pages
from pretrain.data.bad_rows import BadRow
from pretrain.data.formats import read_unit
from pretrain.data.parquet_pages import _pages

LIMIT = 8 << 20
LARGE = "y" * (1 << 16)


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_pages, "MAX_BATCH_BYTES", LIMIT)


def setting(path: Path, **source: Any) -> DataConfig:
    return DataConfig(
        sources=[SourceConfig(path=str(path), **source)], lanes=1, max_document_mib=1, validation_fraction=0.0
    )


def texts(config: DataConfig) -> list[str | BadRow]:
    [units] = make_catalog(config).units(config)
    return [text for unit in units for _, text in read_unit(unit, 0, 1 << 20)]


def peak(read: Callable[[], Any]) -> tuple[Any, int]:
    """What a function returns, and the most memory that Arrow held for it."""
    default = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(default)
    pa.set_memory_pool(pool)
    try:
        return read(), pool.max_memory()
    finally:
        pa.set_memory_pool(default)


def repeated(value: str, rows: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(rows, np.int32)), pa.array([value]))


@pytest.mark.parametrize("kind", ["delta", "dictionary"])
def test_values_that_repeat_are_decoded_a_few_at_a_time(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.parquet"
    if kind == "delta":
        encoding = {"text": "DELTA_BYTE_ARRAY"}
        pq.write_table(pa.table({"text": [LARGE] * 1500}), path, use_dictionary=False, column_encoding=encoding)
    else:
        pq.write_table(pa.table({"text": repeated(LARGE, 1500)}), path)
    assert path.stat().st_size < 1 << 20
    found, memory = peak(lambda: [len(str(text)) for text in texts(setting(path))])
    assert found == [len(LARGE)] * 1500
    assert memory < 6 * LIMIT  # all rows are 94 MiB


def test_a_page_that_is_a_bomb_is_refused_by_name_and_a_large_one_is_read(tmp_path: Path) -> None:
    options = {"use_dictionary": False, "compression": "zstd", "data_page_size": 1 << 30}
    pq.write_table(pa.table({"text": [LARGE] * 1000}), tmp_path / "bomb.parquet", **options)
    [problem] = check_sources(setting(tmp_path / "bomb.parquet"))
    assert "bomb.parquet: row group 0 holds a page of 63 MiB in column 'text', more than 4 MiB" in problem
    found, memory = peak(lambda: texts(setting(tmp_path / "bomb.parquet")))
    assert [one.rows for one in found if isinstance(one, BadRow)] == [1000]
    assert memory < LIMIT
    large = [os.urandom(1 << 15).hex() for _ in range(200)]
    pq.write_table(pa.table({"text": large}), tmp_path / "large.parquet", **options)
    assert texts(setting(tmp_path / "large.parquet")) == large


def test_a_few_large_values_among_many_small_ones(tmp_path: Path) -> None:
    """The average row says nothing of the densest page."""
    values = [""] * 40_000 + [LARGE] * 1500
    pq.write_table(
        pa.table({"text": values}), tmp_path / "a.parquet", use_dictionary=False, compression="zstd",
        data_page_size=1 << 20, write_batch_size=8,
    )  # fmt: skip
    found, memory = peak(lambda: [len(str(text)) for text in texts(setting(tmp_path / "a.parquet"))])
    assert found == list(map(len, values))
    assert memory < 6 * LIMIT


@pytest.mark.parametrize("column", ["licence", "source", "lang"])
def test_another_column_may_be_the_bomb(tmp_path: Path, column: str) -> None:
    pq.write_table(pa.table({"text": ["good"] * 1500, column: repeated(LARGE, 1500)}), tmp_path / "a.parquet")
    config = setting(tmp_path / "a.parquet", where="lang != 'x'" if column == "lang" else None)
    problems, memory = peak(lambda: check_sources(config))
    assert problems == []
    assert memory < 6 * LIMIT


def test_lists_of_too_many_values_are_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(parquet_pages, "_MAX_VALUES", 10_000)
    tags = pa.array([["mit"] * 20_000, ["apache"], [], None])
    pq.write_table(pa.table({"text": ["good"] * 4, "licence": tags}), tmp_path / "a.parquet")
    assert check_sources(setting(tmp_path / "a.parquet")) == []
    assert "a.parquet: the values of column 'licence' are not known" in caplog.text
    [bad] = texts(setting(tmp_path / "a.parquet", where="licence is not null"))
    assert isinstance(bad, BadRow)
    assert "holds 20,003 values in column 'licence.list.element'" in bad.problem


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
@pytest.mark.parametrize("dictionary", [False, True])
def test_every_page_is_found(tmp_path: Path, version: str, compression: str, dictionary: bool) -> None:
    values = [f"{number % 700} " * (number % 90) for number in range(5000)]
    table = pa.table({"text": [None if len(text) < 9 else text for text in values]})
    pq.write_table(
        table, tmp_path / "a.parquet", data_page_version=version, compression=compression, use_dictionary=dictionary,
        data_page_size=5000, write_batch_size=64, row_group_size=3000, write_page_checksum=True,
    )  # fmt: skip
    metadata = pq.read_metadata(tmp_path / "a.parquet")
    with (tmp_path / "a.parquet").open("rb") as file:
        for group in range(metadata.num_row_groups):
            chunk = metadata.row_group(group).column(0)
            pages = list(_pages(file, chunk))
            assert len(pages) > (1 if dictionary else 5)
            assert sum(page.is_dictionary for page in pages) == dictionary
            assert sum(page.values for page in pages if not page.is_dictionary) == chunk.num_values
            assert sum(page.bytes for page in pages) < chunk.total_uncompressed_size
            assert sum(page.bytes for page in pages) > 0.9 * chunk.total_uncompressed_size


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_no_damage_to_a_header_is_a_failure(tmp_path: Path, version: str) -> None:
    """The pages before the damage are found; decoding reports the rest."""
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["good", "better"] * 50}), path, data_page_version=version)
    chunk = pq.read_metadata(path).row_group(0).column(0)
    whole = bytearray(path.read_bytes())
    pages = 0
    for place in range(4, chunk.data_page_offset + 40):
        for value in range(256):
            damaged = whole.copy()
            damaged[place] = value
            pages += len(list(_pages(io.BytesIO(damaged), chunk)))
    assert pages > 256 * (chunk.data_page_offset + 36)


def test_the_licences_of_a_file_are_no_reason_to_lose_its_texts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = pa.Array.from_buffers(pa.string(), 3, pa.array([b"mit", b"\xff", b"mit"], pa.binary()).buffers())
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": list("abc"), "licence": broken}), path)
    assert check_sources(setting(path)) == []
    assert make_catalog(setting(path)).sources[0].licences == ("mit",)
    pq.write_table(
        pa.table({"text": list("abc"), "licence": ["mit", "odc-by", "x" * 999]}), path, compression="none",
        use_dictionary=False, write_page_checksum=True,
    )  # fmt: skip
    content = bytearray(path.read_bytes())
    content[content.index(b"odc-by")] ^= 1
    path.write_bytes(content)
    assert check_sources(setting(path)) == []
    assert texts(setting(path)) == list("abc")
    assert "the values of column 'licence' are not known, it cannot be read" in caplog.text
