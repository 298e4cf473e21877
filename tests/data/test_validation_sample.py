"""The validation set of remote and prepared sources: by shares, spread over all files, bounded in what it reads."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
from tokenizers import Tokenizer

from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data import DataError, DocumentEncoder, TokenStream, load_tokenizer, make_catalog
from pretrain.data import validation_sample as module
from pretrain.data.cache import CachedFile, DiskCache, open_file
from pretrain.data.errors import BadRowsError
from pretrain.data.prepared.prepare import prepare
from pretrain.data.split import is_validation
from pretrain.data.units import DataFile
from pretrain.data.validation_sample import ValidationSample, sample_validation
from tests.data.corpus import EOS, Setting, drain, make_setting, make_texts, rows, write_jsonl, write_parquet
from tests.data.oracle import in_validation


def draw(setting: Setting, shares: list[float], tokens: int = 10**9, max_bytes: int = 1 << 30) -> ValidationSample:
    return sample_validation(
        setting.config,
        make_catalog(setting.config),
        DocumentEncoder.load(setting.tokenizer),
        setting.sequence_length,
        shares=shares,
        max_tokens=tokens,
        max_bytes=max_bytes,
    )


def sequences(sample: ValidationSample) -> list[tuple[list[int], int]]:
    return list(zip(sample.tokens.tolist(), sample.lengths.tolist(), strict=True))


def streamed(setting: Setting, limit: int | None = None) -> tuple[list[tuple[list[int], int]], int]:
    """The sequences of the validation stream, and the bytes of their text."""
    stream = TokenStream(setting.config, setting.tokenizer, setting.sequence_length, split="validation", epochs=1)
    found = rows(drain(stream, 1, limit))
    return found, stream.text_bytes


class Reads:
    """Counts the files that are opened for a sample, and the bytes that are read of them."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened: Counter[str] = Counter()
        self.kinds: set[type] = set()
        self.bytes = 0
        patch.setattr(module, "open_file", self.open)

    @contextmanager
    def open(self, file: DataFile) -> Iterator[BinaryIO]:
        self.opened[Path(file.path).name] += 1
        self.kinds.add(type(file))
        with open_file(file) as opened:
            yield _Counted(opened, self)  # type: ignore[misc]


class _Counted:
    def __init__(self, file: BinaryIO, reads: Reads) -> None:
        self._file, self._reads = file, reads
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._reads.bytes += len(data)
        return data


@pytest.mark.parametrize("split_units", [1, 3])
def test_small_sources_give_what_the_stream_gives(tmp_path: Path, tokenizer: TokenizerConfig, split_units: int) -> None:
    """Bit for bit, in the same order, whatever the format: nothing is left out where everything fits."""
    texts = make_texts(5, 240)
    paths = [
        write_parquet(tmp_path / "a.parquet", texts[:80], 7),
        write_jsonl(tmp_path / "b.jsonl", texts[80:160]),
        write_jsonl(tmp_path / "c.jsonl.zst", texts[160:200]),
        write_jsonl(tmp_path / "d.jsonl.gz", texts[200:]),
    ]
    setting = make_setting(tokenizer, *paths, validation_fraction=0.3, split="validation", split_units=split_units)
    sample = draw(setting, [1, 1, 1, 1])
    expected, text_bytes = streamed(setting)
    assert sequences(sample) == expected
    assert sample.text_bytes == text_bytes == sum(len(t.encode()) for t in texts if in_validation(t, 0.3))
    assert sum(source.documents for source in sample.sources) == sum(bool(t) and in_validation(t, 0.3) for t in texts)


