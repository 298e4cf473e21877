"""How the packages are fetched, parsed, cleaned and cut into documents."""

from __future__ import annotations

import hashlib
import importlib
import struct
import sys
import tarfile
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

REPOSITORY = Path(__file__).resolve().parent.parent

sys.path.insert(0, str(REPOSITORY / "scripts"))
build_assets = importlib.import_module("build_assets")
assets_sources = importlib.import_module("assets_sources")
assets_text = importlib.import_module("assets_text")


# --- fetching ----------------------------------------------------------------------------------------


def make_source(sha256: str, fetch: tuple[str, ...]) -> object:
    return assets_sources.Source("toy", "CC0-1.0", "toy.tgz", sha256, fetch, lambda folder: iter(()))


def test_a_package_with_another_checksum_is_refused_and_not_kept(tmp_path: Path) -> None:
    source = make_source("0" * 64, ("sh", "-c", "echo tampered > toy.tgz"))
    with pytest.raises(assets_sources.AssetError, match=r"toy\.tgz: expected sha256 0000"):
        assets_sources.obtain(source, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cached_package_is_fetched_again_and_a_good_one_is_not(tmp_path: Path) -> None:
    good = hashlib.sha256(b"good\n").hexdigest()
    (tmp_path / "toy.tgz").write_bytes(b"damaged")
    source = make_source(good, ("sh", "-c", "echo good > toy.tgz"))
    assert assets_sources.obtain(source, tmp_path).read_bytes() == b"good\n"
    unreachable = make_source(good, ("sh", "-c", "echo no route >&2; exit 7"))
    assert assets_sources.obtain(unreachable, tmp_path).read_bytes() == b"good\n"


@pytest.mark.parametrize(
    ("fetch", "message"),
    [
        (("sh", "-c", "echo no route >&2; exit 7"), "exited 7:\nno route\n.*by hand"),
        (("sh", "-c", "true"), r"did not produce toy\.tgz"),
        (("no-such-client", "pack"), "no-such-client: not installed"),
    ],
)
def test_a_failing_client_is_reported_with_its_words(tmp_path: Path, fetch: tuple[str, ...], message: str) -> None:
    with pytest.raises(assets_sources.AssetError, match=message):
        assets_sources.obtain(make_source("0" * 64, fetch), tmp_path)


@pytest.mark.parametrize("filters", [True, False])
def test_an_archive_that_reaches_outside_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filters: bool
) -> None:
    refusal: type[Exception] = assets_sources.AssetError
    if not filters:
        monkeypatch.delattr(tarfile, "data_filter", raising=False)
    elif hasattr(tarfile, "data_filter"):  # not before Python 3.11.4
        refusal = tarfile.OutsideDestinationError
    payload = tmp_path / "payload"
    payload.write_text("x")
    with tarfile.open(tmp_path / "bad.tgz", "w:gz") as archive:
        archive.add(payload, arcname="../outside")
    (tmp_path / "folder").mkdir()
    with pytest.raises(refusal):
        assets_sources.unpack(tmp_path / "bad.tgz", tmp_path / "folder")
    assert not (tmp_path / "outside").exists()


# --- R data ------------------------------------------------------------------------------------------

ASCII, UTF8, LATIN1 = 0x40009, 0x8009, 0x4009


def r_string(value: bytes, flags: int = ASCII) -> bytes:
    return struct.pack(">II", flags, len(value)) + value


def r_vector(*strings: bytes, flags: int = 16, length: int | None = None, version: int = 3) -> bytes:
    header = b"X\n" + struct.pack(">III", version, 0x40201, 0x30500) + struct.pack(">I", 5) + b"UTF-8"
    count = len(strings) if length is None else length
    return header + struct.pack(">Ii", flags, count) + b"".join(strings)


def rdb_record(vector: bytes, length: int | None = None) -> bytes:
    return struct.pack(">I", len(vector) if length is None else length) + zlib.compress(vector)


def test_rdb_records_are_read_in_order() -> None:
    first = r_vector(r_string(b"EMMA"), r_string(b""), r_string("10 £".encode(), UTF8))
    second = r_vector()
    third = r_vector(r_string(b"x" * 100_000))
    data = b"".join(map(rdb_record, (first, second, third)))
    assert assets_text.read_rdb(data) == [["EMMA", "", "10 £"], [], ["x" * 100_000]]
    assert assets_text.read_rdb(b"") == []


