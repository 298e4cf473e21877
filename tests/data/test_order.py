"""Which tokens come, and in which order."""

from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

from pretrain.config.data import TokenizerConfig
from pretrain.data import load_tokenizer
from pretrain.data.order import epoch_order, make_plan
from pretrain.data.units import DataFile, TextRecipe, Unit
from tests.data.corpus import EOS, Setting, drain, make_setting, make_texts, rows, write_jsonl, write_parquet
from tests.data.oracle import epoch_texts, oracle_rows


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=25),
    rows_per_group=st.integers(1, 4),
    lanes=st.integers(1, 4),
    split_units=st.integers(1, 3),
    sequence_length=st.integers(1, 20),
    epochs=st.integers(1, 3),
    seed=st.integers(0, 5),
    batch=st.integers(1, 9),
)
def test_batches_are_those_of_the_definition(
    tmp_path: Path, tokenizer: TokenizerConfig, texts: list[str], rows_per_group: int, lanes: int, split_units: int,
    sequence_length: int, epochs: int, seed: int, batch: int,
) -> None:  # fmt: skip
    path = write_parquet(tmp_path / "a.parquet", [*texts, "one that is not empty"], rows_per_group)
    groups = -(-(len(texts) + 1) // rows_per_group)
    setting = make_setting(
        tokenizer, path, lanes=min(lanes, groups * split_units), split_units=split_units, seed=seed,
        sequence_length=sequence_length, epochs=epochs,
    )  # fmt: skip
    batches = drain(setting.open(), batch)
    assert rows(batches) == oracle_rows(setting)
    assert all(len(one.tokens) == batch for one in batches[:-1])


def test_every_token_of_every_document_is_a_target_once_an_epoch(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    texts = make_texts(1, 60)
    setting = make_setting(tokenizer, write_parquet(tmp_path / "a.parquet", texts, 7), lanes=3, epochs=3)
    stream = setting.open()
    targets: Counter[int] = Counter()
    for tokens, length in rows(drain(stream, 5)):
        targets.update(tokens[1 : 1 + length])
    plain = load_tokenizer(tokenizer)
    eos = plain.token_to_id(EOS)
    expected = Counter(token for text in texts if text for token in [*plain.encode(text).ids, eos])
    assert targets == Counter({token: 3 * count for token, count in expected.items()})
    assert stream.text_bytes == 3 * sum(len(text.encode()) for text in texts)


def test_a_lane_without_a_whole_sequence_in_an_epoch_carries_its_tokens_on(
    tmp_path: Path, tokenizer: TokenizerConfig
) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a", "the sea " * 20, "b"], 1)
    setting = make_setting(tokenizer, path, lanes=3, sequence_length=9, epochs=7)
    assert rows(drain(setting.open(), 4)) == oracle_rows(setting)


def test_a_document_may_be_longer_than_context_and_batch(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["whale " * 500, "ship"], 1)
    setting = make_setting(tokenizer, path, lanes=2, sequence_length=4, epochs=2)
    assert rows(drain(setting.open(), 2)) == oracle_rows(setting)


def test_special_tokens_spelt_out_in_a_text_are_ordinary_text(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    text = f"before {EOS} after"
    setting = make_setting(tokenizer, write_jsonl(tmp_path / "a.jsonl", [text]), lanes=1, sequence_length=64, epochs=1)
    [(tokens, length)] = rows(drain(setting.open(), 1))
    eos = load_tokenizer(tokenizer).token_to_id(EOS)
    assert tokens[0] == eos
    assert tokens[1 : 1 + length].count(eos) == 1
    assert tokens[length] == eos
    assert Tokenizer.from_file(tokenizer.path).decode(tokens[1:length]) == text


def test_empty_documents_add_nothing(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    with_empty = write_jsonl(tmp_path / "a.jsonl", ["", "the sea", "", "a ship", ""])
    without = write_jsonl(tmp_path / "b.jsonl", ["the sea", "a ship"])
    first, second = (make_setting(tokenizer, path, lanes=1).open() for path in (with_empty, without))
    assert rows(drain(first, 2)) == rows(drain(second, 2))


def test_documents_without_tokens_add_nothing(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    """A normaliser may leave nothing of a text that is not empty."""
    stripping = Tokenizer.from_file(tokenizer.path)
    stripping.normalizer = normalizers.Strip()
    stripping.save(str(tmp_path / "tokenizer.json"))
    config = TokenizerConfig(path=str(tmp_path / "tokenizer.json"))
    with_blank = write_jsonl(tmp_path / "a.jsonl", [" ", "the sea", " \n "])
    without = write_jsonl(tmp_path / "b.jsonl", ["the sea"])
    first, second = (make_setting(config, path, lanes=1).open() for path in (with_blank, without))
    assert rows(drain(first, 2)) == rows(drain(second, 2))


def _lane_texts(setting: Setting, epoch: int) -> list[str]:
    return [text for lane in epoch_texts(setting, epoch) for text in lane]


def test_order_depends_on_seed_and_epoch_but_the_documents_do_not(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    path = write_parquet(tmp_path / "a.parquet", [f"document {i}" for i in range(40)], 2)
    setting = make_setting(tokenizer, path, lanes=4, seed=0)
    orders = [_lane_texts(setting, 0), _lane_texts(setting, 1), _lane_texts(setting.changed(seed=1), 0)]
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1
    assert _lane_texts(setting, 0) == orders[0]


def test_the_order_of_a_seed_never_changes() -> None:
    """Saved states rely on it, whatever is installed: these orders are written down."""
    units = tuple(Unit(DataFile(name), TextRecipe(), None, None, 0, 1) for name in "abcdefgh")
    order = ["".join(u.file.path for u in epoch_order({0: units}, seed=7, epoch=e)) for e in (0, 1)]
    assert order == ["bcdfhgea", "eahdfcbg"]


def test_units_are_dealt_to_all_lanes_in_turn(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    path = write_parquet(tmp_path / "a.parquet", [str(i) for i in range(11)], 1)
    plan = make_plan(make_setting(tokenizer, path, lanes=4).config, "train", None)
    order = epoch_order(plan.rings[0].units, 0, 5)
    dealt = [plan.lane_units(5, lane) for lane in range(4)]
    assert [dealt[index % 4][index // 4] for index in range(11)] == order


def test_the_text_of_a_large_file_needs_several_refills(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How much is tokenized and read at a time must not show in the batches."""
    path = write_parquet(tmp_path / "a.parquet", make_texts(3, 80), 20)
    setting = make_setting(tokenizer, path, lanes=3, sequence_length=11)
    expected = rows(drain(setting.open(), 4))
    monkeypatch.setattr("pretrain.data.reading.REFILL_BYTES", 50)
    monkeypatch.setattr("pretrain.data.packing.READ_AHEAD_BYTES", 100)
    assert rows(drain(setting.open(), 4)) == expected
