"""Bad data is an error before training, which lists every problem, and gives the same message while reading."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pretrain.config.data import DataConfig, SourceConfig, TokenizerConfig
from pretrain.data import DataError, check_sources
from tests.data.corpus import drain, make_setting, make_texts, write_jsonl, write_parquet

TEXTS = make_texts(31, 12, longest=30)
Builder = Callable[[Path], Path]


def appended(line: bytes) -> Builder:
    def build(folder: Path) -> Path:
        path = write_jsonl(folder / "a.jsonl", TEXTS)
        path.write_bytes(path.read_bytes() + line + b"\n")
        return path

    return build


def cut(name: str) -> Builder:
    def build(folder: Path) -> Path:
        write = write_parquet if name.endswith("parquet") else write_jsonl
        path = write(folder / name, TEXTS, 4) if write is write_parquet else write_jsonl(folder / name, TEXTS)
        path.write_bytes(path.read_bytes()[:-9])
        return path

    return build


def flipped(name: str) -> Builder:
    """A fault in the middle of the compressed text."""

    def build(folder: Path) -> Path:
        path = folder / name
        if path.suffix == ".parquet":
            table = pa.table({"text": TEXTS})
            pq.write_table(table, path, compression="zstd", use_dictionary=False, write_page_checksum=True)
        else:
            write_jsonl(path, TEXTS)
        data = bytearray(path.read_bytes())
        data[len(data) // 4 : len(data) // 4 + 8] = bytes(8)
        path.write_bytes(data)
        return path

    return build


def column(values: pa.Array) -> Builder:
    def build(folder: Path) -> Path:
        pq.write_table(pa.table({"text": values}), folder / "a.parquet")
        return folder / "a.parquet"

    return build


def two_text_columns(folder: Path) -> Path:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text"] * 2), folder / "a.parquet")
    return folder / "a.parquet"


def not_utf8() -> pa.Array:
    """Strings of which the third is not valid UTF-8, as a careless writer leaves them."""
    values = pa.array([b"good", b"good", b"\xff\xfe", b"good"], pa.binary())
    return pa.Array.from_buffers(pa.string(), len(values), values.buffers())


def written(name: str, content: bytes) -> Builder:
    def build(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return build


def only(name: str) -> Builder:
    return lambda folder: folder / name


FAULTS: list[tuple[Builder, str]] = [
    (only("gone.parquet"), r"gone\.parquet: no such file or folder"),
    (only("*.jsonl"), r"\*\.jsonl: no such file or folder, and no file matches"),
    (only("."), r"holds no file of a kind that can be read \(\.parquet, \.jsonl"),
    (written("a.txt", b"text"), r"a\.txt: unknown kind of file, expected one of \.parquet"),
    (written("a.parquet", b"no parquet at all"), r"a\.parquet: cannot be read as parquet"),
    (cut("a.parquet"), r"a\.parquet: cannot be read as parquet"),
    (flipped("a.parquet"), r"a\.parquet: row group 0 is damaged"),
    (column(pa.array([1, 2])), r"a\.parquet: column 'text' holds int64, expected string"),
    (column(pa.array([b"1"])), r"a\.parquet: column 'text' holds binary, expected string"),
    (column(pa.array([["a"]])), r"a\.parquet: column 'text' holds list<.*>, expected string"),
    (column(pa.array(["a", None])), r"a\.parquet: row 1 of row group 0 .* holds no text"),
    (column(not_utf8()), r"a\.parquet: row 2 of row group 0 .* is not valid UTF-8"),
    (
        lambda folder: write_parquet(folder / "a.parquet", TEXTS, 4, field="body"),
        r"a\.parquet: has no column 'text'; its columns are id, body: set text_field",
    ),
    (two_text_columns, r"a\.parquet: has 2 columns 'text', expected one"),
    (appended(b'{"text": "\xff"}'), r"a\.jsonl: line 13 is not valid UTF-8"),
    (appended(b'{"text": "a"'), r"a\.jsonl: line 13 is not valid JSON"),
    (appended(b'"text"'), r"a\.jsonl: line 13 holds a JSON str, expected an object with a key 'text'"),
    (appended(b'{"body": "a"}'), r"a\.jsonl: line 13 has no key 'text'; its keys are body: set text_field"),
    (appended(b'{"text": null}'), r"a\.jsonl: line 13: 'text' holds NoneType, expected a string"),
    (appended(rb'{"text": "\ud83d"}'), r"a\.jsonl: line 13: 'text' is not valid Unicode"),
    (appended(b"[" * 100_000), r"a\.jsonl: line 13 is not valid JSON"),
    (cut("a.jsonl.gz"), r"a\.jsonl\.gz: damaged after line \d+"),
    (cut("a.jsonl.zst"), r"a\.jsonl\.zst: damaged after line \d+: the zstd file ends in the middle of a frame"),
    (flipped("a.jsonl.gz"), r"a\.jsonl\.gz: damaged after line \d+"),
    (flipped("a.jsonl.zst"), r"a\.jsonl\.zst: damaged after line \d+"),
    (written("a.jsonl.zst", b""), r"a\.jsonl\.zst: the file is empty, which a compressed file never is"),
    (written("a.jsonl.gz", b""), r"a\.jsonl\.gz: the file is empty, which a compressed file never is"),
    (appended(b"\xef\xbb\xbf{}"), r"a\.jsonl: line 13 has no key 'text'; its keys are none: set text_field"),
    (appended(b"\xef\xbb\xbf\xef\xbb\xbf{}"), r"a\.jsonl: line 13 is not valid JSON"),
    (written("a.jsonl.gz", b"plain"), r"a\.jsonl\.gz: damaged after line 0"),
]


@pytest.mark.parametrize(("build", "message"), FAULTS)
def test_each_fault_is_found_before_and_while_reading(
    tmp_path: Path, tokenizer: TokenizerConfig, build: Builder, message: str
) -> None:
    setting = make_setting(tokenizer, build(tmp_path), lanes=1, epochs=1)
    [problem] = check_sources(setting.config)
    with pytest.raises(DataError, match=message) as error:
        drain(setting.open(), 4)
    assert str(error.value) == problem


def test_an_empty_source_is_refused(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    for name, texts in (("none.jsonl", []), ("blank.jsonl", ["", ""]), ("none.parquet", [])):
        write = write_jsonl if name.endswith("jsonl") else lambda path, texts: write_parquet(path, texts, 4)
        setting = make_setting(tokenizer, write(tmp_path / name, texts), lanes=1)
        assert check_sources(setting.config)[0] == f"{tmp_path / name}: the source is empty, no row holds any text"
        with pytest.raises(DataError):
            setting.open().next_batch(1)


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    paths = []
    for index, (build, _) in enumerate(FAULTS):
        (tmp_path / str(index)).mkdir()
        paths.append(build(tmp_path / str(index)))
    write_jsonl(tmp_path / "good.jsonl", TEXTS)
    sources = [SourceConfig(path=str(path)) for path in [*paths, tmp_path / "good.jsonl"]]
    problems = check_sources(DataConfig(sources=sources, lanes=1))
    assert len(problems) == len(FAULTS)
    assert all(str(tmp_path / str(index)) in problem for index, problem in enumerate(problems))


def test_a_folder_reports_every_faulty_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "b.jsonl").write_text("{")
    (tmp_path / "c.parquet").write_text("?")
    problems = check_sources(DataConfig(sources=[SourceConfig(path=str(tmp_path))], lanes=1))
    assert [Path(problem.split(":")[0]).name for problem in problems] == ["b.jsonl", "c.parquet"]


def test_good_sources_have_no_problem(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS, 4)
    assert check_sources(make_setting(tokenizer, path, lanes=3, validation_fraction=0.3).config) == []


@pytest.mark.parametrize(("split_units", "units"), [(1, 3), (2, 6)])
def test_fewer_units_than_lanes_are_refused_with_both_cures(
    tmp_path: Path, tokenizer: TokenizerConfig, split_units: int, units: int
) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS, 4)
    setting = make_setting(tokenizer, path, split_units=split_units, lanes=13)
    [problem] = check_sources(setting.config)
    assert f"data.lanes is 13, but an epoch has only {units} read units" in problem
    assert "raise split_units" in problem
    assert f"lower data.lanes to {units} at most" in problem
    with pytest.raises(DataError) as error:
        setting.open()
    assert str(error.value) == problem
    assert check_sources(setting.changed(lanes=units).config) == []


@pytest.mark.parametrize(("fraction", "split"), [(0.9999999, "every document"), (1e-9, "none of the")])
def test_an_empty_split_is_refused(tmp_path: Path, fraction: float, split: str) -> None:
    source = SourceConfig(path=str(write_parquet(tmp_path / "a.parquet", TEXTS, 4)))
    [problem] = check_sources(DataConfig(sources=[source], lanes=1, validation_fraction=fraction))
    assert split in problem
    assert "data.validation_fraction" in problem


@pytest.mark.parametrize("line", [1, 3000, 6000])
def test_beyond_the_budget_beginning_and_end_are_checked_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, line: int
) -> None:
    monkeypatch.setattr("pretrain.data.check.FULL_SCAN_BYTES", 0)
    lines = [json.dumps({"text": "x" * 1000})] * 6000
    lines[line - 1] = "{"
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with caplog.at_level(logging.WARNING):
        problems = check_sources(DataConfig(sources=[SourceConfig(path=str(tmp_path / "a.jsonl"))], lanes=1))
    assert len(problems) == (line != 3000)
    assert "only the beginning and the end were checked of 1 files" in caplog.text


def test_beyond_the_budget_the_last_row_group_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.data.check.FULL_SCAN_BYTES", 0)
    table = pa.table({"text": pa.array(["good"] * 30 + [None])})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10)
    [problem] = check_sources(DataConfig(sources=[SourceConfig(path=str(tmp_path / "a.parquet"))], lanes=1))
    assert "row 0 of row group 3" in problem


@pytest.mark.parametrize(
    "changes",
    [
        {"sources": []},
        {"lanes": 0},
        {"workers": -1},
        {"seed": -1},
        {"validation_fraction": 1.0},
        {"validation_fraction": -0.1},
        {"sources": [{"path": "a", "weight": 2.0}]},
        {"sources": [{"path": "a", "split_units": 0}]},
        {"sources": [{"path": "a", "licence": 3}]},
        {"sources": [{"path": ""}]},
        {"lane": 3},
    ],
)
def test_a_config_out_of_range_is_refused(changes: dict[str, object]) -> None:
    assert DataConfig.model_validate({"sources": [{"path": "a"}]}).lanes == 128
    with pytest.raises(ValidationError):
        DataConfig.model_validate({"sources": [{"path": "a"}], **changes})


@pytest.mark.parametrize(("batch", "sequence_length"), [(0, 4), (1, 0)])
def test_sizes_below_one_are_refused(
    tmp_path: Path, tokenizer: TokenizerConfig, batch: int, sequence_length: int
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(ValueError, match="expected at least 1"):
        make_setting(tokenizer, path, lanes=1, sequence_length=sequence_length).open().next_batch(batch)
