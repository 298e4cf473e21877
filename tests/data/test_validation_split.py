"""The validation split: the same documents everywhere, never trained on, read once."""

from pathlib import Path

import pytest

from pretrain.config.data import TokenizerConfig
from pretrain.data import DataError, validation_text
from tests.data.corpus import drain, make_setting, make_texts, rows, write_jsonl, write_parquet
from tests.data.oracle import epoch_texts, in_validation, oracle_rows

TEXTS = make_texts(21, 50)


def test_the_splits_divide_the_documents(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS, 6)
    train = make_setting(tokenizer, path, validation_fraction=0.3, epochs=1)
    validation = make_setting(tokenizer, path, validation_fraction=0.3, epochs=None, split="validation")
    streams = [setting.open() for setting in (train, validation)]
    for stream, setting in zip(streams, (train, validation), strict=True):
        assert rows(drain(stream, 3)) == oracle_rows(setting)
    held_out = [text for text in TEXTS if in_validation(text, 0.3)]
    assert 0 < len(held_out) < len(TEXTS)
    assert streams[1].text_bytes == sum(len(text.encode()) for text in held_out)
    assert streams[0].text_bytes + streams[1].text_bytes == sum(len(text.encode()) for text in TEXTS)


def test_no_setting_of_the_order_changes_the_validation_batches(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS, 6)
    setting = make_setting(tokenizer, path, validation_fraction=0.3, epochs=None, split="validation")
    source = setting.config.sources[0].model_copy(update={"max_epochs": 1})
    others = [setting.changed(lanes=5), setting.changed(seed=9), setting.changed(sources=[source])]
    expected = rows(drain(setting.open(), 4))
    assert all(rows(drain(other.open(), 4)) == expected for other in others)
    assert rows(drain(setting.open(), 7)) == expected


def test_validation_bytes_count_only_what_was_returned(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    """A validation that stops early divides by the bytes of its own targets."""
    path = write_jsonl(tmp_path / "a.jsonl", ["the whale " * 50])
    setting = make_setting(tokenizer, path, validation_fraction=0.999999, epochs=None, split="validation")
    stream = setting.open()
    seen = [stream.text_bytes]
    while drain(stream, 1, limit=1):
        seen.append(stream.text_bytes)
    assert seen[0] == 0
    assert seen == sorted(set(seen))
    assert seen[-1] == 500


def test_validation_text_is_what_the_stream_reads(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS, 6)
    setting = make_setting(tokenizer, path, validation_fraction=0.3, epochs=None, split="validation")
    text = validation_text(setting.config)
    assert text == "".join(epoch_texts(setting, 0)[0])
    stream = setting.open()
    drain(stream, 8)
    assert stream.text_bytes == len(text.encode())


@pytest.mark.parametrize(("split", "fraction"), [("validation", 0.0), ("validation", 1e-9), ("train", 0.9999999)])
def test_a_split_without_documents_is_refused(
    tmp_path: Path, tokenizer: TokenizerConfig, split: str, fraction: float
) -> None:
    """An endless stream would look for them for ever."""
    path = write_parquet(tmp_path / "a.parquet", TEXTS, 6)
    setting = make_setting(tokenizer, path, validation_fraction=fraction, epochs=None, split=split)
    with pytest.raises(DataError, match=f"belongs to the {split} split"):
        setting.open().next_batch(1)


def test_validation_is_read_once(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS, 6)
    setting = make_setting(tokenizer, path, validation_fraction=0.3, epochs=2, split="validation")
    with pytest.raises(ValueError, match="epochs is 2"):
        setting.open()
