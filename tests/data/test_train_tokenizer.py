"""A tokenizer of one's own: the same for the same text, usable, and made of a bounded sample."""

import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.cli import main
from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data import DataError, load_tokenizer, separator_id, vocabulary_rows
from pretrain.data.train_tokenizer import sample_texts
from tests.data.corpus import EOS, make_texts, write_jsonl, write_parquet


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


def test_prepared_data_holds_no_text(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read as the index"):
        list(sample_texts(config_of(tmp_path), 10, 0))