GOOD = r_vector(r_string(b"a"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (rdb_record(GOOD) + b"\0\0", "2 stray bytes at offset"),
        (rdb_record(GOOD, len(GOOD) - 1), "does not hold"),
        (rdb_record(GOOD, len(GOOD) + 1), "does not hold"),
        (rdb_record(GOOD)[:-6], "does not hold"),
        (rdb_record(GOOD)[:4] + b"not zlib", "damaged record at offset 0"),
        (rdb_record(b"A\n" + GOOD[2:]), "XDR mark"),
        (rdb_record(r_vector(version=2)), "version 3, got 2"),
        (rdb_record(GOOD.replace(b"UTF-8", b"ASCII")), "native encoding"),
        (rdb_record(r_vector(flags=13)), "character vector"),
        (rdb_record(r_vector(flags=16 | 0x200)), "without attributes"),
        (rdb_record(r_vector(length=-1)), "length -1"),
        (rdb_record(r_vector(r_string(b"a"), length=2)), "cannot read 8 bytes"),
        (rdb_record(GOOD + b"\0"), "1 bytes left over after 1 strings"),
        (rdb_record(r_vector(struct.pack(">Ii", ASCII, -1))), "cannot read -1 bytes"),
        (rdb_record(r_vector(r_string(b"\xa3", LATIN1))), "ASCII or UTF-8 string"),
        (rdb_record(r_vector(r_string(b"\xa3", UTF8))), "utf-8"),
        (rdb_record(r_vector(struct.pack(">II", 10, 1))), "ASCII or UTF-8 string"),
    ],
)
def test_rdb_that_is_anything_else_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assets_text.read_rdb(data)


# --- paragraphs --------------------------------------------------------------------------------------


def test_wrapped_lines_become_paragraphs() -> None:
    lines = [
        "",
        "It is a truth",
        "universally  _acknowledged_,",
        "",
        "",
        "  that a single man",
        "in possession",
    ]
    assert assets_text.reflow(lines) == ("It is a truth universally acknowledged,\n\nthat a single man in possession")


def test_verse_keeps_its_lines_and_an_indented_letter_does_not() -> None:
    verse = ["   Smiling at", '      "Grief,', "   And so on.", ""]
    letter = ["     I have just had the", "     honour of receiving."]
    assert assets_text.reflow(verse + letter) == (
        'Smiling at\n"Grief,\nAnd so on.\n\nI have just had the honour of receiving.'
    )


def test_blanks_to_fill_in_are_not_taken_for_emphasis() -> None:
    assert assets_text.reflow(["a sum of ____ for each", "slave and ____ more"]) == (
        "a sum of ____ for each slave and ____ more"
    )


def test_normalise_leaves_only_unix_line_ends() -> None:
    assert assets_text.normalise("a\r\nb\rc\x02d\ufeff\te") == "a\nb\nc d \te"


def test_flattened_verse_is_parted_where_its_lines_were_joined() -> None:
    assert assets_text.unflatten("   One line,    Another line") == ["   One line,", "   Another line"]
    # Columns of a table are padded to other widths; prose is not indented.
    assert assets_text.unflatten("   WAL,        Dutch.") == ["   WAL,        Dutch."]
    assert assets_text.unflatten("A sentence. Another.") == ["A sentence. Another."]
    assert assets_text.unflatten("") == [""]


# --- chapters ----------------------------------------------------------------------------------------


def test_a_novel_is_cut_at_its_chapters_without_the_title_page() -> None:
    lines = ["EMMA", "By Jane Austen", "", "CHAPTER 1", "", "First", "letters", "", "Chapter II", "Second"]
    assert assets_text.chapters(lines) == [
        ("chapter-1", ["CHAPTER 1", "", "First", "letters", ""]),
        ("chapter-2", ["Chapter II", "Second"]),
    ]


