"""Shares of the tokens: within one sequence at every step, whatever happens to the sources."""

import json
import random
from collections import Counter
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pretrain.data.stream
from pretrain.config.data import DataConfig, SourceConfig, TokenizerConfig
from pretrain.data import DataError, StreamState, load_tokenizer
from pretrain.data.mixture import MixtureState, Schedule, Stage, exact
from pretrain.data.workers import InlineReader
from pretrain.training.epochs import EpochNotices
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
from tests.data.oracle import choose, oracle_dealt, oracle_rows

pytestmark = pytest.mark.usefixtures("warm")

SHARES = st.lists(st.one_of(st.floats(1e-6, 1e6), st.sampled_from([0.1, 0.3, 0.6, 1.0, 1e-3])), min_size=1, max_size=12)


def deal(schedule: Schedule, sequences: int) -> list[int]:
    """The sources of the next sequences."""
    found = []
    for _ in range(sequences):
        source = schedule.next()
        assert source is not None
        schedule.take(source)
        found.append(source)
    return found


def worst(dealt: list[int], shares: dict[int, Fraction]) -> Fraction:
    """The largest distance of any source from its share after any of the sequences."""
    total, given, largest = sum(shares.values()), dict.fromkeys(shares, 0), Fraction(0)
    for step, source in enumerate(dealt, 1):
        given[source] += 1
        largest = max(largest, *(abs(share * step / total - given[index]) for index, share in shares.items()))
    return largest


@settings(max_examples=60, deadline=None)
@given(written=SHARES)
def test_every_source_stays_strictly_within_one_sequence_of_its_share(written: list[float]) -> None:
    shares = tuple(exact(share) for share in written)
    dealt = deal(Schedule([Stage(shares, None)], 8), 300)
    bound = 1 - Fraction(1, 2 * len(shares) - 2) if len(shares) > 1 else 0
    assert worst(dealt, dict(enumerate(shares))) <= bound
    given, expected = dict.fromkeys(range(len(shares)), 0), []
    for _ in range(100):
        expected.append(choose(given, dict(enumerate(shares))))
        given[expected[-1]] += 1
    assert dealt[:100] == expected


