"""Parquet and JSON lines, plain or compressed, give the same rows, from any row on."""

import codecs
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pretrain.config.data import DataConfig, SourceConfig, TokenizerConfig
from pretrain.data import check_sources
from pretrain.data.formats import SUFFIXES, read_unit
from pretrain.data.sources import list_files
from pretrain.data.units import Unit
from tests.data.corpus import drain, make_setting, make_texts, rows, source_units, write_jsonl, write_parquet

TEXTS = make_texts(11, 23)
NAMES = ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst"]


@pytest.fixture(params=NAMES)
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    target = tmp_path / request.param
    if target.suffix == ".parquet":
        return write_parquet(target, TEXTS, len(TEXTS))
    return write_jsonl(target, TEXTS)


def read(unit: Unit, first_row: int = 0, batch_bytes: int = 64) -> list[tuple[int, str]]:
    return list(read_unit(unit, first_row, batch_bytes))


def test_all_formats_give_the_same_stream(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    streams = []
    for name in NAMES:
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        write = write_parquet if name.endswith("parquet") else write_jsonl
        for part in range(3):  # a file of JSON lines is a unit, and so is a row group
            texts = TEXTS[part::3]
            if write is write_parquet:
                write_parquet(folder / f"{part}-{name}", texts, len(texts))
            else:
                write_jsonl(folder / f"{part}-{name}", texts)
        setting = make_setting(tokenizer, folder, lanes=3, validation_fraction=0.2)
        streams.append(rows(drain(setting.open(), 4)))
    assert all(stream == streams[0] for stream in streams)


@pytest.mark.parametrize("split_units", [1, 2, 5, 40])
def test_the_parts_of_a_unit_are_its_rows_by_turns(path: Path, split_units: int) -> None:
    units = source_units(SourceConfig(path=str(path), split_units=split_units))
    assert len(units) == split_units
    for part, unit in enumerate(units):
        assert read(unit) == list(enumerate(TEXTS[part::split_units]))


@pytest.mark.parametrize("batch_bytes", [1, 200, 1 << 20])
def test_reading_begins_at_any_row(path: Path, batch_bytes: int) -> None:
    for unit in source_units(SourceConfig(path=str(path), split_units=3)):
        expected = read(unit)
        for first in range(len(expected) + 2):
            assert read(unit, first, batch_bytes) == expected[first:]


def test_row_groups_are_units(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS, 5)
    units = source_units(SourceConfig(path=str(path)))
    assert [[text for _, text in read(unit)] for unit in units] == [TEXTS[i : i + 5] for i in range(0, 23, 5)]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_every_kind_of_string_column_is_read(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array(TEXTS, pa.string()).cast(kind)
    pq.write_table(pa.table({"body": column}), tmp_path / "a.parquet")
    [unit] = source_units(SourceConfig(path=str(tmp_path / "a.parquet"), text_field="body"))
    assert [text for _, text in read(unit)] == TEXTS


def test_blank_lines_carry_no_text_but_count_as_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a"}\r\n\n  \n{"text": "b"}')
    [unit] = source_units(SourceConfig(path=str(tmp_path / "a.jsonl")))
    assert read(unit) == [(0, "a"), (3, "b")]


def test_a_path_is_a_file_a_folder_or_a_pattern(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def names() -> Iterator[list[str]]:
        for path in ("data", "data/*.jsonl", "data/**/*.parquet", "data/[x].jsonl"):
            yield [file.path for file in list_files(path, SUFFIXES)]

    (tmp_path / "data" / "more").mkdir(parents=True)
    (tmp_path / "data" / "README.md").write_text("not data")
    for name in ("b.jsonl", "[x].jsonl"):
        write_jsonl(tmp_path / "data" / name, TEXTS)
    write_parquet(tmp_path / "data" / "more" / "a.parquet", TEXTS, 5)
    assert list(names()) == [
        ["data/[x].jsonl", "data/b.jsonl", "data/more/a.parquet"],
        ["data/[x].jsonl", "data/b.jsonl"],
        ["data/more/a.parquet"],
        ["data/[x].jsonl"],  # the file of that very name, not what the pattern would match
    ]


@pytest.mark.parametrize("sampled", [False, True])
def test_a_byte_order_mark_at_the_beginning_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampled: bool
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    [unit] = source_units(SourceConfig(path=str(path)))
    assert read(unit) == list(enumerate(TEXTS))
    if sampled:
        monkeypatch.setattr("pretrain.data.check.FULL_SCAN_BYTES", 0)
    assert check_sources(DataConfig(sources=[SourceConfig(path=str(path))], lanes=1, validation_fraction=0.0)) == []
