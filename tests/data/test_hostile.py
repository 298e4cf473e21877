"""Hostile folders never hang, never end in a traceback and never lose a good document."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from pretrain.config.data import DataConfig, SourceConfig, TokenizerConfig
from pretrain.data import DataError, check_sources
from tests.data.corpus import EOS, drain, make_setting
from tests.data.hostile import Found, read_plainly, write_folder


def streamed(folder: Path, tokenizer: TokenizerConfig) -> tuple[list[str], int]:
    """The documents of the stream, decoded from its tokens, and the rows that it skipped."""
    setting = make_setting(tokenizer, folder, lanes=1, epochs=1, max_bad_rows=1 << 20, sequence_length=512)
    stream = setting.open()
    model = Tokenizer.from_file(tokenizer.path)
    end = model.token_to_id(EOS)
    documents: list[str] = []
    tokens: list[int] = []
    for batch in drain(stream, 8):
        for row, length in zip(batch.tokens.tolist(), batch.lengths.tolist(), strict=True):
            for token in row[1 : 1 + length]:
                if token == end:
                    documents.append(model.decode(tokens, skip_special_tokens=False))
                    tokens = []
                else:
                    tokens.append(token)
    assert not tokens
    [progress] = stream.progress().values()
    return documents, progress.bad_rows


def examine(seed: int, folder: Path, tokenizer: TokenizerConfig) -> None:
    files = {path: read_plainly(path) for path in write_folder(seed, folder)}
    expected = Counter(text for found in files.values() for text in found.texts)
    source = SourceConfig(path=str(folder))
    problems = check_sources(DataConfig(sources=[source], lanes=1, validation_fraction=0.0))
    damaged = [path for path, found in files.items() if found.damaged]
    faulty = [path for path, found in files.items() if found.damaged or found.bad]
    for path in faulty:
        assert any(str(path) in problem for problem in problems), (seed, path, problems)
    assert len(problems) <= max(1, len(files)), (seed, problems)
    if not faulty:
        assert problems == ([] if expected else [f"{folder}: the source is empty, no row holds any text"]), seed
    if damaged:
        with pytest.raises(DataError) as error:
            streamed(folder, tokenizer)
        assert any(str(path) in str(error.value) for path in damaged), (seed, error.value)
        for path in damaged:
            path.unlink()
    rest = [found for found in files.values() if not found.damaged]
    if expected and any(found.texts for found in rest):
        documents, bad = streamed(folder, tokenizer)
        assert Counter(documents) == sum((Counter(found.texts) for found in rest), Counter()), seed
        total = sum(found.bad for found in rest)
        assert bad <= total, seed  # those behind the last document are not told of
        for limit in {total, max(0, total - 1)}:
            config = DataConfig(sources=[source], lanes=1, validation_fraction=0.0, max_bad_rows=limit)
            assert (check_sources(config) == []) == (limit == total), seed


@pytest.mark.parametrize(
    "seeds", [range(24), *(pytest.param(range(at, at + 40), marks=pytest.mark.long) for at in range(24, 424, 40))]
)
def test_no_folder_hangs_breaks_or_loses_a_document(seeds: range, tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    for seed in seeds:
        examine(seed, tmp_path / str(seed), tokenizer)
        shutil.rmtree(tmp_path / str(seed))


def test_the_oracle_finds_what_was_written(tmp_path: Path) -> None:
    """Over many seeds, every sort of file occurs."""
    found = [read_plainly(path) for seed in range(60) for path in write_folder(seed, tmp_path / str(seed))]
    assert sum(len(one.texts) for one in found) > 1000
    assert 10 < sum(one.damaged for one in found) < len(found) / 2
    assert sum(one.bad > 0 for one in found) > 10
    assert Found() != found[0]
