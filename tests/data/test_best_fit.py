"""Best-fit packing: nothing is lost, nothing that fits is cut, little is padded, and every position can be resumed."""

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

import pretrain.data.stream
from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data import DataError, StreamState
from pretrain.data.batch import BatchShare
from pretrain.data.best_fit import WINDOW_SEQUENCES, Piece, best_fit, pack_window
from pretrain.data.prepared.plan import PrepareOptions
from pretrain.data.prepared.prepare import prepare
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
from tests.data.oracle import epoch_texts

pytestmark = pytest.mark.usefixtures("warm")

EOS_ID = 0  # of the tokenizer of these tests
SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=60)


def cuts_of_concatenation(sizes: Sequence[int], capacity: int) -> int:
    """Documents that are divided if all are joined without gaps."""
    ends = np.cumsum(sizes).tolist()
    return sum((end - 1) // capacity != (end - size) // capacity for size, end in zip(sizes, ends, strict=True))


@given(SIZES, st.integers(1, 40))
def test_the_packer_keeps_its_promises(sizes: list[int], capacity: int) -> None:
    sequences = best_fit(sizes, capacity)
    pieces = [piece for pieces in sequences for piece in pieces]
    found: dict[int, list[Piece]] = {}
    for piece in sorted(pieces):
        found.setdefault(piece.document, []).append(piece)
    assert sorted(found) == list(range(len(sizes)))
    for document, parts in found.items():  # no token lost, none twice
        assert [part.begin for part in parts] == [0, *(part.end for part in parts[:-1])]
        assert parts[-1].end == sizes[document]
        if sizes[document] <= capacity:  # no document cut that fits, and the others as seldom as possible
            assert len(parts) == 1
        assert all(part.end - part.begin == capacity for part in parts[:-1])
    filled = [sum(piece.end - piece.begin for piece in pieces) for pieces in sequences]
    assert all(0 < tokens <= capacity for tokens in filled)
    # No two sequences could have been one, or best fit would have put the second one's into the first.
    smallest, *others = sorted(filled)
    assert all(smallest + other > capacity for other in others)
    for first, *rest in sequences:
        assert first.begin or not any(piece.begin for piece in rest)  # a rest follows its true predecessor if possible
    assert sum(len(parts) > 1 for parts in found.values()) <= cuts_of_concatenation(sizes, capacity)


@given(SIZES, st.integers(1, 40))
def test_a_document_goes_where_the_least_room_remains(sizes: list[int], capacity: int) -> None:
    """The same packing from the definition: largest first, into the fullest sequence that has room."""
    room: list[int] = []
    for size in sorted((size % capacity for size in sizes), reverse=True):
        if size:
            fitting = [free for free in room if free >= size]
            if fitting:
                room.remove(min(fitting))
            room.append((min(fitting) if fitting else capacity) - size)
    sequences = best_fit(sizes, capacity)
    free = [capacity - sum(piece.end - piece.begin for piece in pieces) for pieces in sequences]
    assert sorted(free) == sorted([*room, *[0] * sum(size // capacity for size in sizes)])


@given(SIZES, st.integers(1, 40))
def test_a_window_ends_where_little_is_padded(sizes: list[int], capacity: int) -> None:
    count, sequences = pack_window(sizes, capacity, whole=False)
    assert sequences == best_fit(sizes[:count], capacity)
    assert 2 * sum(sizes[:count]) >= sum(sizes)

    def padding(taken: int) -> float:
        return len(best_fit(sizes[:taken], capacity)) * capacity / sum(sizes[:taken])

    assert padding(count) <= padding(len(sizes))
    assert pack_window(sizes, capacity, whole=True) == (len(sizes), best_fit(sizes, capacity))


@pytest.mark.parametrize(("capacity", "mean", "spread", "most"), [
    (2048, 700, 1.0, 0.015), (2048, 300, 1.2, 0.005), (2048, 2000, 1.2, 0.035), (1024, 700, 1.2, 0.025),
])  # fmt: skip
def test_little_is_padded_for_the_lengths_of_web_text(capacity: int, mean: int, spread: float, most: float) -> None:
    """Log-normal lengths; and of the documents that fit into a sequence, concatenation cuts many and best fit none."""
    generator = np.random.default_rng(0)
    lengths = np.exp(generator.normal(np.log(mean) - spread**2 / 2, spread, 4000))
    sizes = np.maximum(2, lengths).astype(int).tolist()
    begin, sequences = 0, 0
    while sum(sizes[begin:]) >= WINDOW_SEQUENCES * capacity:
        end = begin
        while sum(sizes[begin:end]) < WINDOW_SEQUENCES * capacity:
            end += 1
        count, packed = pack_window(sizes[begin:end], capacity, whole=False)
        begin += count
        sequences += len(packed)
    assert 0 < 1 - sum(sizes[:begin]) / (sequences * capacity) < most
    too_long = sum(size > capacity for size in sizes[:begin])
    assert too_long < 0.8 * cuts_of_concatenation(sizes[:begin], capacity)


def test_the_order_of_the_sequences_does_not_depend_on_the_lengths() -> None:
    """Sequences of long documents do not come first, or all lanes would begin their windows with long documents."""
    generator = np.random.default_rng(1)
    early = []
    for _ in range(200):
        sizes = np.maximum(2, np.exp(generator.normal(4, 1, 80))).astype(int).tolist()
        sequences = best_fit(sizes, 200)
        numbers = [len(pieces) for pieces in sequences]
        early.append(np.mean(numbers[: len(numbers) // 2]) - np.mean(numbers[len(numbers) // 2 :]))
    assert abs(np.mean(early)) < 0.3  # documents per sequence; there are 3


@pytest.fixture
def setting(tmp_path: Path, tokenizer: TokenizerConfig) -> Setting:
    """Two formats, both splits, documents longer than a sequence and than a window, three epochs."""
    first = write_parquet(tmp_path / "a.parquet", make_texts(7, 60, longest=12), 4)
    second = write_jsonl(tmp_path / "b.jsonl.zst", ["sea " * 400, "", *make_texts(8, 40, longest=8)])
    return make_setting(
        tokenizer, first, second, lanes=4, sequence_length=17, epochs=3, split_units=2, validation_fraction=0.2,
        packing="best_fit",
    )  # fmt: skip


def lane_documents(setting: Setting, epoch: int) -> list[list[list[int]]]:
    """The tokens of the documents of each lane, each with its separator."""
    tokenizer = Tokenizer.from_file(setting.tokenizer.path)
    tokenizer.encode_special_tokens = True
    assert tokenizer.token_to_id(setting.tokenizer.eos_token) == EOS_ID
    return [
        [[*tokenizer.encode(text, add_special_tokens=False).ids, EOS_ID] for text in texts if text]
        for texts in epoch_texts(setting, epoch)
    ]


def lane_rows(documents: list[list[int]], length: int, eos: int) -> Iterator[tuple[list[int], int]]:
    """(tokens, valid targets) of the sequences of one epoch of a lane, from the definition of a window."""
    while documents:
        end = 0
        while end < len(documents) and sum(map(len, documents[:end])) < WINDOW_SEQUENCES * length:
            end += 1
        whole = sum(map(len, documents[:end])) < WINDOW_SEQUENCES * length
        count, sequences = pack_window([len(document) for document in documents[:end]], length, whole=whole)
        for pieces in sequences:
            first = pieces[0]
            line = [documents[first.document][first.begin - 1] if first.begin else eos]
            for piece in pieces:
                line += documents[piece.document][piece.begin : piece.end]
            yield line + [eos] * (length + 1 - len(line)), len(line) - 1
        documents = documents[count:]


def expected_rows(setting: Setting) -> list[tuple[list[int], int]]:
    """The whole stream: lanes take turns until the epoch of each ends."""
    found = []
    for epoch in range(setting.epochs or 1):
        lanes = [lane_rows(documents, setting.sequence_length, EOS_ID) for documents in lane_documents(setting, epoch)]
        while lanes:
            lane = lanes.pop(0)
            if (row := next(lane, None)) is not None:
                found.append(row)
                lanes.append(lane)
    return found


def saved(state: StreamState) -> StreamState:
    """As a checkpoint gives it back."""
    copy: StreamState = json.loads(json.dumps(state))
    return copy


def test_every_token_is_a_target_once_an_epoch(setting: Setting) -> None:
    stream = setting.open()
    found = rows(drain(stream, 5))
    assert found == expected_rows(setting)
    documents = [document for epoch in range(3) for lane in lane_documents(setting, epoch) for document in lane]
    assert Counter(token for tokens, length in found for token in tokens[1 : 1 + length]) == Counter(chain(*documents))
    assert all(set(tokens[1 + length :]) <= {EOS_ID} for tokens, length in found)
    [progress] = stream.progress().values()
    assert progress.tokens == sum(map(len, documents)) == sum(length for _, length in found)
    assert progress.documents == len(documents)
    assert progress.sequences == len(found)
    texts = [text for epoch in range(3) for lane in epoch_texts(setting, epoch) for text in lane]
    assert progress.text_bytes == stream.text_bytes == sum(len(text.encode()) for text in texts)


def test_resume_after_every_sequence(setting: Setting) -> None:
    """Within a window, at its end, within a document of several windows, at the end of an epoch."""
    expected = expected_rows(setting)
    stream = setting.open()
    for done in range(len(expected) + 1):
        state = saved(stream.state())
        if done % 5 == 0 or done > len(expected) - 5:
            resumed = setting.open(state=state)
            assert resumed.state() == state
            assert rows(drain(resumed, 5)) == expected[done:]
        drain(stream, 1, limit=1)
    assert drain(setting.open(state=saved(stream.state())), 1) == []


@pytest.mark.parametrize("seed", range(5))
def test_resume_again_and_again_with_other_ranks_and_workers(
    setting: Setting, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain.data.stream, "WorkerReader", InlineReader)
    rng = random.Random(seed)
    found: list[tuple[list[int], int]] = []
    state: StreamState | None = None
    for limit in (1, 3, 2, None):
        leg = partial(_leg, setting, state, rng.randint(0, 3), rng.randint(1, 40), limit)
        shares, states = zip(*on_ranks(rng.randint(1, 3), leg), strict=True)
        assert all(one == states[0] for one in states)
        found += rows(whole(shares))
        state = states[0]
    assert found == expected_rows(setting)


def _leg(
    setting: Setting, state: StreamState | None, workers: int, batch: int, limit: int | None, group: Any
) -> tuple[list[BatchShare], StreamState]:
    stream = setting.open(workers, group, state)
    return drain(stream, batch, limit), saved(stream.state())


def test_a_real_worker_reads_the_same(setting: Setting) -> None:
    stream = setting.open(workers=1)
    try:
        assert rows(drain(stream, 9, limit=4)) == expected_rows(setting)[:36]
    finally:
        stream.close()


def test_a_mixture_of_sources_resumes(setting: Setting) -> None:
    mixed = setting.changed(mixture={"a": 0.3, "b": 0.7})
    expected = rows(drain(mixed.open(), 4))
    documents = [document for epoch in range(3) for lane in lane_documents(setting, epoch) for document in lane]
    assert sum(length for _, length in expected) == sum(map(len, documents))
    for done in range(0, len(expected), 7):
        stream = mixed.open()
        drain(stream, 1, limit=done)
        assert rows(drain(mixed.open(state=saved(stream.state())), 6)) == expected[done:]


def test_prepared_data_is_packed_alike(setting: Setting, tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    """Its lanes hand over runs of many documents; cuts, positions and counts are those of single documents."""
    path = write_jsonl(tmp_path / "c.jsonl", ["sea " * 400, *(text for text in make_texts(9, 90, longest=12) if text)])
    text = make_setting(tokenizer, path, lanes=1, sequence_length=17, packing="best_fit", validation_fraction=0.3)
    [done] = prepare(text.config, text.tokenizer, tmp_path / "to", workers=1, options=PrepareOptions())
    prepared = text.changed(sources=[{"path": str(done.folder)}])
    streams = [text.open(), prepared.open()]
    expected = rows(drain(streams[0], 3))
    assert rows(drain(streams[1], 3)) == expected == expected_rows(text)
    assert [*streams[0].progress().values()] == [*streams[1].progress().values()]
    stream = prepared.open()
    for done in range(0, len(expected), 5):
        assert rows(drain(prepared.open(state=saved(stream.state())), 4)) == expected[done:]
        drain(stream, 5, limit=1)


def test_bad_rows_are_counted_once_in_spite_of_resumes(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    """Those before the first document of a window too, which may not be in its first sequence."""
    texts = [text or "sea" for text in make_texts(3, 120, longest=10)]
    path = tmp_path / "bad.jsonl"
    lines = [json.dumps({"text": text}) for text in texts]
    path.write_text(
        "".join(f"{line}\n" + ("{broken\n" if number % 6 == 0 else "") for number, line in enumerate(lines))
    )
    setting = make_setting(tokenizer, path, lanes=1, sequence_length=17, epochs=2, packing="best_fit", max_bad_rows=100)
    stream = setting.open()
    counts, states = [], [saved(stream.state())]
    while drain(stream, 1, limit=1):
        states.append(saved(stream.state()))
    [progress] = stream.progress().values()
    assert progress.bad_rows == 20
    for state in states[::4]:
        resumed = setting.open(state=state)
        drain(resumed, 3)
        counts += [source.bad_rows for source in resumed.progress().values()]
    assert set(counts) == {20}


def test_data_that_lacks_what_was_taken_is_refused(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    path = write_jsonl(tmp_path / "d.jsonl", make_texts(4, 80, longest=12))
    setting = make_setting(tokenizer, path, lanes=1, sequence_length=17, packing="best_fit")
    stream = setting.open()
    drain(stream, 9, limit=1)
    state = saved(stream.state())
    assert state["sources"][0]["lanes"][0]["token"] == 9
    write_jsonl(path, ["sea"])
    with pytest.raises(DataError, match=r"d\.jsonl|d: lane 0 cannot continue"):
        drain(setting.open(state=state), 1)


def test_the_validation_split_is_packed_as_ever(setting: Setting) -> None:
    """Its losses are compared between runs."""
    best, joined = (
        Setting(setting.changed(packing=packing).config, setting.tokenizer, 17, 1, "validation")
        for packing in ("best_fit", "concatenate")
    )
    assert rows(drain(best.open(), 3)) == rows(drain(joined.open(), 3))


def test_the_default_is_left_out_of_a_stored_config(setting: Setting) -> None:
    """So that the identity of earlier runs stays; the other value is part of it."""
    assert "packing" not in setting.changed(packing="concatenate").config.model_dump()
    assert setting.config.model_dump()["packing"] == "best_fit"
    with pytest.raises(ValueError, match="packing"):
        DataConfig(sources=[{"path": "x"}], packing="worst_fit")
