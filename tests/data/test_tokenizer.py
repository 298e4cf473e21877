"""Which tokenizers can be used, and how many rows their embedding needs."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from pretrain.config.data import TokenizerConfig
from pretrain.data import DataError, DocumentEncoder, load_tokenizer, survey, vocabulary_rows
from tests.data.corpus import EOS, drain, make_setting, rows, write_jsonl

pytestmark = pytest.mark.usefixtures("warm")


def saved(tokenizer: Tokenizer, folder: Path, eos: str = EOS) -> TokenizerConfig:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return TokenizerConfig(path=str(path), eos_token=eos)


def words(vocabulary: dict[str, int], unknown: str = "<unk>") -> Tokenizer:
    """A token per word."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_a_tokenizer_that_cannot_be_used_is_refused(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    damaged = tmp_path / "damaged.json"
    damaged.write_text(Path(tokenizer.path).read_text(encoding="utf-8")[:-100], encoding="utf-8")
    ordinary = Tokenizer.from_file(tokenizer.path)
    ordinary.add_tokens([AddedToken("<sep>", special=False)])
    ordinary.save(str(tmp_path / "ordinary.json"))
    cases = [
        (tmp_path / "gone.json", EOS, "no such file"),
        (tmp_path, EOS, "is a folder: name the tokenizer.json in it"),
        (damaged, EOS, "cannot be read as a tokenizer"),
        (Path(tokenizer.path), "</s>", "'</s>' is not in"),
        (tmp_path / "ordinary.json", "<sep>", "'<sep>' is not marked special"),
    ]
    for path, eos, message in cases:
        with pytest.raises(DataError, match=message):
            load_tokenizer(TokenizerConfig(path=str(path), eos_token=eos))


def unigram() -> Tokenizer:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in "abcxy</>s")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [unigram(), words({"<unk>": 0, "</s>": 1})],
    ids=["unigram", "words"],
)
def test_a_special_separator_that_the_model_also_produces_is_refused_for_that_reason(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    with pytest.raises(DataError, match=r"'</s>' is marked special in .* but its model also produces") as error:
        load_tokenizer(saved(tokenizer, tmp_path, "</s>"))
    assert "not marked special" not in str(error.value)
    assert "a text that contains" in str(error.value)


def test_a_separator_in_the_vocabulary_that_no_text_gives_is_accepted(tmp_path: Path) -> None:
    """So GPT-2 has it: an entry of the model, but not the result of a merge."""
    bpe = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, EOS: 3, "<": 4}, [("a", "b")]))
    bpe.add_special_tokens([EOS])
    assert load_tokenizer(saved(bpe, tmp_path)).encode(f"ab{EOS}").ids == [2, 4]


def test_an_added_token_with_the_id_of_a_word_cannot_separate(tmp_path: Path) -> None:
    """The library numbers added tokens from the size of the vocabulary on, into its gaps or onto its entries."""
    tokenizer = words({"<unk>": 0, "the": 1, "sea": 3})
    tokenizer.add_special_tokens([EOS])
    assert tokenizer.token_to_id(EOS) == tokenizer.token_to_id("sea") == 3
    with pytest.raises(DataError, match=r"has the id 3 .* and so has 'sea': a text that contains the latter would end"):
        load_tokenizer(saved(tokenizer, tmp_path))


