"""The speedrun's `.bin` shards are read as they are."""

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data import DataError, survey
from pretrain.data.prepared import speedrun
from tests.data.corpus import EOS, Setting, drain, make_setting, make_texts, rows, write_jsonl

SEPARATOR = 50256


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> TokenizerConfig:
    """A byte-level tokenizer with the size and the separator of GPT-2's; only the tokens of single bytes are used."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    vocabulary |= {f"{alphabet[0]}{number}": number for number in range(256, SEPARATOR)}
    vocabulary[EOS] = SEPARATOR
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS])
    path = tmp_path_factory.mktemp("gpt2") / "tokenizer.json"
    tokenizer.save(str(path))
    return TokenizerConfig(path=str(path))


def write_bin(path: Path, tokens: list[int], magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.array(tokens, "<u2").tobytes())
    return path


def cut(path: Path, count: int) -> Path:
    """Remove the last bytes of a file."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size - count])
    return path


def documents(setting: Setting) -> list[list[int]]:
    """The documents of a stream of one lane, without separators."""
    tokens = [token for row, length in rows(drain(setting.open(), 4)) for token in row[1 : 1 + length]]
    assert tokens[-1] == SEPARATOR
    found: list[list[int]] = [[]]
    for token in tokens[:-1]:
        if token == SEPARATOR:
            found.append([])
        else:
            found[-1].append(token)
    return found


def sample(seed: int, count: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(50_000) for _ in range(rng.randint(1, 30))] for _ in range(count)]


@pytest.mark.parametrize("window", [1, 2, 16, 50, 1 << 20])
def test_every_document_comes_once_whatever_the_window(
    tmp_path: Path, gpt2: TokenizerConfig, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speedrun, "UNIT_TOKENS", window)
    parts = sample(1, 20)
    tokens = [token for part in parts for token in (SEPARATOR, *part)]
    setting = make_setting(gpt2, write_bin(tmp_path / "a.bin", tokens), lanes=1, epochs=1)
    assert sorted(documents(setting)) == sorted(parts)


def test_pieces_at_the_borders_of_files_and_empty_documents(tmp_path: Path, gpt2: TokenizerConfig) -> None:
    write_bin(tmp_path / "a.bin", [SEPARATOR, 1, 2, SEPARATOR, SEPARATOR, 3])
    write_bin(tmp_path / "b.bin", [4, 5, SEPARATOR, 6, SEPARATOR])
    write_bin(tmp_path / "c.bin", [])
    setting = make_setting(gpt2, tmp_path / "*.bin", lanes=1, epochs=1)
    assert sorted(documents(setting)) == [[1, 2], [3], [4, 5], [6]]


def test_the_splits_are_apart_and_complete(tmp_path: Path, gpt2: TokenizerConfig) -> None:
    parts = sample(2, 200)
    path = write_bin(tmp_path / "a.bin", [token for part in parts for token in (SEPARATOR, *part)])
    train = make_setting(gpt2, path, lanes=1, epochs=1, validation_fraction=0.3)
    split = [documents(Setting(train.config, gpt2, 7, 1, name)) for name in ("train", "validation")]
    assert sorted(split[0] + split[1]) == sorted(parts)
    assert 30 < len(split[1]) < 90


def test_the_bytes_of_the_text_are_those_of_the_tokens(tmp_path: Path, gpt2: TokenizerConfig) -> None:
    texts = [text for text in make_texts(1, 30) if text]
    text = make_setting(gpt2, write_jsonl(tmp_path / "a.jsonl", texts), lanes=1, epochs=1).open()
    tokenizer = Tokenizer.from_file(gpt2.path)
    tokenizer.encode_special_tokens = True
    tokens = [token for one in texts for token in (SEPARATOR, *tokenizer.encode(one).ids)]
    shard = make_setting(gpt2, write_bin(tmp_path / "a.bin", tokens), lanes=1, epochs=1).open()
    assert rows(drain(shard, 3)) == rows(drain(text, 3))
    assert shard.text_bytes == text.text_bytes == sum(len(one.encode()) for one in texts)


def test_a_resumed_stream_continues(tmp_path: Path, gpt2: TokenizerConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speedrun, "UNIT_TOKENS", 100)
    path = write_bin(tmp_path / "a.bin", [token for part in sample(3, 60) for token in (SEPARATOR, *part)])
    setting = make_setting(gpt2, path, lanes=3, epochs=2, validation_fraction=0.2)
    whole = drain(setting.open(), 3)
    for stop in (1, len(whole) // 2):
        first = setting.open()
        drain(first, 3, stop)
        assert [b.sha256() for b in drain(setting.open(state=first.state()), 3)] == [b.sha256() for b in whole[stop:]]


def test_damaged_shards_and_other_tokenizers_are_refused(
    tmp_path: Path, gpt2: TokenizerConfig, tokenizer: TokenizerConfig
) -> None:
    cases = [
        (write_bin(tmp_path / "a.bin", [1], magic=7), "is not a token shard of the speedrun"),
        (write_bin(tmp_path / "b.bin", [1], version=2), "is a token shard of version 2, expected 1"),
        (write_bin(tmp_path / "c.bin", [1], count=9), "its header announces 9 tokens: the file is damaged"),
        (write_bin(tmp_path / "d.bin", [1], count=0), "has 1026 bytes, but its header announces 0 tokens"),
        (write_bin(tmp_path / "e.bin", [1], count=-1), "its header announces -1 tokens: the file is damaged"),
        (write_bin(tmp_path / "f.bin", [1], count=2**31 - 1), "its header announces 2147483647 tokens"),
        (write_bin(tmp_path / "g.bin", [1], magic=20240801), "holds tokens of 32 bits"),
        (cut(write_bin(tmp_path / "h.bin", [1, 2]), 1), "has 1027 bytes, but its header announces 2 tokens"),
        (cut(write_bin(tmp_path / "i.bin", [1, 2]), 4 + 1000), "has 24 bytes, but its header announces 2 tokens"),
        (cut(write_bin(tmp_path / "j.bin", []), 1016), "has 8 bytes, but its header announces 0 tokens"),
        (cut(write_bin(tmp_path / "k.bin", []), 1024), "is not a token shard of the speedrun"),
        (write_bin(tmp_path / "l.bin", [1], magic=int.from_bytes(b"PAR1", "little")), "is not a token shard"),
        (tmp_path / "gone-*.bin", "no such file, and no file matches it as a pattern"),
    ]
    for path, message in cases:
        [problem] = survey(DataConfig(sources=[{"path": str(path)}], lanes=1))[1]
        assert message in problem
    (tmp_path / "folder.bin").mkdir()
    [problem] = survey(DataConfig(sources=[{"path": str(tmp_path / "folder.bin")}], lanes=1))[1]
    assert "folder.bin" in problem
    foreign = make_setting(gpt2, write_bin(tmp_path / "m.bin", [SEPARATOR, 1, 60_000, 2]), lanes=1)
    with pytest.raises(DataError, match=r"m\.bin: holds the token 60000, but GPT-2's last one is 50256"):
        foreign.open().next_batch(1)
    good = write_bin(tmp_path / "good.bin", [SEPARATOR, 1])
    with pytest.raises(DataError, match=r"good\.bin: its documents are separated by the token 50256"):
        make_setting(tokenizer, good, lanes=1).open()
