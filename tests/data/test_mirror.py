"""Copies of remote files: a mirror, and the cache that the processes of a node share."""

import base64
import contextlib
import hashlib
import io
import multiprocessing
import os
import random
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data import DataError, TokenStream, make_catalog, mirror
from pretrain.data.cache import DiskCache, open_file
from pretrain.data.catalog import resolve_sources
from pretrain.data.described import CatalogFile, remote_file
from pretrain.data.lock import Lock, locked_sources
from pretrain.data.mirror import check_mirror, fetch, fetch_file, mirror_path, missing_files
from tests.data.corpus import drain, rows
from tests.data.store import COMMIT, LINES, PARQUET, Counting, Store, remote_config


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


def test_an_object_of_google_s_store_is_compared_with_its_md5(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    md5 = base64.b64encode(hashlib.md5(b"good").digest()).decode()
    file = CatalogFile("gs://bucket/a.jsonl", 4, None, f"etag:{md5}")
    target = tmp_path / "a.jsonl"
    monkeypatch.setattr(mirror, "open_bytes", lambda file: io.BytesIO(b"evil"))
    with pytest.raises(
        DataError, match=r"gs://bucket/a\.jsonl: has md5 \w+, expected 755f85c2723bb39381c7379a604160d8"
    ):
        fetch_file(file, target)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(mirror, "open_bytes", lambda file: io.BytesIO(b"good"))
    fetch_file(file, target)
    assert target.read_bytes() == b"good"


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


def held_by(folder: Path) -> int:
    """What the copies and parts of a cache take, in bytes."""
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix != ".lock")


def test_a_copy_in_progress_has_its_room(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one file is copied, another one that does not fit beside it is read from the store."""
    first, second = (remote_file(file) for file in resolve_sources(remote_config(PARQUET)).files[:2])
    folder = tmp_path / "cache"
    cache = DiskCache(str(folder), (first.bytes or 0) + (second.bytes or 0) - 1)
    copies: list[str] = []

    def fetch_file(file: Any, target: Path) -> None:
        copies.append(file.path)
        with cache.open(second) as other:
            assert other.read() == store.path(second.path).read_bytes()
        real(file, target)

    real = mirror.fetch_file
    monkeypatch.setattr("pretrain.data.cache.fetch_file", fetch_file)
    with cache.open(first) as opened:
        assert opened.read() == store.path(first.path).read_bytes()
    assert copies == [first.path]
    assert held_by(folder) == first.bytes


def test_what_a_dead_process_has_reserved_is_free(store: Store, tmp_path: Path) -> None:
    """Its part counts by its size, and goes when the room is needed."""
    first, second = (remote_file(file) for file in resolve_sources(remote_config(PARQUET)).files[:2])
    folder = tmp_path / "cache"
    cache = DiskCache(str(folder), max(first.bytes or 0, second.bytes or 0))

    def die(*_: object) -> None:
        raise OSError("no power")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.data.cache.fetch_file", die)
        with pytest.raises(DataError, match="no power"), cache.open(first):
            pass
    [lock] = (path for path in folder.glob("*.lock") if path.name != "room.lock")
    assert lock.read_text() == str(first.bytes)
    lock.with_suffix(".part").write_bytes(b"x" * 500)
    with cache.open(second):
        assert held_by(folder) == second.bytes
    assert not lock.with_suffix(".part").exists()


def test_a_file_that_is_open_stays_in_the_cache(store: Store, tmp_path: Path) -> None:
    files = [remote_file(file) for file in resolve_sources(remote_config(PARQUET)).files]
    folder = tmp_path / "cache"
    cache = DiskCache(str(folder), max(file.bytes or 0 for file in files))
    with cache.open(files[0]) as opened, cache.open(files[1]) as other:
        assert other.read() == store.path(files[1].path).read_bytes()
        assert held_by(folder) == files[0].bytes
        assert opened.read() == store.path(files[0].path).read_bytes()
    with cache.open(files[1]):
        assert held_by(folder) == files[1].bytes


def use_cache(folder: str, limit: int, hub: str, files: list[Any], seed: int, results: Any) -> None:
    """Open files at random, several at a time; with an odd seed, die in some copy."""
    patch = pytest.MonkeyPatch()
    store = Store(Path(hub), patch)
    draw = random.Random(seed)
    cache = DiskCache(folder, limit)

    def read(self: Counting, size: int = -1) -> bytes:
        time.sleep(0.002)
        if seed % 2 and draw.random() < 0.01:
            os.kill(os.getpid(), signal.SIGKILL)
        return self._file.read(min(size, 200) if size > 0 else size)

    patch.setattr(Counting, "read", read)
    for _ in range(40):
        with contextlib.ExitStack() as opened:
            for file in draw.sample(files, draw.choice((1, 1, 2, 3))):
                stream = opened.enter_context(cache.open(file))
                size = stream.seek(0, 2)
                stream.seek(0)
                found = b"".join(iter(lambda stream=stream: stream.read(1 << 20), b""))
                assert found == store.path(file.path).read_bytes(), size
    results.put(seed)


@pytest.mark.parametrize("processes", [3, pytest.param(8, marks=pytest.mark.long)])
def test_processes_never_pass_the_size_of_the_cache(store: Store, tmp_path: Path, processes: int) -> None:
    """Some of them die on the way."""
    files = [remote_file(file) for file in resolve_sources(remote_config(PARQUET, LINES)).files]
    sizes = sorted(file.bytes or 0 for file in files)
    folder, limit = tmp_path / "cache", sizes[-1] + sizes[-2]
    folder.mkdir()
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    arguments = [(str(folder), limit, str(store.folder), files, seed, results) for seed in range(processes)]
    started = [context.Process(target=use_cache, args=some) for some in arguments]
    for process in started:
        process.start()
    most = 0
    while any(process.is_alive() for process in started):
        with contextlib.suppress(FileNotFoundError):  # a part became a copy
            most = max(most, held_by(folder))
        time.sleep(0.001)
    assert {process.exitcode for process in started[::2]} == {0}
    assert {process.exitcode for process in started[1::2]} <= {0, -signal.SIGKILL}
    assert 0 < most <= limit
    with DiskCache(str(folder), limit).open(files[0]) as opened:  # nothing is reserved any more
        assert opened.read() == store.path(files[0].path).read_bytes()
        assert (files[0].bytes or 0) <= held_by(folder) <= limit


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