def test_the_rows_needed_are_the_largest_id_plus_one(tokenizer: TokenizerConfig, tmp_path: Path) -> None:
    contents = json.loads(Path(tokenizer.path).read_text(encoding="utf-8"))
    assert vocabulary_rows(load_tokenizer(tokenizer)) == len(contents["model"]["vocab"]) == 300
    vocabulary = contents["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.__getitem__)] = 900
    (tmp_path / "gap.json").write_text(json.dumps(contents), encoding="utf-8")
    with_gap = load_tokenizer(TokenizerConfig(path=str(tmp_path / "gap.json")))
    assert with_gap.get_vocab_size() == 300
    assert vocabulary_rows(with_gap) == 901


def test_added_tokens_need_rows_as_well(tokenizer: TokenizerConfig, tmp_path: Path) -> None:
    added = Tokenizer.from_file(tokenizer.path)
    added.add_tokens(["[one]", AddedToken("[two]", special=True)])
    assert vocabulary_rows(load_tokenizer(saved(added, tmp_path))) == 302


@pytest.mark.parametrize("workers", [0, 1])
def test_a_text_that_the_tokenizer_cannot_encode_is_a_fault_of_the_data(tmp_path: Path, workers: int) -> None:
    """Where the token for unknown words is not in the vocabulary the library raises a plain Exception."""
    tokenizer = words({"the": 0, "sea": 1}, unknown="[UNK]")
    tokenizer.add_special_tokens([EOS])
    config = saved(tokenizer, tmp_path)
    good = make_setting(config, write_jsonl(tmp_path / "a.jsonl", ["the sea"]), lanes=1, epochs=1)
    assert rows(drain(good.open(), 1)) == [([2, 0, 1, 2, 2, 2, 2, 2], 3)]
    bad = make_setting(config, write_jsonl(tmp_path / "b.jsonl", ["the sea", "the whale"]), lanes=1)
    stream = bad.open(workers=workers)
    with pytest.raises(DataError, match=r"tokenizer\.json: cannot encode the text 'the whale': .*\[UNK\]"):
        stream.next_batch(1)
    stream.close()


def test_dropout_is_refused(tokenizer: TokenizerConfig, tmp_path: Path) -> None:
    """A stream could not be repeated; 0 and null are no dropout."""
    contents = json.loads(Path(tokenizer.path).read_text(encoding="utf-8"))
    path = tmp_path / "tokenizer.json"
    for dropout in (None, 0.0):
        contents["model"]["dropout"] = dropout
        path.write_text(json.dumps(contents), encoding="utf-8")
        load_tokenizer(TokenizerConfig(path=str(path)))
    contents["model"]["dropout"] = 0.1
    path.write_text(json.dumps(contents), encoding="utf-8")
    with pytest.raises(DataError, match=r"model\.dropout 0\.1 makes it divide the same text differently each time"):
        load_tokenizer(TokenizerConfig(path=str(path)))


def letters(unknown: str | None, **options: Any) -> Tokenizer:
    """A BPE that knows the letters a and b."""
    return Tokenizer(models.BPE({"a": 0, "b": 1, EOS: 2, "<unk>": 3}, [], unk_token=unknown, **options))


def test_a_separator_that_stands_for_unknown_characters_is_refused(tokenizer: TokenizerConfig, tmp_path: Path) -> None:
    pieces = [(EOS, 0.0), ("a", -1.0), ("b", -1.0)]
    unigram = Tokenizer(models.Unigram(pieces, unk_id=0))
    for number, kind in enumerate([letters(EOS), words({EOS: 0, "the": 1}, unknown=EOS), unigram]):
        kind.add_special_tokens([EOS])
        (tmp_path / str(number)).mkdir()
        with pytest.raises(DataError, match="is also the token for unknown characters"):
            load_tokenizer(saved(kind, tmp_path / str(number)))
    other = letters("<unk>")
    other.add_special_tokens([EOS, "<unk>"])
    load_tokenizer(saved(other, tmp_path))
    # A byte-level vocabulary knows every character, so that the token for unknown ones never occurs.
    contents = json.loads(Path(tokenizer.path).read_text(encoding="utf-8"))
    contents["model"]["unk_token"] = EOS
    (tmp_path / "bytes.json").write_text(json.dumps(contents), encoding="utf-8")
    load_tokenizer(TokenizerConfig(path=str(tmp_path / "bytes.json")))


def test_no_setting_of_the_file_changes_the_tokens_of_a_document(tokenizer: TokenizerConfig, tmp_path: Path) -> None:
    """Truncation, padding, tokens at begin and end, and how special tokens treat the blanks around them."""
    texts = ["the whale", f"a {EOS} b{EOS}", "<s>the</s>", "naïve 鯨 🐋", "", "  "]
    marked = Tokenizer.from_file(tokenizer.path)
    marked.add_special_tokens(["<s>", "</s>"])
    plain = DocumentEncoder.load(saved(marked, tmp_path))
    expected = [tokens.tolist() for tokens in plain.encode(texts)]
    assert all(tokens.index(plain.eos_id) == len(tokens) - 1 for tokens in expected)
    assert [plain.tokenizer.decode(tokens[:-1]) for tokens in expected] == texts
    begin, end = (marked.token_to_id(name) for name in ("<s>", "</s>"))
    marked.enable_truncation(2)
    marked.enable_padding(length=64, pad_token="<s>", pad_id=begin)
    marked.post_processor = processors.TemplateProcessing(
        single=f"<s> $A </s> {EOS}", special_tokens=[("<s>", begin), ("</s>", end), (EOS, plain.eos_id)]
    )
    contents = json.loads(marked.to_str())
    for added in contents["added_tokens"]:
        added |= {"lstrip": True, "rstrip": True, "normalized": True}
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(contents), encoding="utf-8")
    odd = DocumentEncoder.load(TokenizerConfig(path=str(path)))
    assert [tokens.tolist() for tokens in odd.encode(texts)] == expected


