"""Estimates of a source's text: bounded, spread over all files, and with errors that cover the truth."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.data import DataConfig, SourceConfig, TokenizerConfig
from pretrain.data import load_tokenizer, make_catalog
from pretrain.data.estimate import AT_START, Effort, estimate_sources
from pretrain.data.quantity import Quantity, SourceEstimate
from tests.data.corpus import make_texts, write_jsonl, write_parquet

SMALL = Effort(read_bytes=48 << 10, tokenized_bytes=12 << 10, windows=24)
FILES = 40


class CountingTokenizer:
    """Counts the characters that are tokenized."""

    def __init__(self, config: TokenizerConfig) -> None:
        self.tokenizer: Any = load_tokenizer(config)
        self.characters = 0

    def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
        self.characters += sum(map(len, texts))
        return self.tokenizer.encode_batch_fast(texts, **options)


def ordered_texts(count: int) -> list[list[str]]:
    """Per file: the first third by name holds long texts of digits, which are one token each."""
    chooser = random.Random(5)
    return [
        ["".join(chooser.choices("0123456789 ", k=chooser.randint(200, 900))) for _ in range(20)]
        if index < count / 3
        else make_texts(100 + index, chooser.randint(10, 90), longest=30)
        for index in range(count)
    ]


def write_files(folder: Path, suffix: str, files: list[list[str]]) -> None:
    for index, texts in enumerate(files):
        path = folder / f"{index:03}{suffix}"
        if suffix == ".parquet":
            write_parquet(path, texts, 16)
        else:
            write_jsonl(path, texts)


def estimate(path: Path, tokenizer: Any, effort: Effort, seed: int = 0, **source: Any) -> SourceEstimate:
    config = DataConfig(sources=(SourceConfig(path=str(path), **source),), lanes=1)
    return estimate_sources(config, make_catalog(config), tokenizer, effort, seed)[0]


def truth(files: list[list[str]], tokenizer: Any) -> dict[str, int]:
    texts = [text for file in files for text in file if text]
    tokens = sum(len(one.ids) + 1 for one in tokenizer.encode_batch(texts, add_special_tokens=False))
    return {"documents": len(texts), "text_bytes": sum(len(text.encode()) for text in texts), "tokens": tokens}


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_small_source_is_counted(suffix: str, tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    files = [make_texts(7, 30), make_texts(8, 5)]
    write_files(tmp_path, suffix, files)
    loaded = load_tokenizer(tokenizer)
    found = estimate(tmp_path, loaded, AT_START, split_units=3)
    assert found.files == 2
    for name, value in truth(files, loaded).items():
        assert getattr(found, name) == Quantity(value, 0.0), name
    characters = sum(len(text) for file in files for text in file)
    assert found.characters_per_token == pytest.approx(characters / (found.tokens.value - found.documents.value))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_the_error_covers_the_truth_although_the_files_are_ordered(
    suffix: str, tmp_path: Path, tokenizer: TokenizerConfig
) -> None:
    """Reading the first files only would be wrong by a factor."""
    files = ordered_texts(FILES)
    write_files(tmp_path, suffix, files)
    loaded = load_tokenizer(tokenizer)
    expected = truth(files, loaded)
    found = [estimate(tmp_path, loaded, SMALL, seed) for seed in range(20)]
    for name in ("text_bytes", "tokens"):
        quantities = [getattr(one, name) for one in found]
        assert all(one.error > 0 for one in quantities)
        off = [(one.value - expected[name]) / one.error for one in quantities]
        assert sum(abs(one) < 2 for one in off) >= 16, (name, off)
        mean = sum(one.value for one in quantities) / len(quantities)
        assert mean == pytest.approx(expected[name], rel=0.07), name
        assert max(one.error for one in quantities) < 0.3 * expected[name], name
    assert all("sampled" in one.how[0] for one in found)


def test_the_work_is_bounded_whatever_the_size(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = make_texts(3, 12_000, longest=60)
    write_parquet(tmp_path / "a.parquet", texts, 300)
    write_jsonl(tmp_path / "b.jsonl", texts)
    counting = CountingTokenizer(tokenizer)
    found = estimate(tmp_path, counting, SMALL)
    assert 0 < counting.characters <= 2 * SMALL.tokenized_bytes
    assert found.sampled_documents < len(texts) / 4
    assert found.tokens.value == pytest.approx(2 * truth([texts], counting.tokenizer)["tokens"], rel=0.1)
    assert found.documents.value == pytest.approx(2 * sum(map(bool, texts)), rel=0.1)


def test_the_same_seed_chooses_the_same_sample(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    write_files(tmp_path, ".jsonl", ordered_texts(FILES))
    loaded = load_tokenizer(tokenizer)
    first, again, other = (estimate(tmp_path, loaded, SMALL, seed) for seed in (1, 1, 2))
    assert first == again
    assert first.tokens != other.tokens


def test_repeated_and_empty_documents_are_counted(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    texts = ["a b c", "", "d", "a b c", " \n", "e", "a b c", "f"]
    write_parquet(tmp_path / "a.parquet", texts, 3)
    found = estimate(tmp_path, load_tokenizer(tokenizer), Effort(1 << 20, 1 << 20, 4, examples=2))
    assert (found.empty, found.repeated) == (2 / 8, 2 / 6)
    assert found.documents.value == 7  # white space is trained on
    assert found.sampled_documents == 6
    assert len(found.examples) == 2


def test_one_long_line_is_no_obstacle(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    texts = [*make_texts(1, 500), "whale " * 40_000, *make_texts(2, 500)]
    write_jsonl(tmp_path / "a.jsonl", texts)
    loaded = load_tokenizer(tokenizer)
    found = estimate(tmp_path, loaded, SMALL)
    assert not found.problems
    assert found.text_bytes.value == pytest.approx(truth([texts], loaded)["text_bytes"], rel=0.25)


def test_a_line_that_cannot_be_read_is_reported(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    lines = [json.dumps({"text": "the whale " * 30}) for _ in range(2000)]
    lines[::2] = ["{"] * 1000
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = estimate(tmp_path, load_tokenizer(tokenizer), SMALL)
    assert "a.jsonl" in found.problems[0]
    assert "not valid JSON" in found.problems[0]


def test_a_compressed_file_without_a_byte_is_reported(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    (tmp_path / "a.jsonl.gz").touch()
    found = estimate(tmp_path, load_tokenizer(tokenizer), SMALL)
    assert found.tokens == Quantity(0)
    [problem] = found.problems
    assert "a.jsonl.gz: the file is empty, which a compressed file never is" in problem


def test_one_compressed_file_tells_little(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    texts = [chr(97 + index % 26) * 5 + str(index * 7919 % 10007) * (index % 9) for index in range(60_000)]
    write_jsonl(tmp_path / "a.jsonl.gz", texts)
    loaded = load_tokenizer(tokenizer)
    found = estimate(tmp_path, loaded, SMALL)
    assert found.text_bytes.error > 0
    assert "the first" in found.how[0]
    assert found.tokens.value == pytest.approx(truth([texts], loaded)["tokens"], rel=0.3)


@pytest.mark.parametrize(
    ("quantity", "shown"), [(Quantity(1234), "1,234"), (Quantity(1_234_567, 61_728), "about 1,230,000 +- 5.0 %")]
)
def test_quantities_say_whether_they_are_estimated(quantity: Quantity, shown: str) -> None:
    assert str(quantity) == shown
    assert quantity.lower <= quantity.value <= quantity.upper
