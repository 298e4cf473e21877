"""What prepared sources hold is counted, and shown as counted."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pretrain.cli import main
from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data import load_tokenizer, make_catalog
from pretrain.data.estimate import AT_START, TO_INSPECT, Effort, estimate_sources, source_tokens
from pretrain.data.prepared import speedrun
from pretrain.data.prepared.layout import load_index
from pretrain.data.prepared.prepare import PrepareOptions, prepare
from pretrain.data.quantity import Quantity, SourceEstimate
from tests.conftest import REPOSITORY, TINY, merged
from tests.data.corpus import EOS, make_texts, write_jsonl
from tests.data.test_speedrun_shards import SEPARATOR, gpt2, write_bin

__all__ = ["gpt2"]
TEXTS = [*make_texts(4, 300), "the sea " * 20, "the sea " * 20]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: TokenizerConfig) -> Path:
    """Prepared data in several shards."""
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    config = DataConfig(sources=[{"path": str(tmp_path / "a.jsonl"), "licence": "CC0"}], lanes=1)
    prepare(config, tokenizer, tmp_path / "out", options=PrepareOptions(shard_tokens=4000))
    assert len(load_index(str(tmp_path / "out")).shards) > 2
    return tmp_path / "out"


def estimate(path: Path, tokenizer: TokenizerConfig, effort: Effort) -> SourceEstimate:
    config = DataConfig(sources=[{"path": str(path)}], lanes=1)
    return estimate_sources(config, make_catalog(config), load_tokenizer(tokenizer), effort)[0]


@pytest.mark.parametrize("effort", [AT_START, TO_INSPECT, Effort(100, 1, 1)])
def test_a_prepared_folder_is_counted_by_its_index(folder: Path, tokenizer: TokenizerConfig, effort: Effort) -> None:
    found, loaded = estimate(folder, tokenizer, effort), load_tokenizer(tokenizer)
    filled = [text for text in TEXTS if text]
    ids = [len(loaded.encode(text, add_special_tokens=False).ids) for text in filled]
    assert found.documents == Quantity(len(filled), 0.0)
    assert found.tokens == Quantity(sum(ids) + len(ids), 0.0)
    assert found.text_bytes == Quantity(sum(len(text.encode()) for text in filled), 0.0)
    assert found.bytes_per_token == pytest.approx(found.text_bytes.value / sum(ids))
    assert found.characters_per_token == pytest.approx(sum(map(len, filled)) / sum(ids))
    assert (found.licences, found.problems) == (("CC0",), ())
    config = DataConfig(sources=[{"path": str(folder)}], lanes=1)
    assert source_tokens(config, make_catalog(config), loaded, {}) == [found.tokens]


def test_the_sample_of_a_prepared_folder_shows_documents(folder: Path, tokenizer: TokenizerConfig) -> None:
    found = estimate(folder, tokenizer, TO_INSPECT)
    assert found.sampled_documents == found.documents.value
    repeats = len([text for text in TEXTS if text]) - len({text for text in TEXTS if text})
    assert repeats >= 1
    assert found.repeated == pytest.approx(repeats / found.documents.value)
    assert found.examples
    assert all(any(text.startswith(example) for text in TEXTS) for example in found.examples)


def test_bin_shards_are_counted_by_their_headers(
    tmp_path: Path, gpt2: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speedrun, "UNIT_TOKENS", 500)
    alphabet = load_tokenizer(gpt2)
    texts = [text.replace(EOS, "") for text in make_texts(9, 200)]
    total, documents, size = 0, 0, 0
    for shard in range(2):
        tokens: list[int] = []
        for text in filter(None, texts[100 * shard : 100 * shard + 100]):
            tokens += [SEPARATOR, *alphabet.encode(text, add_special_tokens=False).ids]
            documents, size = documents + 1, size + len(text.encode())
        write_bin(tmp_path / f"{shard}.bin", tokens)
        total += len(tokens)
    exact = estimate(tmp_path / "*.bin", gpt2, AT_START)
    assert exact.tokens == Quantity(total, 0.0)
    assert (exact.documents, exact.text_bytes) == (Quantity(documents, 0.0), Quantity(size, 0.0))
    assert exact.bytes_per_token == pytest.approx(size / (total - documents))
    rough = estimate(tmp_path / "*.bin", gpt2, Effort(total, 1, 1, examples=2))
    assert rough.tokens == Quantity(total, 0.0)
    assert rough.documents.error > 0
    assert rough.documents.value == pytest.approx(documents, abs=4 * rough.documents.error)
    assert rough.text_bytes.value == pytest.approx(size, abs=4 * rough.text_bytes.error)
    assert rough.sampled_documents < 0.8 * documents
    assert all(any(text.startswith(example) for text in texts) for example in rough.examples)


@pytest.fixture
def config_file(tmp_path: Path, folder: Path, tokenizer: TokenizerConfig) -> Path:
    changes: dict[str, Any] = {
        "run.root": str(tmp_path / "runs"),
        "model.vocab_size": 300,
        "tokenizer.path": tokenizer.path,
        "data": {"sources": [{"path": str(folder)}], "lanes": 1, "validation_fraction": 0},
        "train.total_tokens": 4 * 768,
        "schedule": {"kind": "constant"},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(merged(TINY, changes)))
    return tmp_path / "run.yaml"


def test_inspect_and_check_show_the_counts_as_exact(
    config_file: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = load_index(str(folder))
    assert main(["data", "inspect", str(config_file), "--json"]) == 0
    [source] = json.loads(capsys.readouterr().out)["sources"]
    for name in ("tokens", "documents", "text_bytes"):
        assert source[name] == {"value": getattr(index, name), "standard_error": 0, "exact": True}
    assert main(["data", "inspect", str(config_file)]) == 0
    assert f"  tokens      {index.tokens:,}\n" in capsys.readouterr().out
    assert main(["check", str(config_file)]) == 0
    shown = capsys.readouterr().out
    assert f"out: {index.tokens:,} tokens of training text (counted)" in shown
    assert "no text was found" not in shown


def test_inspect_refuses_tokens_of_another_tokenizer(config_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = f"tokenizer.path={REPOSITORY / 'assets/tokenizer/tokenizer.json'}"
    assert main(["data", "inspect", str(config_file), other]) == 2
    assert "was prepared with another tokenizer" in capsys.readouterr().err


def test_overlap_refuses_tokens(config_file: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "overlap", str(config_file), "--tasks", "hellaswag"]) == 2
    shown = capsys.readouterr()
    assert f"{folder}: holds tokens, not text: name the source that it was prepared from" in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
