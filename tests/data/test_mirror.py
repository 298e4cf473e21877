"""Copies of remote files: a mirror, and the cache that the processes of a node share."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data import DataError, TokenStream, make_catalog
from pretrain.data.cache import DiskCache, open_file
from pretrain.data.catalog import resolve_sources
from pretrain.data.described import remote_file
from pretrain.data.lock import Lock, locked_sources
from pretrain.data.mirror import check_mirror, fetch, mirror_path, missing_files
from tests.data.corpus import drain, rows
from tests.data.store import COMMIT, LINES, PARQUET, Store, remote_config


def batches(data: DataConfig, tokenizer: TokenizerConfig, lock: Lock) -> list[Any]:
    catalog = make_catalog(data, locked_sources(lock, data, "lock"))
    stream = TokenStream(data, tokenizer, 7, epochs=1, catalog=catalog)
    try:
        return rows(drain(stream, 3))
    finally:
        stream.close()


def test_a_mirror_gives_the_same_stream_without_the_store(
    store: Store, tokenizer: TokenizerConfig, tmp_path: Path
) -> None:
    lock = resolve_sources(remote_config(PARQUET, LINES))
    expected = batches(remote_config(PARQUET, LINES), tokenizer, lock)
    copied: list[int] = []
    fetch(missing_files(lock.files, tmp_path / "mirror"), tmp_path / "mirror", copied.append)
    assert sum(copied) == sum(file.bytes for file in lock.files)
    store.remove()
    check_mirror(lock.files, tmp_path / "mirror")
    assert batches(remote_config(PARQUET, LINES, mirror=str(tmp_path / "mirror")), tokenizer, lock) == expected


def test_an_interrupted_copy_continues_where_it_stopped(store: Store, tmp_path: Path) -> None:
    [file, _] = resolve_sources(remote_config(LINES)).files
    target = mirror_path(tmp_path, file.path)
    contents = store.path(file.path).read_bytes()
    target.parent.mkdir(parents=True)
    target.with_name(target.name + ".part").write_bytes(contents[:100])
    store.read = 0
    fetch([file], tmp_path)
    assert target.read_bytes() == contents
    assert store.read == len(contents) - 100
    assert missing_files([file], tmp_path) == []
    assert [path.name for path in target.parent.iterdir()] == [target.name]


@pytest.mark.parametrize("part", [b"wrong", b"x" * 10**6])
def test_a_copy_that_is_not_the_locked_file_gets_no_name(store: Store, tmp_path: Path, part: bytes) -> None:
    [file, _] = resolve_sources(remote_config(LINES)).files
    target = mirror_path(tmp_path, file.path)
    target.parent.mkdir(parents=True)
    target.with_name(target.name + ".part").write_bytes(part)
    if len(part) < file.bytes:
        with pytest.raises(DataError, match=r"x\.jsonl\.zst: has sha256 .*, expected"):
            fetch([file], tmp_path)
        assert list(target.parent.iterdir()) == []
    fetch([file], tmp_path)
    assert target.read_bytes() == store.path(file.path).read_bytes()


def test_missing_files_of_a_mirror_are_counted_and_one_is_named(store: Store, tmp_path: Path) -> None:
    files = resolve_sources(remote_config(PARQUET)).files
    fetch(files, tmp_path)
    mirror_path(tmp_path, files[1].path).unlink()
    mirror_path(tmp_path, files[2].path).write_bytes(b"short")
    with pytest.raises(DataError, match=r"lacks 2 of 3 files.*1\.parquet.*aurora data fetch"):
        check_mirror(files, tmp_path)


def test_too_little_space_is_an_error_before_anything_is_copied(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = resolve_sources(remote_config(PARQUET)).files
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    store.opened.clear()
    with pytest.raises(DataError, match="bytes are needed, but only 10 are free"):
        fetch(files, tmp_path)
    assert not store.opened


@pytest.mark.parametrize("url", ["hf://datasets/a/../../../x.parquet", "https://host//x", "hf://a/./b"])
def test_no_url_leads_out_of_the_mirror(url: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be mirrored"):
        mirror_path(tmp_path, url)


def test_a_signature_stays_out_of_the_name_but_tells_files_apart(tmp_path: Path) -> None:
    one, two = (mirror_path(tmp_path, f"https://host/x.parquet?sig={key}") for key in ("secret", "other"))
    assert one != two
    assert "secret" not in str(one)
    assert one.name == "x.parquet"


def test_a_cache_reads_each_file_once_and_gives_the_same_stream(
    store: Store, tokenizer: TokenizerConfig, tmp_path: Path
) -> None:
    lock = resolve_sources(remote_config(PARQUET, LINES))
    expected = batches(remote_config(PARQUET, LINES), tokenizer, lock)
    data = remote_config(PARQUET, LINES, cache_dir=str(tmp_path / "cache"))
    for _ in range(2):
        store.opened.clear()
        assert batches(data, tokenizer, lock) == expected
    assert not store.opened  # the second time
    assert not list((tmp_path / "cache").glob("*.part"))


def test_the_files_that_were_not_read_for_the_longest_time_leave_the_cache(store: Store, tmp_path: Path) -> None:
    files = [remote_file(file) for file in resolve_sources(remote_config(PARQUET)).files]
    cache = DiskCache(str(tmp_path / "cache"), sum(file.bytes or 0 for file in files[:2]) + 10)

    def use(index: int) -> bool:
        """Whether the file had to be copied."""
        store.opened.clear()
        with cache.open(files[index]) as opened:
            assert opened.read() == store.path(files[index].path).read_bytes()
        for age, path in enumerate(sorted((tmp_path / "cache").iterdir(), key=lambda path: -path.stat().st_mtime_ns)):
            os.utime(path, ns=(10**18 - age, 10**18 - age))  # coarse clocks cannot tell them apart
        return bool(store.opened)

    assert [use(0), use(1), use(0), use(2), use(0), use(1)] == [True, True, False, True, False, True]
    held = [path.stat().st_size for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    assert sum(held) <= cache.limit_bytes


def test_processes_that_want_the_same_file_copy_it_once(store: Store, tmp_path: Path) -> None:
    file = remote_file(resolve_sources(remote_config(LINES)).files[0])
    cache = DiskCache(str(tmp_path), 1 << 30)
    store.opened.clear()
    read: list[bytes] = []

    def use() -> None:
        with cache.open(file) as opened:
            read.append(opened.read())

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read == [store.path(file.path).read_bytes()] * 6
    assert sum(store.opened.values()) == 1


def test_a_file_without_a_known_version_is_not_cached(tmp_path: Path) -> None:
    from pretrain.data.cache import CachedFile

    file = CachedFile(f"hf://datasets/a/b@{COMMIT}/x.jsonl", cache=DiskCache(str(tmp_path), 100))
    with pytest.raises(DataError, match="version are not known"), open_file(file):
        pass


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("hf://datasets/o/n@abc/data/a.parquet", "hf/datasets/o/n@abc/data/a.parquet"),
        ("HTTPS://host/a.parquet", "https/host/a.parquet"),
        ("HTTPS://host/.hidden/a.parquet", "https/host/.hidden/a.parquet"),
        ("s3://bucket/a b/ü..parquet", "s3/bucket/a b/ü..parquet"),
    ],
)
def test_a_file_lies_below_its_scheme_and_host(url: str, place: str, tmp_path: Path) -> None:
    assert mirror_path(tmp_path, url) == tmp_path / place