@pytest.mark.parametrize(
    "normalizer",
    [normalizers.Lowercase(), normalizers.Replace("END", EOS), normalizers.NFKC()],
    ids=["lowercase", "replace", "nfkc"],
)
def test_a_normalizer_that_spells_the_separator_makes_none(
    tokenizer: TokenizerConfig, tmp_path: Path, normalizer: normalizers.Normalizer
) -> None:
    normalizing = Tokenizer.from_file(tokenizer.path)
    normalizing.normalizer = normalizer
    encoder = DocumentEncoder.load(saved(normalizing, tmp_path))
    for tokens in encoder.encode([EOS.upper(), "aENDb", "＜|endoftext|＞", f"{EOS} {EOS}"]):
        assert encoder.eos_id not in tokens[:-1]
        assert len(tokens) > 4


def test_word_pieces_and_bytes_of_unknown_characters(tmp_path: Path) -> None:
    pieces = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "sea": 2, "##s": 3, "[SEP]": 4, "[CLS]": 5}))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    pieces.add_special_tokens(["[UNK]", "[SEP]", "[CLS]"])
    pieces.post_processor = processors.BertProcessing(("[SEP]", 4), ("[CLS]", 5))
    encoder = DocumentEncoder.load(saved(pieces, tmp_path, "[SEP]"))
    found = [tokens.tolist() for tokens in encoder.encode(["The seas", "a[SEP]the", 200 * "x"])]
    assert found == [[1, 2, 3, 4], [0, 0, 0, 0, 1, 4], [0, 4]]
    vocabulary = {"<unk>": 0, "</s>": 1, "a": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for gap, expected in ((None, [2, *(3 + byte for byte in "鯨".encode()), 1]), ("<0xE9>", [2, 0, 1])):
        known = {name: number for name, number in vocabulary.items() if name != gap}
        fallback = Tokenizer(models.BPE(known, [], byte_fallback=True, unk_token="<unk>"))
        fallback.add_special_tokens(["<unk>", "</s>"])
        encoder = DocumentEncoder.load(saved(fallback, tmp_path, "</s>"))
        assert encoder.encode(["a鯨"])[0].tolist() == expected
        assert 1 not in encoder.encode(["</s>"])[0][:-1]


def test_a_tokenizer_that_leaves_out_everything_is_found_before_a_run(
    tokenizer: TokenizerConfig, tmp_path: Path
) -> None:
    silent = Tokenizer.from_file(tokenizer.path)
    silent.normalizer = normalizers.Replace(Regex(r"[\s\S]"), "")
    named = saved(silent, tmp_path)
    config = make_setting(named, write_jsonl(tmp_path / "a.jsonl", ["", "the sea"]), lanes=1).config
    [problem] = survey(config, encoder=DocumentEncoder.load(named))[1]
    assert "gives no token for any of the first texts of a source, for example for 'the sea'" in problem


def test_texts_that_cannot_be_encoded_are_found_before_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = words({"the": 0, "sea": 1}, unknown="[UNK]")
    tokenizer.add_special_tokens([EOS])
    named = saved(tokenizer, tmp_path)
    paths = [write_jsonl(tmp_path / f"{number}.jsonl", texts) for number, texts in enumerate([["the sea"], ["whale"]])]
    config = make_setting(named, *paths, lanes=1).config
    [problem] = survey(config, encoder=DocumentEncoder.load(named))[1]
    assert "cannot encode the text 'whale'" in problem
    silent = letters(None)
    silent.add_special_tokens([EOS])
    named = saved(silent, tmp_path)
    assert survey(config, encoder=DocumentEncoder.load(named))[1] == []
    assert "has no token for 4 characters of the sources" in caplog.text
