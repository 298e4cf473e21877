"""A stream resumes exactly where its state was saved."""

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import pretrain.data.stream
from pretrain.config.data import TokenizerConfig
from pretrain.data import BatchShare, DataError, StreamState
from pretrain.data.workers import InlineReader
from tests.data.corpus import (
    Setting,
    drain,
    make_setting,
    make_texts,
    on_ranks,
    rows,
    whole,
    write_jsonl,
    write_parquet,
)
from tests.data.oracle import oracle_rows


@pytest.fixture
def setting(tmp_path: Path, tokenizer: TokenizerConfig) -> Setting:
    """Two formats, both splits, documents longer and lanes shorter than a sequence, three epochs."""
    first = write_parquet(tmp_path / "a.parquet", make_texts(7, 30, longest=12), 4)
    second = write_jsonl(tmp_path / "b.jsonl.zst", ["sea " * 60, "", *make_texts(8, 10, longest=8)])
    return make_setting(
        tokenizer, first, second, lanes=4, sequence_length=17, epochs=3, split_units=2, validation_fraction=0.2
    )


def saved(state: StreamState) -> StreamState:
    """As a checkpoint gives it back."""
    copy: StreamState = json.loads(json.dumps(state))
    return copy


def test_resume_after_every_sequence(setting: Setting) -> None:
    """Mid-pass, mid-document, at the end of an epoch, in a tail that began an epoch or two before."""
    expected = oracle_rows(setting)
    stream = setting.open()
    for done in range(len(expected) + 1):
        state = saved(stream.state())
        assert state["sequences_emitted"] == done
        resumed = setting.open(state=state)
        assert resumed.state() == state
        assert rows(drain(resumed, 5)) == expected[done:]
        assert resumed.text_bytes == resumed.state()["text_bytes"]
        drain(stream, 1, limit=1)
    assert drain(setting.open(state=saved(stream.state())), 1) == []


@pytest.mark.parametrize("seed", range(5))
def test_resume_again_and_again_with_other_ranks_and_workers(
    setting: Setting, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each leg reads a few batches of another size and hands its state on; the last one reads to the end."""
    monkeypatch.setattr(pretrain.data.stream, "WorkerReader", InlineReader)
    rng = random.Random(seed)
    found: list[tuple[list[int], int]] = []
    state: StreamState | None = None
    for limit in (1, 2, 1, None):
        results = on_ranks(
            rng.randint(1, 3), partial(_leg, setting, state, rng.randint(0, 3), rng.randint(1, 12), limit)
        )
        shares, states = zip(*results, strict=True)
        assert all(one == states[0] for one in states)
        found += rows(whole(shares))
        state = states[0]
    assert found == oracle_rows(setting)


def _leg(
    setting: Setting, state: StreamState | None, workers: int, batch: int, limit: int | None, group: Any
) -> tuple[list[BatchShare], StreamState]:
    stream = setting.open(workers, group, state)
    return drain(stream, batch, limit), saved(stream.state())


def test_reading_ahead_does_not_show_in_the_state(setting: Setting) -> None:
    """The classic fault: a prefetched batch is lost at each resume."""
    stream = setting.open()
    stream.next_batch(2)
    before = stream.state()
    queues = stream._queues[0]
    assert queues.look_ahead(0, 2) == 2
    assert stream.state() == before
    rest = rows(drain(setting.open(state=saved(before)), 2))
    assert rest == rows(drain(stream, 2)) == oracle_rows(setting)[2:]


def test_the_second_resume_does_not_start_over(setting: Setting) -> None:
    expected = oracle_rows(setting)
    state: StreamState | None = None
    for step in range(4):
        stream = setting.open(state=state)
        assert rows(drain(stream, 6, limit=1)) == expected[6 * step : 6 * step + 6]
        state = saved(stream.state())


def test_an_endless_stream_resumes_in_a_late_epoch(setting: Setting) -> None:
    endless = Setting(setting.config, setting.tokenizer, setting.sequence_length, epochs=None)
    stream = endless.open()
    drain(stream, 16, limit=40)
    state = saved(stream.state())
    assert all(source["epoch"] > 3 for source in state["sources"])
    assert rows(drain(endless.open(state=state), 16, 5)) == rows(drain(stream, 16, 5))


def test_the_state_is_small(setting: Setting) -> None:
    """About 50 bytes a lane: no tokens, no texts."""
    stream = setting.open()
    stream.next_batch(9)
    assert len(json.dumps(stream.state())) < 500 + 60 * 2 * setting.config.lanes


def test_a_state_of_other_lanes_or_version_is_refused(setting: Setting) -> None:
    state = setting.open().state()
    with pytest.raises(ValueError, match=r"4 lanes and data\.lanes is 3"):
        setting.changed(lanes=3).open(state=state)
    state["version"] = 99
    with pytest.raises(ValueError, match="version 99"):
        setting.open(state=state)


def test_changed_text_under_a_cursor_is_refused(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["the whale " * 30, "a ship"])
    setting = make_setting(tokenizer, path, lanes=1, sequence_length=16)
    stream = setting.open()
    stream.next_batch(2)
    state = saved(stream.state())
    write_jsonl(path, ["short", "a ship " * 40])
    with pytest.raises(DataError, match="not the one that the saved state was taken from"):
        setting.open(state=state).next_batch(1)
