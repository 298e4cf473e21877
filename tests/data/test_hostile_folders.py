"""Folders that hold what no data set should: nothing hangs, and what is left out is named."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.config.data import DataConfig, SourceConfig
from pretrain.data import DataError, check_sources
from pretrain.data.formats import SUFFIXES
from pretrain.data.sources import list_files

LINE = '{"text": "good"}\n'


def problems(path: Path | str) -> list[str]:
    return check_sources(DataConfig(sources=[SourceConfig(path=str(path))], lanes=1, validation_fraction=0.0))


def a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(os.path.relpath(path))


SPECIAL: dict[str, Callable[[Path], object]] = {
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a pipe": os.mkfifo,
    "a socket": a_socket,
    "a device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("pattern", ["", "/*", "/**"])
def test_what_is_no_file_is_an_error_if_it_is_called_data_and_skipped_if_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str, pattern: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(LINE)
    SPECIAL[kind](tmp_path / "other")
    assert problems(f"{tmp_path}{pattern}") == []
    assert "skipped 1 files that are hidden or not data: other" in caplog.text
    SPECIAL[kind](tmp_path / "b.jsonl")
    [problem] = problems(f"{tmp_path}{pattern}")
    assert "b.jsonl" in problem


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_shard_of_tokens_that_is_no_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    SPECIAL[kind](tmp_path / "a.bin")
    [problem] = problems(tmp_path / "a.bin")
    assert "a.bin" in problem


def test_folders_full_of_links_to_one_another_end(tmp_path: Path) -> None:
    for one in range(9):
        (tmp_path / f"{one}").mkdir()
        (tmp_path / f"{one}" / "a.jsonl").write_text(LINE)
        for other in set(range(9)) - {one}:
            (tmp_path / f"{one}" / f"to-{other}").symlink_to(f"../{other}")
    [problem] = problems(tmp_path)
    assert "links lead into" in problem
    assert "more than 100 times" in problem


def test_any_depth_of_folders_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(1100):  # more than Python's limit of recursion
        os.mkdir("d")
        os.chdir("d")
    Path("a.jsonl").write_text(LINE)
    os.chdir(tmp_path)
    [file] = list_files(".", SUFFIXES)
    assert file.path.endswith("d/a.jsonl")
    os.remove(file.path)
    Path("here").touch()
    os.removedirs(os.path.dirname(file.path))  # shutil.rmtree, which pytest uses, is recursive


def test_a_folder_that_a_pattern_of_files_matches_is_not_left_out_in_silence(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.jsonl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part.jsonl").write_text(LINE)
    (tmp_path / "c.jsonl").write_text(LINE)
    [problem] = problems(f"{tmp_path}/*.*")
    assert "a.parquet/, b.jsonl/: is a folder, whose files the pattern does not match" in problem
    for pattern, count in (("", 3), ("/**/*.jsonl", 3), ("/c*", 1), ("/*.*/*", 2)):
        assert len(list_files(f"{tmp_path}{pattern}", SUFFIXES)) == count


def test_a_folder_that_cannot_be_entered_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text(LINE)
    (tmp_path / "closed").mkdir()
    real = os.stat

    def refuse(path: str, *rest: object, **options: object) -> os.stat_result:
        if str(path).rstrip("/").endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr("pretrain.data.sources.local.os.stat", refuse)
    with pytest.raises(DataError, match=r"closed/: the folder cannot be read: .*Permission denied"):
        list_files(str(tmp_path), SUFFIXES)


@pytest.mark.parametrize("path", ["x" * 5000, "a/" * 3000, "a\0b", "~/data", "$HOME/data", "\n"])
def test_a_path_that_cannot_be_is_no_such_file(path: str) -> None:
    [problem] = problems(path)
    assert "no such file or folder" in problem


@pytest.mark.parametrize("size", [0, 4, 11])
def test_the_beginning_of_a_parquet_file_is_refused_by_its_size(tmp_path: Path, size: int) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1" * 3)
    os.truncate(tmp_path / "a.parquet", size)
    [problem] = problems(tmp_path)
    assert f"a.parquet: cannot be read as parquet: has only {size} bytes" in problem