@pytest.mark.parametrize("tokens", [1, 7, 70, 703])
def test_one_source_is_cut_where_the_stream_would_be(tmp_path: Path, tokenizer: TokenizerConfig, tokens: int) -> None:
    path = write_parquet(tmp_path / "a.parquet", make_texts(6, 300), 9)
    setting = make_setting(tokenizer, path, validation_fraction=0.4, split="validation")
    sample = draw(setting, [3.0], tokens)
    assert (sequences(sample), sample.text_bytes) == streamed(setting, max(1, tokens // 7))


def test_prepared_data_gives_the_documents_of_its_split(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    texts = make_texts(8, 300)
    write_jsonl(tmp_path / "a.jsonl", texts)
    prepared_source(tmp_path, tokenizer)
    setting = make_setting(tokenizer, tmp_path / "out", validation_fraction=0.3, split="validation")
    sample = draw(setting, [1])
    assert (sequences(sample), sample.text_bytes) == streamed(setting)
    assert sample.text_bytes == sum(len(text.encode()) for text in texts if in_validation(text, 0.3))


def prepared_source(folder: Path, tokenizer: TokenizerConfig) -> None:
    config = DataConfig(sources=[{"path": str(folder / "a.jsonl")}], lanes=1)
    prepare(config, tokenizer, folder / "out")


def test_each_source_has_its_share_whatever_the_number_of_its_files(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    """60 files against one: by files, the large source would have 2 % of the tokens; its share is 70 %."""
    for folder, files, share in (("many", 60, 20), ("one", 1, 1200)):
        (tmp_path / folder).mkdir()
        for index in range(files):
            write_jsonl(tmp_path / folder / f"{index:02}.jsonl", make_texts(100 * files + index, share))
    setting = make_setting(tokenizer, tmp_path / "many", tmp_path / "one", validation_fraction=0.2, sequence_length=10)
    sample = draw(setting, [3, 7], 5000)
    assert [source.tokens for source in sample.sources] == [1500, 3500]
    assert (len(sample.tokens), int(sample.lengths.sum())) == (500, 5000)
    # A document that is cut between others ends with a separator as well.
    separators = (sample.tokens[:, 1:] == load_tokenizer(tokenizer).token_to_id(EOS)).sum()
    assert separators >= sum(source.documents for source in sample.sources) - 1
    # Where a source gives less than its share although it has more, the other one does not make up for it.
    little = draw(setting, [3, 7], 10**6, max_bytes=120_000)
    many, one = (source.tokens for source in little.sources)
    assert many / (many + one) == pytest.approx(0.3, abs=0.01)
    assert not np.array_equal(little.tokens, sample.tokens)


def test_a_source_is_read_until_it_has_its_share(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    """And no further than that."""
    for index, name in enumerate(("small", "large")):
        (tmp_path / name).mkdir()
        for number in range(60):
            write_jsonl(tmp_path / name / f"{number:02}.jsonl", make_texts(100 * index + number, 20))
    setting = make_setting(tokenizer, tmp_path / "small", tmp_path / "large", validation_fraction=0.3)
    small, large = draw(setting, [1, 9], 7000).sources
    assert (small.tokens, large.tokens) == (700, 6300)
    assert small.units < 15 < large.units < 60


def test_a_rare_source_without_documents_does_not_shrink_the_others(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    write_jsonl(tmp_path / "a.jsonl", make_texts(3, 500))
    write_jsonl(tmp_path / "rare.jsonl", ["the whale " * 9000] * 3)  # in the training split, and not read to its end
    assert not in_validation("the whale " * 9000, 0.2)
    setting = make_setting(tokenizer, tmp_path / "a.jsonl", tmp_path / "rare.jsonl", validation_fraction=0.2)
    common, rare = draw(setting, [0.99, 0.01], 10**6).sources
    assert (rare.tokens, rare.documents) == (0, 0)
    assert common.documents == sum(bool(text) and in_validation(text, 0.2) for text in make_texts(3, 500))


def test_a_source_that_the_run_does_not_read_is_left_out(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", make_texts(index, 100)) for index, name in enumerate("ab")]
    sample = draw(make_setting(tokenizer, *paths, validation_fraction=0.3), [1, 0])
    assert [source.units for source in sample.sources] == [1, 0]
    assert sample.sources[1].tokens == 0
    # All are read if the run does not know what it reads: no text was found when they were estimated.
    unknown = draw(make_setting(tokenizer, *paths, validation_fraction=0.3), [0, 0])
    assert all(source.documents for source in unknown.sources)


def large(folder: Path, files: int, suffix: str, documents: int = 40) -> None:
    folder.mkdir()
    for index in range(files):
        texts = make_texts(index, documents, longest=400)
        if suffix == ".parquet":
            write_parquet(folder / f"{index:03}{suffix}", texts, 20)
        else:
            write_jsonl(folder / f"{index:03}{suffix}", texts)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.zst", ".parquet"])
def test_reading_is_bounded_and_spread_over_all_files(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """The split of 300 files of 70 kB is not found by reading 20 MB."""
    large(tmp_path / "text", 300, suffix)
    monkeypatch.setattr(module, "_LEAST_BYTES", 4 << 10)
    setting = make_setting(tokenizer, tmp_path / "text", validation_fraction=0.1)
    reads = Reads(monkeypatch)
    sample = draw(setting, [1], 10**6, max_bytes=1 << 20)
    [source] = sample.sources
    assert reads.bytes < 2 << 20
    assert source.read_bytes <= 1.25 * (1 << 20)
    assert source.units == sum(reads.opened.values()) < 300
    assert len(reads.opened) > (20 if suffix == ".parquet" else 50)  # a row group is read as a whole
    assert {int(name[0]) for name in reads.opened} == {0, 1, 2}
    assert source.documents > 30


def test_the_number_of_opened_files_is_bounded_as_well(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    large(tmp_path / "text", 60, ".jsonl", documents=10)
    monkeypatch.setattr(module, "MAX_UNITS", 24)
    reads = Reads(monkeypatch)
    sample = draw(make_setting(tokenizer, tmp_path / "text", validation_fraction=0.3), [1], 10**6)
    assert sum(reads.opened.values()) == sample.sources[0].units == 24


def test_no_file_is_opened_once_there_is_enough(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    large(tmp_path / "text", 60, ".jsonl")
    reads = Reads(monkeypatch)
    sample = draw(make_setting(tokenizer, tmp_path / "text", validation_fraction=0.5), [1], 700)
    assert int(sample.lengths.sum()) == 700
    assert sum(reads.opened.values()) <= 2 + 2 * module._CONCURRENT


def test_a_condition_that_few_rows_meet_does_not_lift_the_bound(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [json.dumps({"text": text, "score": int(i > 3990)}) for i, text in enumerate(make_texts(1, 4000, 100))]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    write_jsonl(tmp_path / "b.jsonl", make_texts(2, 100))
    setting = make_setting(tokenizer, tmp_path / "a.jsonl", tmp_path / "b.jsonl", validation_fraction=0.3)
    first = setting.config.sources[0].model_copy(update={"where": "score == 1"})
    setting = setting.changed(sources=[first.model_dump(exclude={"weight"}), {"path": str(tmp_path / "b.jsonl")}])
    reads = Reads(monkeypatch)
    draw(setting, [0.03, 0.97], 10**6, max_bytes=2 << 20)
    assert (tmp_path / "a.jsonl").stat().st_size > 1 << 20
    assert reads.bytes < 400_000


def test_the_sample_is_the_same_every_time_and_never_trained_on(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    large(tmp_path / "text", 40, ".jsonl.zst")
    setting = make_setting(tokenizer, tmp_path / "text", validation_fraction=0.2, sequence_length=30, epochs=1)
    first, second = (draw(setting, [1], 4000, max_bytes=1 << 19) for _ in range(2))
    assert first.sha256 == second.sha256
    assert sequences(first) == sequences(second)
    assert draw(setting, [1], 3970, max_bytes=1 << 19).sha256 != first.sha256
    documents = set(texts_of(first, load_tokenizer(setting.tokenizer)))
    assert all(is_validation(text.encode(), 0.2) for text in documents)
    trained = TokenStream(setting.config, setting.tokenizer, 30, epochs=1)
    seen = b"".join(np.array(tokens[1 : length + 1], "<i4").tobytes() for tokens, length in rows(drain(trained, 8)))
    for text in documents:
        ids = load_tokenizer(setting.tokenizer).encode(text, add_special_tokens=False).ids
        assert len(ids) < 50 or np.array(ids, "<i4").tobytes() not in seen


def texts_of(sample: ValidationSample, tokenizer: Tokenizer) -> list[str]:
    """The documents, without the last one, which may have been cut."""
    line = [token for tokens, length in sequences(sample) for token in tokens[1 : length + 1]]
    texts, ids = [], list[int]()
    for token in line:
        if token == tokenizer.token_to_id(EOS):
            texts.append(tokenizer.decode(ids, skip_special_tokens=False))
            ids = []
        else:
            ids.append(token)
    return texts


def test_bad_rows_count_as_in_training(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in make_texts(1, 50)) + '{"text": 3}\n{"text": 4}\n')
    setting = make_setting(tokenizer, path, validation_fraction=0.4, max_bad_rows=1)
    with pytest.raises(BadRowsError, match="2 bad rows"):
        draw(setting, [1])
    assert draw(setting.changed(max_bad_rows=2), [1]).sources[0].documents > 5


def test_a_sample_without_documents_names_the_cure(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(1, 20))
    setting = make_setting(tokenizer, path, validation_fraction=1e-9)
    with pytest.raises(DataError, match=r"none of the [\d,]+ bytes .* of a belong.*validation_fraction is 1e-09"):
        draw(setting, [1])


def test_the_disk_cache_is_not_filled_with_files_of_which_little_is_read(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(1, 50))
    setting = make_setting(tokenizer, path, validation_fraction=0.4)
    catalog: Any = make_catalog(setting.config)

    class Cached:
        def units(self, config: DataConfig) -> Any:
            cache = DiskCache(str(tmp_path / "cache"), 1 << 20)
            [[unit]] = catalog.units(config)
            file = CachedFile(unit.file.path, unit.file.bytes, unit.file.etag, unit.file.sha256, cache)
            return ((type(unit)(file, unit.recipe, None, None, 0, 1),),)

    reads = Reads(monkeypatch)
    encoder = DocumentEncoder.load(setting.tokenizer)
    sample_validation(
        setting.config,
        Cached(),
        encoder,
        7,
        shares=[1],
        max_tokens=1000,
        max_bytes=1 << 20,  # type: ignore[arg-type]
    )
    assert reads.kinds == {DataFile}
    assert not (tmp_path / "cache").exists()
