"""A lane of an uncompressed file of lines resumes at a byte of the file, without reading what comes before it."""

import codecs
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest

import pretrain.data.formats
from pretrain.config.data import SourceConfig, TokenizerConfig
from pretrain.data import StreamState, without_bytes
from pretrain.data.formats import read_places
from pretrain.data.units import Unit
from tests.data.corpus import Setting, drain, make_setting, make_texts, rows, source_units, write_jsonl, write_parquet


class CountedFile:
    """An open file that adds up what is read from it."""

    def __init__(self, file: BinaryIO, read: list[int]) -> None:
        self._file, self._read = file, read

    def read(self, size: int = -1) -> bytes:
        found = self._file.read(size)
        self._read.append(len(found))
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of every read of a file of rows."""
    read: list[int] = []
    plain = pretrain.data.formats.open_file

    @contextmanager
    def counted(file: Any) -> Iterator[Any]:
        with plain(file) as opened:
            yield CountedFile(opened, read)

    monkeypatch.setattr(pretrain.data.formats, "open_file", counted)
    return read


def odd_lines(seed: int) -> bytes:
    """Lines with a byte order mark, blank and bad ones, two kinds of line ends, and none at the end."""
    rng = random.Random(seed)
    kinds = [
        lambda: json.dumps({"text": "sea " * rng.randint(1, 9)}).encode(),
        lambda: json.dumps({"text": "Schnee \U0001f600 \x85 \u2028" * rng.randint(1, 3)}, ensure_ascii=False).encode(),
        lambda: b"",
        lambda: b"  ",
        lambda: b"{broken",
        lambda: b'{"text": "\xff"}',
        lambda: json.dumps({"text": "long " * 300}).encode(),
    ]
    lines = [rng.choice(kinds)() + rng.choice([b"\n", b"\r\n"]) for _ in range(rng.randint(1, 150))]
    return rng.choice([b"", codecs.BOM_UTF8]) + b"".join(lines) + rng.choice([b"", b'{"text": "the end"}'])


def read(unit: Unit, first_row: int = 0, first_byte: int = 0) -> list[tuple[int, str, int, int]]:
    return [(row, str(text), *places) for row, text, *places in read_places(unit, first_row, first_byte, 1 << 10)]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("split_units", [1, 2, 5])
def test_every_row_is_found_at_its_place(tmp_path: Path, seed: int, split_units: int) -> None:
    path = tmp_path / random.Random(seed).choice(["a.jsonl", "a.ndjson", "a.json"])
    path.write_bytes(odd_lines(seed))
    for unit in source_units(SourceConfig(path=str(path), split_units=split_units)):
        whole = read(unit)
        for number, (row, _, begin, end) in enumerate(whole):
            assert read(unit, row, begin) == whole[number:] == read(unit, row)
            assert read(unit, row + 1, end) == whole[number + 1 :]


@pytest.mark.parametrize("row", range(95, 101))
def test_a_last_line_without_an_end_is_not_lost_behind_many_that_are_skipped(tmp_path: Path, row: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(3, 100))
    path.write_bytes(path.read_bytes() + b'{"text": "the end"}')
    [unit] = source_units(SourceConfig(path=str(path)))
    assert read(unit, row)[-1][:2] == (100, "the end")


@pytest.mark.parametrize("byte", [1, 7, 10**9, -5])
def test_a_place_that_cannot_be_right_is_ignored(tmp_path: Path, byte: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(1, 30))
    [unit] = source_units(SourceConfig(path=str(path)))
    assert read(unit, 20, byte) == read(unit, 20)
    assert len(read(unit, 20)) == 10


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.json"])
def test_other_formats_have_no_places(tmp_path: Path, name: str, tokenizer: TokenizerConfig) -> None:
    path, texts = tmp_path / name, make_texts(2, 30)
    if name == "a.parquet":
        write_parquet(path, texts, 10)
    elif name == "a.json":
        path.write_text(json.dumps([{"text": text} for text in texts]))
    else:
        write_jsonl(path, texts)
    stream = make_setting(tokenizer, path, lanes=1).open()
    stream.next_batch(2)
    [lane] = stream.state()["sources"][0]["lanes"]
    assert lane["row"] > 0
    assert "byte" not in lane
    unit = source_units(SourceConfig(path=str(path)))[0]
    assert read(unit, 3, 40) == read(unit, 3)


@pytest.fixture
def setting(tmp_path: Path, tokenizer: TokenizerConfig) -> Setting:
    """One epoch of two lanes; each reads three parts of files of about 1 MB in all."""
    for number in range(3):
        write_jsonl(tmp_path / f"{number}.jsonl", make_texts(number, 2500, longest=30))
    return make_setting(tokenizer, tmp_path, lanes=2, sequence_length=64, split_units=2, validation_fraction=0.1)


def test_a_resume_does_not_read_what_comes_before_it(
    setting: Setting, bytes_read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.data.reading.REFILL_BYTES", 1 << 10)
    monkeypatch.setattr("pretrain.data.compression._BUFFER_BYTES", 1 << 10)
    total = len(drain(setting.open(), 1))
    needed = []
    for batch in (total // 20, total * 19 // 20):
        stream = setting.open()
        stream.next_batch(batch)
        state: StreamState = json.loads(json.dumps(stream.state()))
        expected = rows([stream.next_batch(4)])
        for kept in (state, without_bytes(state)):
            bytes_read.clear()
            resumed = setting.open(state=kept)
            assert rows([resumed.next_batch(4)]) == expected
            needed.append(sum(bytes_read))
    early, _, late, counted = needed
    assert late < 1.5 * early + 2048
    assert counted > 5 * late


@pytest.mark.parametrize("split_units", [1, 3])
def test_a_resume_between_two_documents_finds_the_next_one(
    tmp_path: Path, tokenizer: TokenizerConfig, split_units: int
) -> None:
    """Every token is a sequence here, so states also lie where a document has just ended."""
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(5, 24, longest=5))
    setting = make_setting(tokenizer, path, lanes=1, sequence_length=1, epochs=1, split_units=split_units)
    expected = rows(drain(setting.open(), 1))
    stream, borders = setting.open(), 0
    for done in range(1, min(len(expected), 60)):
        stream.next_batch(1)
        state = stream.state()
        [lane] = state["sources"][0]["lanes"]
        if lane["token"] == 0 and "byte" in lane:
            borders += 1
            assert rows(drain(setting.open(state=state), 1)) == expected[done:]
    assert borders > 3


def test_a_state_without_places_gives_the_same_batches_and_the_same_places_again(setting: Setting) -> None:
    stream = setting.open()
    stream.next_batch(40)
    state = stream.state()
    assert all(lane["byte"] for lane in state["sources"][0]["lanes"])
    old = without_bytes(state)
    assert "byte" not in json.dumps(old["sources"][0]["lanes"])
    assert "byte" in json.dumps(state["sources"][0]["lanes"])
    expected = rows(drain(stream, 8))
    resumed = setting.open(state=old)
    assert rows(drain(resumed, 8)) == expected
    assert resumed.state() == stream.state()
