"""Text that is counted while something else reads it: no file is opened again for an estimate."""

import random
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data import check as check_module
from pretrain.data import load_tokenizer, make_catalog, survey
from pretrain.data.estimate import source_tokens
from pretrain.data.quantity import Quantity
from pretrain.data.text_count import TextCount
from tests.data.corpus import make_texts, write_jsonl, write_parquet
from tests.data.test_catalog import OPENS
from tests.data.test_estimate import CountingTokenizer, ordered_texts


def counted(texts: list[str]) -> TextCount:
    count = TextCount()
    for text in filter(None, texts):
        count.add(text, len(text.encode()))
    return count


def truth(texts: list[str], tokenizer: Any) -> int:
    return sum(len(one.ids) + 1 for one in tokenizer.encode_batch([t for t in texts if t], add_special_tokens=False))


def test_little_text_is_counted_exactly(tokenizer: TokenizerConfig) -> None:
    texts, loaded = make_texts(1, 300), load_tokenizer(tokenizer)
    count = counted(texts)
    assert count.documents == sum(map(bool, texts))
    assert count.text_bytes == sum(len(text.encode()) for text in texts)
    assert count.tokens(loaded) == Quantity(truth(texts, loaded), 0.0)
    assert counted([]).tokens(loaded) == Quantity(0.0)


@pytest.mark.parametrize("kind", ["short", "ordered", "one", "mixed"])
def test_much_text_is_estimated_within_its_error(kind: str, tokenizer: TokenizerConfig) -> None:
    """Long and short documents with different rates, ordered by them, count in proportion to their bytes."""
    chooser, loaded = random.Random(3), load_tokenizer(tokenizer)
    texts = {
        "short": make_texts(2, 6000),
        "ordered": [text for file in ordered_texts(60) for text in file],
        "one": [" ".join(make_texts(5, 4000))],
        "mixed": [
            "".join(chooser.choices("0123456789 ", k=20_000)) if chooser.random() < 0.03 else text
            for text in make_texts(6, 3000)
        ],
    }[kind]
    count = counted(texts)
    found, expected = count.tokens(loaded), truth(texts, loaded)
    assert count.text_bytes > 200_000
    assert 0 < found.error < 0.15 * expected
    assert abs(found.value - expected) < 3 * found.error


def test_what_is_tokenized_is_bounded(tokenizer: TokenizerConfig) -> None:
    counting: Any = CountingTokenizer(tokenizer)
    counted(make_texts(2, 40_000)).tokens(counting)
    assert 100_000 < counting.characters < 300_000


def test_a_launch_counts_local_text_without_opening_a_file_again(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    texts, loaded = make_texts(9, 200), load_tokenizer(tokenizer)
    (tmp_path / "b").mkdir()
    write_parquet(tmp_path / "a.parquet", texts, 30)
    for index in range(3):
        write_jsonl(tmp_path / f"b/{index}.jsonl.zst", texts)
    sources = [{"path": str(tmp_path / "a.parquet")}, {"path": str(tmp_path / "b"), "split_units": 2}]
    config = DataConfig(sources=sources, lanes=2)
    counts: dict[int, TextCount] = {}
    catalog, problems = survey(config, counts=counts)
    assert not problems
    one = truth(texts, loaded)
    found: list[Quantity] = []
    assert OPENS.during(tmp_path, lambda: found.extend(source_tokens(config, catalog, loaded, counts))) == {}
    assert found == [Quantity(one, 0.0), Quantity(3 * one, 0.0)]
    assert found == source_tokens(config, make_catalog(config), loaded, {})


def test_a_source_that_was_not_read_in_full_is_sampled(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts, loaded = make_texts(9, 400), load_tokenizer(tokenizer)
    small, large = (write_jsonl(tmp_path / f"{name}.jsonl", texts[: 400 if name == "large" else 20])
                    for name in ("small", "large"))  # fmt: skip
    monkeypatch.setattr(check_module, "FULL_SCAN_BYTES", small.stat().st_size)
    config = DataConfig(sources=[{"path": str(small)}, {"path": str(large)}], lanes=2)
    counts: dict[int, TextCount] = {}
    catalog, problems = survey(config, counts=counts)
    assert (list(counts), problems) == ([0], [])
    found = source_tokens(config, catalog, loaded, counts)
    assert found == [Quantity(truth(texts[:20], loaded), 0.0), Quantity(truth(texts, loaded), 0.0)]
