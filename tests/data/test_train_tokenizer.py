"""A tokenizer of one's own: the same for the same text, usable, and made of a bounded sample."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.cli import main
from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data import DataError, load_tokenizer, separator_id, train_tokenizer, vocabulary_rows
from pretrain.data.catalog import resolve_sources
from pretrain.data.lock import save_lock
from pretrain.data.train_tokenizer import sample_texts
from pretrain.data.units import Unit
from tests.conftest import TINY, merged
from tests.data.corpus import EOS, make_texts, write_jsonl, write_parquet
from tests.data.store import LINES, Store, remote_config


def config_of(*paths: Path) -> DataConfig:
    return DataConfig(sources=[{"path": str(path)} for path in paths], lanes=1)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [
        write_parquet(tmp_path / "a.parquet", make_texts(1, 200), 50),
        write_jsonl(tmp_path / "b.jsonl", make_texts(2, 100)),
    ]


def test_the_same_text_gives_the_same_tokenizer(tmp_path: Path, paths: list[Path]) -> None:
    """Also in another process, whose hash tables have other seeds."""
    words = ["data", "tokenizer", *map(str, paths), "--vocab-size", "300", "--to"]
    assert main([*words, str(tmp_path / "one.json")]) == 0
    program = f"from pretrain.cli import main; raise SystemExit(main({[*words, str(tmp_path / 'two.json')]!r}))"
    subprocess.run([sys.executable, "-c", program], check=True, env=None, cwd=Path(__file__).parents[2])
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    named = TokenizerConfig(path=str(tmp_path / "one.json"), eos_token=EOS)
    tokenizer = load_tokenizer(named)
    assert vocabulary_rows(tokenizer) == 300
    assert separator_id(tokenizer, named) == 0
    text = f"the naïve whale 🐋 {EOS} \x00"
    ids = tokenizer.encode(text).ids
    assert 0 not in ids
    assert tokenizer.decode(ids) == text
    assert len(tokenizer.encode("the whale").ids) <= 3


def test_it_refuses_what_it_cannot_do(tmp_path: Path, paths: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data", "tokenizer", str(paths[0]), "--to", str(tmp_path / "t.json"), "--vocab-size"]
    assert main([*words, "256"]) == 2
    assert "expected at least 257" in capsys.readouterr().err
    (tmp_path / "t.json").write_text("mine")
    assert main([*words, "300"]) == 2
    assert "exists already" in capsys.readouterr().err
    assert (tmp_path / "t.json").read_text() == "mine"
    (tmp_path / "t.json").unlink()
    empty = write_jsonl(tmp_path / "empty.jsonl", ["", ""])
    assert main([*words[:2], str(empty), *words[3:], "300"]) == 2
    assert "no text to train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["https://me:secret@host/a.jsonl", "--to", "t.json"], "data.sources.0.path: a URL with a password"),
        (["a.jsonl", "--to", "t.json", "--text-field", "{text"], "data.sources.0.text_field: has a single '{'"),
        (["a.jsonl", "--to", "/dev/null/t.json"], "/dev/null/t.json: cannot be written"),
    ],
)
def test_arguments_that_cannot_be_are_refused_in_a_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "tokenizer", *words, "--vocab-size", "300"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert "secret" not in err


def test_a_source_without_a_share_is_not_opened(paths: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    data = config_of(*paths).model_copy(update={"mixture": {"a": 1.0, "b": 0.0}})
    opened: list[str] = []
    real = train_tokenizer.read_unit

    def read_unit(unit: Unit, *rest: Any) -> Any:
        opened.append(unit.file.path)
        return real(unit, *rest)

    monkeypatch.setattr(train_tokenizer, "read_unit", read_unit)
    assert list(sample_texts(data, 1000, 0))
    assert set(opened) == {str(paths[0])}


def test_the_sample_is_bounded_seeded_and_of_all_units(paths: list[Path]) -> None:
    config = config_of(*paths)
    everything = sorted(sample_texts(config, 1 << 30, seed=0))
    assert everything == sorted(make_texts(1, 200) + make_texts(2, 100))
    sample = list(sample_texts(config, 5000, seed=0))
    size = sum(len(text.encode()) for text in sample)
    assert 4900 < size <= 5010
    assert list(sample_texts(config, 5000, seed=0)) == sample
    assert list(sample_texts(config, 5000, seed=1)) != sample
    of_b = set(make_texts(2, 100))
    share = sum(len(text.encode()) for text in sample if text in of_b) / size
    assert 0.1 < share < 0.3  # one unit of five


@pytest.mark.parametrize("kind", ["mixture", "stages"])
def test_each_source_gives_its_share_of_the_mixture(paths: list[Path], kind: str) -> None:
    shares = {"a": 1, "b": 3}
    mixed: dict[str, Any] = {"mixture": shares}
    if kind == "stages":
        mixed = {"stages": [{"mixture": shares, "until_tokens": 10}, {"mixture": {"a": 1}}]}
    config = DataConfig(sources=[{"path": str(path)} for path in paths], lanes=1, **mixed)
    of_b, sample = set(make_texts(2, 100)), list(sample_texts(config, 8000, seed=0))
    sizes = [sum(len(text.encode()) for text in sample if (text in of_b) is one) for one in (False, True)]
    assert sizes[0] == pytest.approx(2000, abs=100)
    assert sizes[1] == pytest.approx(6000, abs=100)


def test_conditions_and_templates_decide_the_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"n": n, "m": str(n), "a": {"b": f"text {n}"}}) + "\n" for n in range(9)))
    source = {"path": str(path), "where": "n >= 7", "text_field": "{m}: {a.b}"}
    sample = sample_texts(DataConfig(sources=[source], lanes=1), 1000, 0)
    assert [text for text in sample if text] == ["7: text 7", "8: text 8"]
    source["text_field"] = "n"  # a number
    config = DataConfig(sources=[source], lanes=1, max_bad_rows=1)
    with pytest.raises(DataError, match=r"2 bad rows so far, more than the 1 of data\.max_bad_rows"):
        list(sample_texts(config, 1000, 0))
    assert not any(sample_texts(config.model_copy(update={"max_bad_rows": 2}), 1000, 0))


def test_remote_sources_are_read_as_the_lock_says(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_lock(resolve_sources(remote_config(LINES)), tmp_path / "run.lock.json")
    store.listed.clear()
    changes = {"data.sources": [{"path": LINES}], "run.root": str(tmp_path / "runs")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(merged(TINY, changes)))
    command = ["data", "tokenizer", str(tmp_path / "run.yaml"), "--vocab-size", "300", "--to", str(tmp_path / "t.json")]
    assert main(command) == 0
    assert store.listed == {}
    assert "300 entries" in capsys.readouterr().out


def test_prepared_data_holds_no_text(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read as the index"):
        list(sample_texts(config_of(tmp_path), 10, 0))
