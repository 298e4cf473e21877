"""Prepared data gives the same streams as the text it was made from, and nothing incomplete or damaged is read."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pretrain.config import ConfigError, parse_config
from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data import DataError, TokenStream, load_tokenizer, make_catalog, survey, validation_text
from pretrain.data.prepared import assembly, plan
from pretrain.data.prepared.layout import load_index, map_array, map_table
from pretrain.data.prepared.plan import PrepareOptions
from pretrain.data.prepared.prepare import Prepared, prepare
from pretrain.data.split import text_hash
from pretrain.run.inputs import check_inputs
from tests.conftest import TINY, merged
from tests.data.corpus import (
    Setting,
    drain,
    make_setting,
    make_texts,
    on_ranks,
    ranks_of,
    rows,
    write_jsonl,
    write_parquet,
)

pytestmark = pytest.mark.usefixtures("warm")

SHARES = {"a": 2, "b": 1, "c": 1.5}
"""Of the tokens: by default, the shares follow from the sizes of the files, which are others for tokens."""


def sources(folder: Path, seed: int = 0) -> list[Path]:
    """Three files of every kind, 11 read units; some rows are empty."""
    return [
        write_parquet(folder / "a.parquet", make_texts(seed, 60), 8),
        write_jsonl(folder / "b.jsonl.gz", make_texts(seed + 1, 30)),
        write_jsonl(folder / "c.jsonl.zst", make_texts(seed + 2, 25)),
    ]


def prepared(setting: Setting, folder: Path, **options: Any) -> tuple[Setting, list[Prepared]]:
    """Prepare the sources of a setting; return the setting that reads the result."""
    workers = options.pop("workers", 1)
    done = prepare(setting.config, setting.tokenizer, folder, workers=workers, options=PrepareOptions(**options))
    return setting.changed(sources=[{"path": str(one.folder)} for one in done]), done


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("shard_tokens", [1500, 100_000])
def test_prepared_units_give_the_same_stream_as_the_text(
    tmp_path: Path, tokenizer: TokenizerConfig, split: str, shard_tokens: int
) -> None:
    """If no read unit was divided, everything is equal, batch for batch: any lanes, seed, fraction and epochs."""
    epochs = 1 if split == "validation" else 3
    text = make_setting(
        tokenizer,
        *sources(tmp_path),
        mixture=SHARES,
        lanes=3,
        validation_fraction=0.3,
        seed=4,
        epochs=epochs,
        split=split,
    )
    ready, done = prepared(text, tmp_path / "to", shard_tokens=shard_tokens)
    assert sum(len(one.index.shards) for one in done) == (3 if shard_tokens > 1500 else 4)
    assert [len(shard.units) for one in done for shard in one.index.shards][-2:] == [1, 1]
    streams = [text.open(), ready.open()]
    batches = 0
    while first := drain(streams[0], 5, 1):
        [second] = drain(streams[1], 5, 1)
        assert first[0].sha256() == second.sha256()
        # Documents, and bytes of the text so far.
        assert [*streams[0].progress().values()] == [*streams[1].progress().values()]
        batches += 1
    assert batches > 3
    assert streams[0].text_bytes == streams[1].text_bytes > 0


def test_divided_units_give_the_same_tokens_to_a_single_lane_of_a_single_file(
    tmp_path: Path, tokenizer: TokenizerConfig
) -> None:
    texts = make_texts(3, 200)
    text = make_setting(tokenizer, write_jsonl(tmp_path / "a.jsonl", texts), lanes=1, epochs=1)
    _, done = prepared(text, tmp_path / "to", shard_tokens=500)
    shards = done[0].index.shards
    assert len(shards) > 5
    found = [map_array(tmp_path / "to" / f"{shard.name}.tokens", "uint16", shard.tokens).tolist() for shard in shards]
    expected = [token for tokens, length in rows(drain(text.open(), 1)) for token in tokens[1 : 1 + length]]
    assert [token for tokens in found for token in tokens] == expected


def test_resumed_anywhere_the_stream_continues_with_the_same_tokens(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    text = make_setting(tokenizer, *sources(tmp_path), mixture=SHARES, lanes=2, validation_fraction=0.2, epochs=2)
    setting, _ = prepared(text, tmp_path / "to", shard_tokens=900)
    whole = setting.open()
    batches = drain(whole, 3)
    for stop in range(1, len(batches), 5):
        first = setting.open()
        drain(first, 3, stop)
        state = json.loads(json.dumps(first.state()))
        rest = setting.open(state=state)
        assert [b.sha256() for b in drain(rest, 3)] == [b.sha256() for b in batches[stop:]]
        assert rest.text_bytes == whole.text_bytes


def test_ranks_and_workers_do_not_change_the_stream(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    text = make_setting(tokenizer, *sources(tmp_path), mixture=SHARES, lanes=3, validation_fraction=0.2, epochs=2)
    setting, _ = prepared(text, tmp_path / "to")
    expected = [batch.sha256() for batch in drain(setting.open(), 4)]

    def read(group: Any) -> list[str]:
        stream = setting.open(workers=1, group=group)
        try:
            return [batch.sha256(ranks_of(group)) for batch in drain(stream, 4)]
        finally:
            stream.close()

    assert on_ranks(2, read) == [expected, expected]


def test_parts_of_units_hold_every_document_once(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    text = make_setting(tokenizer, *sources(tmp_path), mixture=SHARES, lanes=2, validation_fraction=0.2, epochs=1)
    setting, done = prepared(text, tmp_path / "to")
    divided = setting.changed(sources=[{"path": str(one.folder), "split_units": 3} for one in done], lanes=7)
    streams = [setting.open(), divided.open()]
    tokens = [sorted(t for row, n in rows(drain(stream, 4)) for t in row[1 : 1 + n]) for stream in streams]
    assert tokens[0] == tokens[1]
    assert streams[0].text_bytes == streams[1].text_bytes
    stopped = divided.open()
    drain(stopped, 2, 4)
    rest = divided.open(state=stopped.state())
    drain(rest, 2)
    assert rest.text_bytes == streams[0].text_bytes


def test_text_and_prepared_sources_mix(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    paths = sources(tmp_path)
    text = make_setting(tokenizer, *paths, mixture=SHARES, lanes=2, epochs=2)
    half, _ = prepared(text.changed(sources=[{"path": str(paths[0])}], mixture=None), tmp_path / "a")
    mixed = text.changed(sources=[*half.config.model_dump()["sources"], *text.config.model_dump()["sources"][1:]])
    assert [b.sha256() for b in drain(mixed.open(), 3)] == [b.sha256() for b in drain(text.open(), 3)]


def test_the_index_and_its_arrays_describe_the_documents(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    texts = make_texts(5, 90)
    kept = [text for text in texts if text]
    text = make_setting(tokenizer, write_jsonl(tmp_path / "a.jsonl", texts), lanes=1)
    _, [one] = prepared(text, tmp_path / "to", shard_tokens=800)
    index = load_index(str(tmp_path / "to"))
    tables = [map_table(tmp_path / "to" / f"{shard.name}.documents", shard.documents) for shard in index.shards]
    hashes = np.concatenate([table.hashes for table in tables]).tolist()
    assert hashes == [text_hash(one.encode()) for one in kept]
    sizes = np.concatenate([np.diff(table.text_bytes, prepend=np.uint64(0)) for table in tables]).tolist()
    assert sizes == [len(one.encode()) for one in kept]
    assert (index.documents, index.text_bytes) == (len(kept), sum(sizes))
    assert index.characters == sum(map(len, kept))
    assert (index.dtype, index.eos_token, index.duplicates_removed) == ("uint16", "<|endoftext|>", None)
    for shard, table in zip(index.shards, tables, strict=True):
        tokens = map_array(tmp_path / "to" / f"{shard.name}.tokens", "uint16", shard.tokens)
        assert (tokens[table.ends.astype(int) - 1] == index.eos_id).all()
        assert (tokens == index.eos_id).sum() == shard.documents
    assert one.index == index


def test_a_run_over_prepared_sources_knows_how_much_they_hold(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    """So that `max_epochs` holds for them, and a mixture of them is not taken for one of nothing."""
    paths = [write_jsonl(tmp_path / "a.jsonl", make_texts(5, 90)), write_jsonl(tmp_path / "b.jsonl", make_texts(6, 40))]
    text = make_setting(tokenizer, *paths, mixture={"a": 1, "b": 1}, lanes=1)
    _, done = prepared(text, tmp_path / "to")
    small = {
        "tokenizer": tokenizer.model_dump(),
        "schedule.warmup_tokens": 0,
        "data.sources": [{"path": str(one.folder)} for one in done],
        "data.lanes": 1,
        "data.mixture": {"a": 1, "b": 1},
        "data.validation_fraction": 0.1,
        "run.root": str(tmp_path / "runs"),
    }
    loaded = load_tokenizer(tokenizer)
    inputs = check_inputs(parse_config(merged(TINY, {**small, "train.total_tokens": 3 * 768})), loaded)
    expected = [one.index.tokens * 0.9 for one in done]
    assert [budget.available.value for budget in inputs.budgets] == pytest.approx(expected)
    assert [budget.available.error for budget in inputs.budgets] == [0, 0]
    with pytest.raises(ConfigError, match=r"data\.sources\.1\.max_epochs: b holds"):
        check_inputs(parse_config(merged(TINY, {**small, "train.total_tokens": 20 * 768})), loaded)


@pytest.mark.parametrize("workers", [1, 2])
def test_duplicates_are_removed_and_counted(
    tmp_path: Path, tokenizer: TokenizerConfig, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_PART_BYTES", 1)
    monkeypatch.setattr("pretrain.data.prepared.duplicates.BUCKET_DOCUMENTS", 7)
    texts = [f"{text} {number}" for number, text in enumerate(make_texts(5, 40))]
    rng = random.Random(1)
    second = [*texts[:13], "of its own", "of its own", *texts[7:9]]
    rng.shuffle(second)
    paths = [write_parquet(tmp_path / "a.parquet", [*texts, texts[0]], 9), write_jsonl(tmp_path / "b.jsonl", second)]
    text = make_setting(tokenizer, *paths, mixture={"a": 1, "b": 1}, lanes=1, epochs=1)
    setting, done = prepared(text, tmp_path / "to", remove_duplicates=True, workers=workers)
    assert [one.index.duplicates_removed for one in done] == [1, 16]
    assert [one.index.documents for one in done] == [40, 1]
    clean = [write_parquet(tmp_path / "c.parquet", texts, 9), write_jsonl(tmp_path / "d.jsonl", ["of its own"])]
    expected = make_setting(tokenizer, *clean, mixture={"c": 1, "d": 1}, lanes=1, epochs=1)
    assert [b.tokens.tolist() for b in drain(setting.open(), 4)] == [
        b.tokens.tolist() for b in drain(expected.open(), 4)
    ]


def test_workers_do_not_change_the_bytes(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "_PART_BYTES", 1)
    text = make_setting(tokenizer, *sources(tmp_path))
    found = []
    for workers in (1, 2):
        prepared(text, tmp_path / str(workers), workers=workers, shard_tokens=500)
        found.append(contents(tmp_path / str(workers)))
    assert found[0] == found[1]
    assert not [name for name in found[0] if "parts" in name or name.endswith(".tmp")]
    # The size of the parts is a matter of the work, and not of the result.
    monkeypatch.undo()
    prepared(text, tmp_path / "joined", shard_tokens=500)
    assert contents(tmp_path / "joined") == found[0]


def test_a_large_vocabulary_takes_uint32(tmp_path: Path) -> None:
    from tests.data.test_tokenizer import saved, words

    tokenizer = words({"<unk>": 0, "the": 1, "sea": 70_000})
    tokenizer.add_special_tokens(["<|endoftext|>"])
    config = saved(tokenizer, tmp_path)
    text = make_setting(config, write_jsonl(tmp_path / "a.jsonl", ["the sea", "sea the sea"]), lanes=1, epochs=1)
    setting, [one] = prepared(text, tmp_path / "to")
    assert one.index.dtype == "uint32"
    assert rows(drain(setting.open(), 1)) == rows(drain(text.open(), 1))


def make_broken(tmp_path: Path, tokenizer: TokenizerConfig) -> tuple[Setting, Path]:
    text = make_setting(tokenizer, sources(tmp_path)[0], lanes=2, epochs=1)
    setting, _ = prepared(text, tmp_path / "to")
    return setting, tmp_path / "to"


def test_what_is_not_complete_or_damaged_is_refused(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    setting, folder = make_broken(tmp_path, tokenizer)
    intact = contents(folder)
    tokens, documents = intact["shard-00000.tokens"], intact["shard-00000.documents"]
    flipped = bytes([tokens[0] ^ 1, *tokens[1:]])
    cases: list[tuple[str, bytes | None, str]] = [
        ("index.json", None, "was not prepared completely"),
        ("index.json", intact["index.json"][:-20], "cannot be read as the index"),
        ("index.json", intact["index.json"].replace(b'"version": 1', b'"version": 9'), "has version 9"),
        ("shard-00000.tokens", tokens[:-2], r"shard-00000\.tokens: has \d+ bytes, expected \d+"),
        ("shard-00000.tokens", None, r"shard-00000\.tokens: cannot be read"),
        ("shard-00000.documents", documents[8:], r"shard-00000\.documents: has \d+ bytes"),
        ("shard-00000.tokens", flipped, r"shard-00000\.tokens: has the sha256"),
        ("shard-00000.documents", documents[:-1] + b"\0", r"shard-00000\.documents: has the sha256"),
    ]
    for name, data, message in cases:
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)
        [problem] = survey(setting.config)[1]
        with pytest.raises(DataError, match=message):
            raise DataError(problem)
        (folder / name).write_bytes(intact[name])
    assert survey(setting.config)[1] == []


def test_a_shard_that_changes_under_a_run_is_noticed(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    setting, folder = make_broken(tmp_path, tokenizer)
    catalog = make_catalog(setting.config)
    tokens = folder / "shard-00000.tokens"
    tokens.write_bytes(tokens.read_bytes() + b"\0\0")
    with pytest.raises(DataError, match=r"the file has changed"):
        drain(setting.open(catalog=catalog), 3)


def test_another_tokenizer_is_refused(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    setting, _ = make_broken(tmp_path, tokenizer)
    other = tmp_path / "tokenizer.json"
    other.write_text(Path(tokenizer.path).read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"to: was prepared with another tokenizer .* prepare the data again"):
        TokenStream(setting.config, TokenizerConfig(path=str(other)), 7)


def test_keys_that_concern_text_are_refused(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    setting, folder = make_broken(tmp_path, tokenizer)
    config = DataConfig(sources=[{"path": str(folder), "text_field": "body"}], lanes=2)
    assert survey(config)[1] == [f"{folder}: holds tokens, not text: text_field has no effect, remove it"]
    with pytest.raises(DataError, match="holds tokens, not text"):
        validation_text(setting.config)
    with pytest.raises(DataError, match="holds tokens already"):
        prepare(setting.config, tokenizer, tmp_path / "again")


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    text = make_setting(tokenizer, sources(tmp_path)[0])
    with pytest.raises(DataError, match="is not empty"):
        prepare(text.config, tokenizer, tmp_path)
    prepared(text, tmp_path / "to")
    before = contents(tmp_path / "to")
    prepared(text, tmp_path / "to")  # complete: nothing to do
    with pytest.raises(DataError, match=r"was begun with other settings or data \(options in plan\.json differ\)"):
        prepared(text, tmp_path / "to", shard_tokens=5)
    assert contents(tmp_path / "to") == before


def test_a_unit_is_divided_when_it_is_too_large(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assembly, "MOST_UNIT_TOKENS", 300)
    text = make_setting(tokenizer, write_jsonl(tmp_path / "a.jsonl", make_texts(3, 200)), lanes=1, epochs=1)
    setting, [one] = prepared(text, tmp_path / "to")
    [shard] = one.index.shards
    assert len(shard.units) > 5
    assert sum(shard.units) == shard.documents
    assert len(setting.changed(lanes=4).open().next_batch(4).lengths) == 4
