"""Which files of this machine a source stands for: what is read, what is skipped with a name, what is refused."""

import glob
import gzip
import logging
import os
import random
from pathlib import Path

import pytest

from pretrain.config.data import DataConfig, SourceConfig
from pretrain.data import DataError, check_sources
from pretrain.data.sources import list_files, open_bytes
from pretrain.data.sources.names import Pattern
from pretrain.data.units import DataFile

SUFFIXES = tuple(f".{kind}{packed}" for kind in ("jsonl", "json", "ndjson") for packed in ("", ".gz", ".zst", ".zstd"))
SUFFIXES = (".parquet", *SUFFIXES)


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}\n")
    return folder


def listed(path: Path | str, root: Path) -> list[str]:
    return [os.path.relpath(file.path, root) for file in list_files(str(path), SUFFIXES)]


READABLE = ["a.PARQUET", "b.jsonl", "c.json.gz", "d/e.NDJSON.Zstd", "d/f.jsonl.zst", "g.json"]


def test_every_readable_suffix_counts_in_any_case_in_folders_and_patterns(tmp_path: Path) -> None:
    put(tmp_path, *READABLE)
    assert listed(tmp_path, tmp_path) == READABLE
    assert listed(f"{tmp_path}/**", tmp_path) == READABLE
    assert listed(f"{tmp_path}/**/*.*", tmp_path) == READABLE
    assert [file.bytes for file in list_files(str(tmp_path), SUFFIXES)] == [3] * 6


SKIPPED = ["README.md", "LICENSE", ".x.jsonl", "._b.jsonl", "_SUCCESS", "b.jsonl.sha256", "load.py", "plot.png"]
SKIPPED_BELOW = ["_temporary/0/p.jsonl", ".ipynb_checkpoints/b.jsonl", ".cache/huggingface/b.jsonl", "d/.hidden.json"]


@pytest.mark.parametrize("pattern", ["", "/**", "/**/*"])
def test_what_is_skipped_is_counted_and_named_in_one_line(
    tmp_path: Path, pattern: str, caplog: pytest.LogCaptureFixture
) -> None:
    put(tmp_path, *READABLE, *SKIPPED, *SKIPPED_BELOW)
    assert listed(f"{tmp_path}{pattern}", tmp_path) == READABLE
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert f"skipped {len(SKIPPED) + 4} files" in record.getMessage()
    assert ".cache" in record.getMessage()
    assert "more" in record.getMessage()


def test_a_pattern_that_names_what_is_hidden_means_it(tmp_path: Path) -> None:
    put(tmp_path, ".cache/a.jsonl", "_tmp/b.jsonl", "c.jsonl")
    assert listed(f"{tmp_path}/.cache/*.jsonl", tmp_path) == [".cache/a.jsonl"]
    assert listed(f"{tmp_path}/.c*/*.jsonl", tmp_path) == [".cache/a.jsonl"]
    assert listed(f"{tmp_path}/_tmp", tmp_path) == ["_tmp/b.jsonl"]
    assert listed(f"{tmp_path}/_tmp/b.jsonl", tmp_path) == ["_tmp/b.jsonl"]


@pytest.mark.parametrize(
    "name",
    ["b.csv", "b.arrow", "b.bz2", "b.jsonl.xz", "b.tar", "b.parquet.gz", "B.CSV", "b.jsonl.part", "b.zip", "x.jsonl.1"],
)
@pytest.mark.parametrize("pattern", ["", "/*"])
def test_data_of_a_kind_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path, name: str, pattern: str) -> None:
    put(tmp_path, "a.jsonl", name)
    with pytest.raises(DataError, match=f"{name}: looks like data"):
        list_files(f"{tmp_path}{pattern}", SUFFIXES)
    assert listed(f"{tmp_path}/*.jsonl", tmp_path) == ["a.jsonl"]


@pytest.mark.parametrize(("one", "two"), [("a.jsonl", "a.jsonl.gz"), ("d/a.json.zst", "d/a.JSON.gz")])
def test_a_file_and_its_compressed_copy_are_refused(tmp_path: Path, one: str, two: str) -> None:
    put(tmp_path, one, two, "other/a.jsonl.gz")
    with pytest.raises(DataError) as error:
        list_files(str(tmp_path), SUFFIXES)
    assert one in str(error.value)
    assert two in str(error.value)
    assert "other" not in str(error.value)


