"""The stream is the same on any number of ranks and workers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pretrain.data.stream
from pretrain.config.data import TokenizerConfig
from pretrain.data import DataError, StreamState
from pretrain.data.packing import Item
from pretrain.data.workers import InlineReader
from pretrain.processes.errors import PeerError
from pretrain.processes.exit_codes import BAD_INPUT, FAILED
from tests.data.corpus import (
    Setting,
    drain,
    make_setting,
    make_texts,
    on_ranks,
    ranks_of,
    rows,
    whole,
    write_jsonl,
    write_parquet,
)
from tests.data.oracle import oracle_rows


@pytest.fixture
def setting(tmp_path: Path, tokenizer: TokenizerConfig) -> Setting:
    """Lanes of unequal length, so that they leave the ring one by one; more lanes than a batch has rows."""
    texts = [text * (1 + 5 * (i % 7 == 0)) for i, text in enumerate(make_texts(5, 60, longest=25))]
    path = write_parquet(tmp_path / "a.parquet", texts, 4)
    return make_setting(tokenizer, path, lanes=7, epochs=2, sequence_length=13)


def read(setting: Setting, workers: int, group: Any, batch: int = 5) -> tuple[list[str], list[StreamState], int]:
    """Hashes of all batches and the state after each."""
    stream = setting.open(workers, group)
    hashes, states = [], [stream.state()]
    for one in iter(lambda: drain(stream, batch, limit=1), []):
        hashes.append(one[0].sha256(ranks_of(group)))
        states.append(stream.state())
    stream.close()
    return hashes, states, stream.text_bytes


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_batches_and_states_are_equal_for_all(
    setting: Setting, ranks: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a worker reads is the same in a process or not; processes are tested apart.
    monkeypatch.setattr(pretrain.data.stream, "WorkerReader", InlineReader)
    expected = read(setting, 0, None)
    for result in on_ranks(ranks, lambda group: read(setting, workers, group)):
        assert result == expected


def test_batches_of_several_ranks_are_those_of_the_definition(setting: Setting) -> None:
    assert rows(whole(on_ranks(3, lambda group: drain(setting.open(group=group), 4)))) == oracle_rows(setting)


def test_ranks_without_a_lane_take_part(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    path = write_parquet(tmp_path / "a.parquet", make_texts(2, 12), 3)
    setting = make_setting(tokenizer, path, lanes=2)
    expected = read(setting, 0, None)
    assert on_ranks(3, lambda group: read(setting, 0, group)) == [expected] * 3


def test_validation_bytes_are_summed_over_ranks(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    path = write_parquet(tmp_path / "a.parquet", make_texts(2, 40), 3)
    setting = make_setting(tokenizer, path, lanes=2, split="validation", validation_fraction=0.5, epochs=None)
    results = on_ranks(2, lambda group: read(setting, 0, group))
    assert results == [read(setting, 0, None)] * 2
    assert results[0][2] > 0


def failures(setting: Setting) -> list[DataError | PeerError | RuntimeError]:
    """The error of each of two ranks that read until one of them fails."""

    def read_until_error(group: Any) -> DataError | PeerError | RuntimeError:
        stream = setting.open(group=group)
        with pytest.raises((DataError, PeerError, RuntimeError)) as error:
            drain(stream, 4)
        with pytest.raises(type(error.value)) as again:  # the stream does not continue behind the fault
            stream.next_batch(1)
        assert again.value is error.value
        return error.value

    return on_ranks(2, read_until_error)


def test_all_ranks_learn_of_a_fault_on_one(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    """Or the others would wait for it in a collective."""
    good = write_jsonl(tmp_path / "good.jsonl", ["the sea"] * 50)
    bad = write_jsonl(tmp_path / "bad.jsonl", ["a ship"] * 20)
    bad.write_bytes(bad.read_bytes() + b'{"text": \n')
    found = failures(make_setting(tokenizer, good, bad, lanes=2))
    [own] = (error for error in found if isinstance(error, DataError))
    [peer] = (error for error in found if error is not own)
    assert "bad.jsonl: line 21 is not valid JSON" in str(own)
    assert isinstance(peer, PeerError)
    assert (found.index(own), f"{type(own).__name__}: {own}", BAD_INPUT) == (peer.rank, peer.text, peer.exit_code)


def test_a_dead_worker_of_one_rank_is_not_bad_input_on_the_other(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message that all ranks raised as a DataError would send the reader to look for a fault in the data."""
    path = write_parquet(tmp_path / "a.parquet", make_texts(2, 12), 3)

    def items(reader: InlineReader, ring: int) -> Iterator[Item]:
        for item in reader._items[ring]:
            if item.lane == 1:
                raise RuntimeError("a data worker ended unexpectedly")
            yield item

    monkeypatch.setattr(InlineReader, "items", items)
    peer, own = failures(make_setting(tokenizer, path, lanes=2))
    assert type(own) is RuntimeError
    assert isinstance(peer, PeerError)
    assert (peer.rank, peer.text, peer.exit_code) == (1, f"RuntimeError: {own}", FAILED)