def test_the_source_furthest_behind_is_not_enough() -> None:
    """The shares for which the obvious rule leaves a source more than a sequence behind."""
    rng = random.Random(0)
    found = []
    for _ in range(300):
        shares = dict(enumerate(Fraction(rng.choice([1, 1, 1, 30]) * rng.randint(1, 20)) for _ in range(8)))
        total, given, dealt = sum(shares.values()), dict.fromkeys(shares, 0), []
        for step in range(1, 60):
            source = max(shares, key=lambda index: shares[index] * step / total - given[index])
            given[source] += 1
            dealt.append(source)
        if worst(dealt, shares) >= 1:
            found.append(shares)
    assert found
    for shares in found:
        assert worst(deal(Schedule([Stage(tuple(shares.values()), None)], 8), 500), shares) < 1


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_shares_hold_over_five_million_tokens(seed: int) -> None:
    """At 256 tokens a sequence, through a border of stages, the end of a source and a resume."""
    rng = random.Random(seed)
    number = rng.randint(3, 12)
    stages = [
        Stage(tuple(exact(round(rng.random() ** 4 + 1e-3, 6)) for _ in range(number)), until)
        for until in (1_999_999, None)
    ]
    schedule, dealt, border, total = Schedule(stages, 256), [], 0, 5_000_000 // 256
    ended: set[int] = set()
    for sequence in range(total):
        if sequence in (-(-1_999_999 // 256), total // 4, total * 3 // 4):
            live = {i: s for i, s in enumerate(stages[sequence > -(-1_999_999 // 256)].shares) if i not in ended}
            live = live if sequence > border else {}
            assert worst(dealt[border:], live) < 1
            border = sequence
            if sequence != -(-1_999_999 // 256):
                ended.add(len(ended))
                schedule.end(len(ended) - 1)
        if sequence % 1000 == 0:
            state: MixtureState = json.loads(json.dumps(schedule.state()))
            schedule = Schedule(stages, 256, sequence=sequence, ended=ended, state=state)
        dealt += deal(schedule, 1)
    live = {i: s for i, s in enumerate(stages[1].shares) if i not in ended}
    assert worst(dealt[border:], live) < 1
    assert len(ended) == 2


def test_a_stage_begins_at_exactly_its_sequence() -> None:
    stages = [
        Stage((Fraction(1), Fraction(0)), 31),
        Stage((Fraction(0), Fraction(1)), 32),
        Stage((Fraction(1),) * 2, None),
    ]
    assert deal(Schedule(stages, 10), 8) == [0, 0, 0, 0, 0, 1, 0, 1]  # 31 tokens are four sequences, and so are 32
    assert deal(Schedule(stages, 1), 36)[30:34] == [0, 1, 0, 1]


def test_demand_does_not_advance_the_schedule() -> None:
    schedule = Schedule([Stage((Fraction(1), Fraction(2), Fraction(4)), None)], 8)
    deal(schedule, 3)
    before = schedule.state()
    demand = schedule.demand(40)
    assert schedule.state() == before
    assert demand == Counter(deal(schedule, 40))


# --- the stream


@pytest.fixture
def setting(tmp_path: Path, tokenizer: TokenizerConfig) -> Setting:
    """Three sources of unequal size and unit counts; the small one ends long before the others."""
    paths = [
        write_parquet(tmp_path / "web.parquet", make_texts(31, 90), 4),
        write_jsonl(tmp_path / "code.jsonl", make_texts(32, 40)),
        write_parquet(tmp_path / "books.parquet", make_texts(33, 12, longest=90), 5),
    ]
    return make_setting(tokenizer, *paths, lanes=5, sequence_length=13, epochs=2)


SHARES = {"web": 0.5, "code": 0.3, "books": 0.2}
MIXTURES: list[dict[str, Any]] = [
    {},
    {"mixture": {"web": 0.2, "code": 0.5, "books": 0.3}},
    {"mixture": {"web": 1, "code": 1e-6, "books": 1e-6}},
    {
        "stages": [
            {"mixture": {"web": 1}, "until_tokens": 401},
            {"mixture": {"web": 1, "code": 3, "books": 0}, "until_tokens": 1200},
            {"mixture": {"books": 0.9, "web": 0.1, "code": 0.05}},
        ]
    },
]


@pytest.mark.parametrize("mixture", MIXTURES)
def test_batches_are_those_of_the_definition(setting: Setting, mixture: dict[str, Any]) -> None:
    setting = setting.changed(**mixture)
    expected = oracle_rows(setting)
    assert rows(drain(setting.open(), 7)) == expected
    assert rows(whole(on_ranks(3, lambda group: drain(setting.open(group=group), 11)))) == expected


@pytest.mark.parametrize(
    "mixture", [*(pytest.param(one, marks=pytest.mark.long) for one in MIXTURES[:2]), *MIXTURES[2:]]
)
def test_a_stream_resumes_after_every_few_sequences(setting: Setting, mixture: dict[str, Any]) -> None:
    """At stage borders, and where sources end."""
    setting = setting.changed(**mixture)
    expected = oracle_rows(setting)
    stream, done = setting.open(), 0
    while done < len(expected):
        state: StreamState = json.loads(json.dumps(stream.state()))
        assert state["sequences_emitted"] == done
        resumed = setting.open(state=state)
        assert resumed.state() == state
        assert rows(drain(resumed, 3, limit=9)) == expected[done : done + 27]
        drain(stream, 5, limit=1)
        done += 5
    assert drain(stream, 5) == []


def test_progress_counts_each_source(setting: Setting) -> None:
    texts = {"web": make_texts(31, 90), "code": make_texts(32, 40), "books": make_texts(33, 12, longest=90)}
    setting = setting.changed(mixture=SHARES)
    stream = setting.open()
    dealt = Counter(source for source, _ in oracle_dealt(setting))
    drain(stream, 9)
    encode = load_tokenizer(setting.tokenizer).encode
    for index, (name, progress) in enumerate(stream.progress().items()):
        documents = [text for text in texts[name] if text]
        assert progress.epochs in (1, 2)  # the end of an epoch is noticed when the source is due again
        assert progress.sequences == dealt[index]
        assert progress.documents == 2 * len(documents)
        assert progress.text_bytes == 2 * sum(len(text.encode()) for text in documents)
        assert progress.tokens == 2 * sum(len(encode(text).ids) + 1 for text in documents)


def test_a_source_ends_after_its_max_epochs_and_its_share_goes_to_the_others(setting: Setting) -> None:
    first, second, third = setting.config.sources
    limited = [first.model_copy(update={"max_epochs": None}), second.model_copy(update={"max_epochs": 2}), third]
    setting = Setting(
        DataConfig(
            **setting.config.model_dump(exclude={"sources"}),
            sources=limited,
            mixture={"web": 0.2, "code": 0.7, "books": 0.1},
            past_max_epochs="end_source",
        ),
        setting.tokenizer,
        setting.sequence_length,
        epochs=None,
    )
    dealt = oracle_dealt(setting)
    expected = [next(dealt) for _ in range(900)]
    end = max(index for index, (source, _) in enumerate(expected) if source == 1) + 1
    assert 0 < end < 600
    stream = setting.open()
    found = rows(drain(stream, 9, limit=100))
    assert found == [row for _, row in expected]
    assert worst([source for source, _ in expected[:end]], {0: Fraction(2), 1: Fraction(7), 2: Fraction(1)}) < 1
    rest = {0: Fraction(2), 2: Fraction(1)}  # counted from where its next turn would have come
    assert min(worst([source for source, _ in expected[border:]][:200], rest) for border in range(end, end + 3)) < 1
    assert stream.progress()["code"].epochs == 2


def test_a_stream_whose_sources_have_all_ended_says_so_on_every_rank(setting: Setting) -> None:
    endless = Setting(setting.config, setting.tokenizer, setting.sequence_length, epochs=None)
    limited = [source.model_copy(update={"max_epochs": 1}) for source in setting.config.sources]
    endless = endless.changed(sources=limited, past_max_epochs="end_source", mixture=SHARES)

    def read(group: Any) -> tuple[int, str]:
        stream = endless.open(group=group)
        with pytest.raises(DataError) as error:
            drain(stream, 6)
        return stream.state()["sequences_emitted"], str(error.value)

    found = on_ranks(2, read)
    assert found[0] == found[1]
    assert found[0][0] == len(oracle_rows(endless)) // 6 * 6
    assert "every source has ended by its max_epochs (web after 1, code after 1, books after 1 epochs)" in found[0][1]


def test_a_source_without_text_of_the_split_is_named(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    paths = [write_jsonl(tmp_path / "a.jsonl", make_texts(1, 20)), write_jsonl(tmp_path / "b.jsonl", ["", ""])]
    with pytest.raises(DataError, match="no document of b belongs to the train split"):
        drain(make_setting(tokenizer, *paths, epochs=None, mixture={"a": 1, "b": 1}).open(), 8, limit=100)


def test_a_mixture_is_even_from_the_beginning_to_the_end(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    """64 row groups beside one file of JSON lines on 8 lanes: the file came almost alone, near the end of an epoch."""
    many = write_parquet(tmp_path / "many.parquet", ["the sea and the whale " * 20] * 256, 4)
    one = write_jsonl(tmp_path / "one.jsonl", ["naïve 鯨 harpoon " * 20] * 64)
    setting = make_setting(tokenizer, many, one, lanes=8, sequence_length=16, epochs=None)
    setting = setting.changed(mixture={"many": 0.8, "one": 0.2})
    stream = setting.open()
    for batch in range(1, 90):
        stream.next_batch(25)
        counts = {name: source.sequences for name, source in stream.progress().items()}
        assert abs(counts["one"] - 5 * batch) < 1
    assert stream.progress()["one"].epochs >= 1


def test_without_a_mixture_all_sources_are_read_as_one(setting: Setting) -> None:
    stream = setting.open()
    found = rows(drain(stream, 9))
    assert len(found) > 100
    assert found == oracle_rows(setting)
    [(name, progress)] = stream.progress().items()
    texts = [*make_texts(31, 90), *make_texts(32, 40), *make_texts(33, 12, longest=90)]
    assert (name, progress.documents) == ("web, code, books", 2 * sum(text != "" for text in texts))


def test_the_beginning_of_an_epoch_and_the_end_of_a_source_are_said(setting: Setting) -> None:
    sources = [source.model_copy(update={"max_epochs": 2}) for source in setting.config.sources]
    stages = [{"mixture": {"web": 1, "code": 9}, "until_tokens": 13 * 400}, {"mixture": {"web": 1, "books": 1}}]
    endless = Setting(setting.config, setting.tokenizer, setting.sequence_length, epochs=None)
    endless = endless.changed(sources=sources, stages=stages, past_max_epochs="end_source")
    stream = endless.open()
    notices = EpochNotices(stream.position)
    found = []
    for step in range(1, 101):
        stream.next_batch(6)
        found += notices.lines(step, stream.position)
    dealt = [source for source, _ in islice(oracle_dealt(endless), 600)]
    last = max(index for index, source in enumerate(dealt) if source == 1)
    assert [line for line in found if "source code" in line] == [
        f"source code: epoch 2 begins at step {(last + 1) // 2 // 6 + 1}",
        f"source code: has ended after 2 epochs (max_epochs), at step {(last + 1) // 6 + 1}",
    ]
    assert "stage 2 of the mixture has been reached at step 67" in found


def version_1(state: StreamState) -> Any:
    [source] = state["sources"]
    kept = {key: source[key] for key in ("epoch", "next_lane", "left", "lanes")}  # type: ignore[literal-required]
    return {"version": 1, **kept, "sequences_emitted": state["sequences_emitted"], "text_bytes": state["text_bytes"]}


def test_a_state_of_version_1_resumes_one_source(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    setting = make_setting(tokenizer, write_parquet(tmp_path / "a.parquet", make_texts(3, 40), 4), lanes=3)
    expected = oracle_rows(setting)
    stream = setting.open()
    for done in range(0, len(expected), 6):
        resumed = setting.open(state=version_1(stream.state()))
        assert rows(drain(resumed, 4)) == expected[done:]
        drain(stream, 6, limit=1)


def test_a_state_of_version_1_resumes_several_sources_without_a_mixture(setting: Setting) -> None:
    expected = oracle_rows(setting)
    stream = setting.open()
    drain(stream, 6, limit=20)
    old = version_1(stream.state())
    assert rows(drain(setting.open(state=old), 7)) == expected[120:]
    with pytest.raises(DataError, match=r"remove data\.mixture and data\.stages"):
        setting.changed(mixture=SHARES).open(state=old)


# --- "Done when" 1


def many_documents(folder: Path, tokenizer: TokenizerConfig, documents: int, epochs: int) -> tuple[Setting, list[str]]:
    """Documents that all differ, in 37 files of three sources: most in few files, some files with a single one."""
    rng = random.Random(1)
    sizes = [1 + int(1000 * rng.random() ** 4) for _ in range(37)]
    texts = [
        f"{number} " + " ".join(rng.choices(["sea", "naïve", "鯨", "\n"], k=rng.randint(0, 12)))
        for number in range(documents)
    ]
    edges = [documents * sum(sizes[:number]) // sum(sizes) for number in range(38)]
    sources = ("web", "code", "books")
    for number in range(37):
        part, source = texts[edges[number] : edges[number + 1]], folder / sources[number % 3]
        source.mkdir(exist_ok=True)
        if number % 2:
            write_parquet(source / f"{number:02}.parquet", part, 1 + number * 3)
        else:
            write_jsonl(source / f"{number:02}.jsonl{['', '.gz', '.zst'][number % 3]}", part)
    setting = make_setting(
        tokenizer, *(folder / source for source in sources), lanes=12, sequence_length=32, epochs=epochs
    )
    return setting.changed(mixture={"web": 0.5, "code": 0.3, "books": 0.2}), texts


def leg(
    setting: Setting, state: StreamState | None, workers: int, limit: int | None, group: Any
) -> tuple[Any, StreamState]:
    stream = setting.open(workers, group, state)
    found = drain(stream, 60, limit), json.loads(json.dumps(stream.state()))
    stream.close()
    return found


def texts_in(found: list[tuple[list[int], int]], tokenizer: TokenizerConfig) -> Counter[str]:
    """The numbers that the documents begin with; a lane's documents are complete over its sequences."""
    plain = load_tokenizer(tokenizer)
    return Counter(plain.decode([token for tokens, length in found for token in tokens[1 : 1 + length]]))


def check_exactly_once(setting: Setting, texts: list[str], grid: list[tuple[int, int]]) -> None:
    expected = oracle_rows(setting)
    plain = load_tokenizer(setting.tokenizer)
    tokens = Counter(token for text in texts for token in [*plain.encode(text).ids, plain.token_to_id("<|endoftext|>")])
    found = Counter(token for row, length in expected for token in row[1 : 1 + length])
    assert found == Counter({token: setting.epochs * count for token, count in tokens.items()})  # type: ignore[operator]
    for ranks, workers in grid:
        shares, states = zip(*on_ranks(ranks, partial(leg, setting, None, workers, None)), strict=True)
        assert rows(whole(shares)) == expected
        for state in states:
            assert sum(source["documents"] for source in state["sources"]) == setting.epochs * len(texts)  # type: ignore[operator]
    state, rest = None, []
    batches = len(expected) // 60
    for (ranks, workers), limit in zip(grid[-4:], [batches // 4, batches // 3, 1, None], strict=True):
        shares, states = zip(*on_ranks(ranks, partial(leg, setting, state, workers, limit)), strict=True)
        assert all(one == states[0] for one in states)
        rest += rows(whole(shares))
        state = states[0]
    assert rest == expected


def test_every_document_comes_once_an_epoch_on_any_ranks_and_workers(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain.data.stream, "WorkerReader", InlineReader)
    check_exactly_once(*many_documents(tmp_path, tokenizer, 600, 1), [(3, 1), (1, 3), (5, 0), (2, 3)])


@pytest.mark.long
def test_ten_thousand_documents_in_37_files(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    grid = [(ranks, workers) for workers in (0, 1, 3) for ranks in (1, 2, 3, 5)]
    random.Random(0).shuffle(grid)
    check_exactly_once(*many_documents(tmp_path, tokenizer, 10_000, 2), grid)


def test_workers_never_wait_for_one_another_whatever_the_mixture(setting: Setting) -> None:
    """A source that is hardly read, or only in a late stage, must not stop the others; one worker process reads all."""
    stages = [
        {"mixture": {"web": 1}, "until_tokens": 13 * 40},
        {"mixture": {"web": 1e-6, "code": 1, "books": 1e-6}, "until_tokens": 13 * 2000},
        {"mixture": {"books": 1}},
    ]
    setting = Setting(setting.config, setting.tokenizer, setting.sequence_length, epochs=None).changed(stages=stages)
    expected = drain(setting.open(), 40, limit=55)
    stream = setting.open(workers=1)
    assert rows(drain(stream, 40, limit=55)) == rows(expected)
    assert min(source.sequences for source in stream.progress().values()) > 0
    stream.close()


def test_names_are_derived_from_paths_and_unique() -> None:
    paths = {
        "/data/web/**/*.parquet": "web",
        "a/moby.dick.jsonl.ZST": "moby-dick",
        "hf://datasets/HuggingFaceFW/fineweb-edu@87f0914/sample/10BT/*.parquet": "fineweb-edu",
        "https://host/web/part.jsonl.gz": "part",
        "b/web": "web-2",
        "*.parquet": "source",
    }
    config = DataConfig(sources=[SourceConfig(path=path) for path in paths])
    assert config.names == tuple(paths.values())