def test_linked_folders_are_followed_and_loops_end(tmp_path: Path) -> None:
    put(tmp_path, "in/a.jsonl", "out/deep/b.jsonl")
    (tmp_path / "in/linked").symlink_to(tmp_path / "out")
    for name in ("in/loop", "out/deep/loop", "in/loop2"):
        (tmp_path / name).symlink_to(tmp_path / "in")
    for path in (f"{tmp_path}/in", f"{tmp_path}/in/**/*.jsonl", f"{tmp_path}/in/**"):
        assert listed(path, tmp_path) == ["in/a.jsonl", "in/linked/deep/b.jsonl"]


def test_a_file_that_is_read_under_two_names_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("a.jsonl")
    assert listed(tmp_path, tmp_path) == ["a.jsonl", "b.jsonl"]
    assert f"{tmp_path}/b.jsonl is {tmp_path}/a.jsonl" in caplog.text


@pytest.mark.parametrize("path", ["", "/*.jsonl", "/b.jsonl"])
def test_a_dangling_link_is_an_error_that_names_it(tmp_path: Path, path: str) -> None:
    put(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl, a link to gone\.jsonl: cannot be read"):
        list_files(f"{tmp_path}{path}", SUFFIXES)


def test_special_files_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "proc.jsonl").symlink_to("/proc/version")
    for name in ("pipe", "zero", "proc"):
        with pytest.raises(DataError, match="is not a regular file"):
            list_files(f"{tmp_path}/{name}.jsonl", SUFFIXES)
        with pytest.raises(DataError, match="is not a regular file"), open_bytes(DataFile(f"{tmp_path}/{name}.jsonl")):
            pass
    with pytest.raises(DataError, match="is not a regular file"):
        list_files(str(tmp_path), SUFFIXES)
    with pytest.raises(DataError, match="/dev/zero"):
        list_files("/dev/zero", SUFFIXES)


def test_the_survey_reports_each_of_these_as_a_problem(tmp_path: Path) -> None:
    put(tmp_path, "one/a.csv", "two/x.md", "three/a.jsonl")
    (tmp_path / "three/a.jsonl.gz").write_bytes(gzip.compress(b"{}\n"))
    config = DataConfig(sources=[SourceConfig(path=f"{tmp_path}/{name}") for name in ("one", "two", "three", "four")])
    problems = check_sources(config)
    assert [name in problem for name, problem in zip(("a.csv", "x.md", "a.jsonl.gz", "four"), problems, strict=True)]


def test_patterns_match_as_those_of_the_standard_library(tmp_path: Path) -> None:
    """In the same order, too, for it decides the order of the text."""
    rng = random.Random(5)
    parts = ["a", "b", "ab", "a.b", "a-b", "x1", "x2"]
    names = {"/".join([*rng.choices(parts, k=rng.randint(0, 3)), f"{rng.choice(parts)}.jsonl"]) for _ in range(60)}
    put(tmp_path, *names)
    for pattern in [
        "*.jsonl",
        "**/*.jsonl",
        "a/*.jsonl",
        "*/*.jsonl",
        "**/a/*.jsonl",
        "a/**/x[0-9].jsonl",
        "?/**/*.jsonl",
        "a*/**/*b.jsonl",
        "[!a]/*.jsonl",
        "**/a/**/*.jsonl",
        "x[12]/a.jsonl",
        "**",
    ]:
        matches = set(glob.glob(f"{tmp_path}/{pattern}", recursive=True))  # it doubles those of two `**`
        wanted = sorted(filter(os.path.isfile, matches))
        found = [file.path for file in list_files(f"{tmp_path}/{pattern}", SUFFIXES)] if wanted else []
        assert found == wanted, pattern
    assert [str(path) for path in sorted(tmp_path.rglob("*.jsonl"))] == [
        file.path for file in list_files(str(tmp_path), SUFFIXES)
    ]


def test_a_pattern_does_not_look_deeper_than_it_matches() -> None:
    assert [Pattern(text).depth for text in ("a/*.x", "a/*/b/*.x", "**/*.x")] == [1, 3, None]
    assert [Pattern(text).folder for text in ("a/*.x", "/a/b[1]/c", "*.x", "//a/*")] == ["a/", "/a/", "", "//a/"]
