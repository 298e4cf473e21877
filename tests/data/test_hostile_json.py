"""JSON that other programs would choke on: read if it is valid, refused by name if not, and never without end."""

import gzip
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.data import DataConfig, SourceConfig
from pretrain.data import check_sources, make_catalog
from pretrain.data.bad_rows import BadRow
from pretrain.data.formats import read_unit
from pretrain.data.json_lines import JsonText


def setting(path: Path, **source: Any) -> DataConfig:
    return DataConfig(sources=[SourceConfig(path=str(path), **source)], lanes=1, validation_fraction=0.0)


def read(config: DataConfig) -> list[tuple[int, str | BadRow]]:
    [units] = make_catalog(config).units(config)
    return [one for unit in units for one in read_unit(unit, 0, 1 << 20) if one[1]]


DIGITS = "9" * 5000  # more than Python converts to a number


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_an_integer_of_any_size_is_a_number(tmp_path: Path, name: str) -> None:
    rows = f'{{"text": "large", "n": {DIGITS}, "m": {2**63 + 1}}}', '{"text": "small", "n": 3}'
    form = "[{}]" if name == "a.json" else "{}"
    (tmp_path / name).write_text(form.format(",\n".join(rows) if name == "a.json" else "\n".join(rows)))
    for where, expected in {
        None: ["large", "small"],
        "n > 1e300": ["large"],
        f"n < 1{'0' * 400}": ["small"],
        f"m == {2**63 + 1}": ["large"],
        f"m == {2**63}": [],
    }.items():
        assert [text for _, text in read(setting(tmp_path / name, where=where))] == expected


def test_a_first_row_that_is_nested_too_deeply_does_not_break_a_message(tmp_path: Path) -> None:
    deep = '{"text": "a", "x": ' + "[" * 100_000 + "]" * 100_000 + "}"
    (tmp_path / "a.jsonl").write_text(f'{deep}\n{{"text": "a", "lang": "en"}}\n')
    config = setting(tmp_path / "a.jsonl", where="langs == 'x'").model_copy(update={"max_bad_rows": 1})
    [problem] = check_sources(config)
    assert "did you mean lang?" in problem


@pytest.mark.parametrize("suffix", ["jsonl", "json"])
@pytest.mark.parametrize("blank", [b"\n", b" ", b"\n\r\n \t"])
def test_blanks_are_passed_in_blocks(
    tmp_path: Path, suffix: str, blank: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen MiB of them, in a few bytes of a file, take no step of Python each."""
    rows = [b'{"text": "a"}', b'{"text": "b"}']
    body = b"[" + b",".join(rows) + b"]" if suffix == "json" else b"\n".join(rows)
    (tmp_path / f"a.{suffix}.gz").write_bytes(gzip.compress(blank * ((1 << 24) // len(blank)) + body))
    lines, real = [], JsonText._text

    def text(self: JsonText, content: bytes | None, place: str) -> str | BadRow | None:
        lines.append(place)
        return real(self, content, place)

    monkeypatch.setattr(JsonText, "_text", text)
    found = read(setting(tmp_path / f"a.{suffix}.gz"))
    assert [text for _, text in found] == ["a", "b"]
    assert len(lines) < 200
    first = blank.count(b"\n") * ((1 << 24) // len(blank)) if suffix == "jsonl" else 0
    assert [row for row, _ in found] == [first, first + 1]


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("first", [0, 1, 4, 5, 9, 30])
def test_empty_lines_keep_the_numbers_of_the_rows(tmp_path: Path, parts: int, first: int) -> None:
    lines = [f'{{"text": "{number}"}}' if number % 7 in (0, 3, 4) else "" for number in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = setting(tmp_path / "a.jsonl", split_units=parts)
    [units] = make_catalog(config).units(config)
    for part, unit in enumerate(units):
        expected = [(row, str(number)) for row, number in enumerate(range(part, 60, parts)) if lines[number]]
        assert list(read_unit(unit, first, 1 << 20)) == [one for one in expected if one[0] >= first]


def test_brackets_without_end_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"[" * (1 << 24)))
    [problem] = check_sources(setting(tmp_path / "a.json.gz"))
    assert "a.json.gz: damaged after element 0: an element is nested more than 100,000 deep" in problem


def test_the_names_of_fields_cannot_break_a_message(tmp_path: Path) -> None:
    """They come from data: half a character, a line break, a sequence that a terminal obeys, or a megabyte."""
    row = r'{"\ud800": 1, "a\nb": 2, "\u001b[31m": 3, "' + "x" * 1_000_000 + '": 4, "lang": 5}'
    (tmp_path / "a.jsonl").write_text(row)
    [problem] = check_sources(setting(tmp_path / "a.jsonl"))
    assert problem.isprintable()
    assert r"its keys are \ud800, a\nb, \x1b[31m, xxx" in problem
    assert "x..., lang: set text_field" in problem
    assert len(problem) < 1000


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
@pytest.mark.parametrize("parts", [1, 2])
def test_files_with_byte_order_marks_may_be_joined(tmp_path: Path, name: str, parts: int) -> None:
    pieces = [b"\xef\xbb\xbf" + b'{"text": "%d"}\r\n{"text": "more"}\r\n' % number for number in range(3)]
    (tmp_path / name).write_bytes(b"".join(map(gzip.compress, pieces) if name.endswith(".gz") else pieces))
    config = setting(tmp_path / name, split_units=parts)
    assert check_sources(config) == []
    assert sorted(text for _, text in read(config) if isinstance(text, str)) == ["0", "1", "2", "more", "more", "more"]