def test_volumes_open_their_first_chapter_and_may_count_anew_or_on() -> None:
    anew = ["Title", "VOLUME I", "Motto", "CHAPTER I", "a", "VOLUME II", "CHAPTER I", "b"]
    assert assets_text.chapters(anew) == [
        ("volume-1-chapter-1", ["VOLUME I", "Motto", "CHAPTER I", "a"]),
        ("volume-2-chapter-1", ["VOLUME II", "CHAPTER I", "b"]),
    ]
    on = ["VOLUME I", "CHAPTER I", "a", "VOLUME II", "CHAPTER II", "b"]
    assert [slug for slug, _ in assets_text.chapters(on)] == ["volume-1-chapter-1", "volume-2-chapter-2"]


def test_roman_numerals_run_as_far_as_novels_do() -> None:
    numerals = ["I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX", "X", "XI", "XII", "XIII", "XIV"]
    found = assets_text.chapters([f"CHAPTER {numeral}" for numeral in numerals])
    assert [slug for slug, _ in found] == [f"chapter-{number}" for number in range(1, 15)]
    for number, numeral in [(19, "XIX"), (44, "XLIV"), (48, "XLVIII"), (99, "XCIX")]:
        before = [f"CHAPTER {i}" for i in range(1, number)]
        assert assets_text.chapters([*before, f"CHAPTER {numeral}"])[-1][0] == f"chapter-{number}"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["CHAPTER 1", "CHAPTER 3"], "'CHAPTER 3': expected number 2"),
        (["CHAPTER 1", "CHAPTER 1"], "'CHAPTER 1': expected number 2"),
        (["VOLUME II", "CHAPTER 1"], "'VOLUME II': expected number 1"),
        (["CHAPTER 1", "a", "VOLUME I"], "the last volume has no chapters"),
        (["VOLUME I", "VOLUME II", "CHAPTER 1"], "'VOLUME II': the volume before it has no chapters"),
        (["no heading", "Chapter 1 has no line of its own"], "no chapter heading found"),
    ],
)
def test_a_missed_or_invented_heading_is_refused(lines: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        assets_text.chapters(lines)


# --- cuts --------------------------------------------------------------------------------------------


def test_cuts_fall_between_paragraphs_and_give_equal_parts() -> None:
    paragraphs = [f"{letter} " * 20 + "end." for letter in "abcdef"]
    pieces = assets_text.cut("\n\n".join(paragraphs), 100)
    assert pieces == ["\n\n".join(paragraphs[i : i + 2]) for i in (0, 2, 4)]


def test_a_long_paragraph_is_cut_between_sentences_but_not_after_mr() -> None:
    text = "They were seen by Mr. Knightley there. The U.S. Senate was not. It rained."
    assert assets_text.cut(text, 40) == [
        "They were seen by Mr. Knightley there.",
        "The U.S. Senate was not. It rained.",
    ]


def test_text_without_blanks_is_cut_between_code_points() -> None:
    pieces = assets_text.cut("🐋" * 25, 16)
    assert "".join(pieces) == "🐋" * 25
    assert max(len(piece.encode()) for piece in pieces) <= 16


def test_a_fitting_text_stays_whole_and_a_blank_one_gives_nothing() -> None:
    assert assets_text.cut(" a\n\nb ", 4) == ["a\n\nb"]
    assert assets_text.cut(" \n\n ", 100) == []
    with pytest.raises(ValueError, match="at least 4"):
        assets_text.cut("text", 3)


@settings(deadline=None)
@given(
    text=st.text(alphabet=st.sampled_from("aB1.!?\"' \n\u00a0é日🐋"), max_size=300),
    max_bytes=st.integers(4, 120),
)
def test_pieces_fit_and_together_are_the_text(text: str, max_bytes: int) -> None:
    pieces = assets_text.cut(text, max_bytes)
    assert all(1 <= len(piece.encode()) <= max_bytes for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


@given(sizes=st.lists(st.integers(1, 50), max_size=40), parts=st.integers(1, 12))
def test_partition_keeps_order_and_everything(sizes: list[int], parts: int) -> None:
    groups = assets_text.partition(sizes, parts, int)
    assert [size for group in groups for size in group] == sizes
    assert len(groups) <= parts
    assert all(groups)
    # No run strays from its share by more than the items at its two ends.
    for group in groups:
        assert abs(sum(group) - sum(sizes) / parts) <= max(sizes) or len(groups) < parts
