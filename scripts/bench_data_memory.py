"""Number 6: resident memory, open files, and the start with a lock of many files."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import statistics
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import zstandard
from bench_data_common import Row, Setting, count_targets
from bench_data_inputs import documents, write_files

from pretrain.config.data import DataConfig, SourceConfig
from pretrain.data import DocumentEncoder, survey
from pretrain.data.described import CatalogFile
from pretrain.data.estimate import AT_START, estimate_sources
from pretrain.data.lock import lock_of, locked_source, save_lock
from pretrain.data.mirror import mirror_path
from pretrain.run.data_lock import lock_of_run
from pretrain.run.folder import RunFolder

_SPAWN = multiprocessing.get_context("spawn")
_LANES = 128
_FILES = 2048  # so that lanes end their last file at about the same time, near the end
_PINNED = f"hf://datasets/org/name@{'a' * 40}/data/"


def memory(setting: Setting) -> Iterator[Row]:
    """6: memory and open files of a process that reads all of the text with 128 lanes; with 3 x 128; start-up."""
    folder = setting.folder / "memory"
    write_files(folder, ".parquet", setting.large_megabytes, files=_FILES)
    samples, peak, files = _in_a_process(_watch, setting, (folder,), None)
    settled = samples[len(samples) // 5 :]  # buffers fill in the beginning
    quarter = max(1, len(settled) // 4)
    growth = statistics.mean(settled[-quarter:]) / statistics.mean(settled[:quarter])
    detail = f"{setting.large_megabytes:,.0f} MB of text, {_FILES} files"
    yield Row(6, "resident memory, last quarter over first", growth, "x", "0.95 to 1.05", detail)
    yield Row(6, f"resident memory at {_LANES} lanes, largest", peak / 1e6, "MB", "under 2,000", detail)
    yield Row(6, f"open files at {_LANES} lanes, most", files, "files", f"at most {_LANES + 64}", detail)
    # The same files three times, as three sources.
    copies = tuple(setting.folder / name for name in ("web", "books", "code"))
    for copy in copies:
        copy.mkdir()
        for path in folder.iterdir():
            os.link(path, copy / path.name)
    _, peak, files = _in_a_process(_watch, setting, copies, int(setting.large_megabytes / 8 * 1e6))
    detail = f"three sources of {_FILES} files at 0.6 / 0.3 / 0.1, the first eighth of the text, {files} open files"
    yield Row(6, f"resident memory at 3 x {_LANES} lanes, largest", peak / 1e6, "MB", "", detail)
    for path in (folder, *copies):
        shutil.rmtree(path)
    yield _start(setting)


def _in_a_process(work: Any, *arguments: Any) -> Any:
    receiving, sending = _SPAWN.Pipe(duplex=False)
    process = _SPAWN.Process(target=_send, args=(sending, work, *arguments))
    process.start()
    sending.close()
    try:
        return receiving.recv()
    finally:
        process.join()


def _send(pipe: Any, work: Any, *arguments: Any) -> None:
    pipe.send(work(*arguments))
    pipe.close()


def _watch(setting: Setting, folders: tuple[Path, ...], text_bytes: int | None) -> tuple[list[int], int, int]:
    """Read up to so much text; return samples of resident bytes, the largest value, and the most open files."""
    mixture = dict(zip(("web", "books", "code"), (0.6, 0.3, 0.1), strict=True)) if len(folders) > 1 else None
    stream = setting.stream(setting.config(*folders, lanes=_LANES, mixture=mixture))
    samples, most_files, page = [], 0, os.sysconf("SC_PAGESIZE")
    for number, _ in enumerate(count_targets(stream, setting.batch_sequences)):
        if number % 8 == 0:
            samples.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)
            most_files = max(most_files, len(os.listdir("/proc/self/fd")))
            if text_bytes is not None and stream.text_bytes >= text_bytes:
                break
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return samples, int(status["VmHWM"].split()[0]) << 10, most_files


def _start(setting: Setting) -> Row:
    """6: what a run does with a lock before its first batch: the work of rank 0, then that of another rank."""
    folder = setting.folder / "locked"
    config = _locked_files(folder, setting.lock_files)
    found = [_in_a_process(_time_start, setting, config, folder) for _ in range(3)]
    shutil.rmtree(folder)
    seconds = [sum(phases.values()) for phases in found]
    typical = found[seconds.index(statistics.median(seconds))]
    detail = ", ".join(f"{name} {value:.2f}" for name, value in typical.items())
    what = f"start to the first batch of {_LANES} lanes, lock of {setting.lock_files:,} files in a mirror"
    return Row(6, what, statistics.median(seconds), "s", "under 5", f"{detail} s")


def _locked_files(folder: Path, count: int) -> DataConfig:
    """Write a lock, and a mirror that holds its files, each of one document."""
    texts = islice(documents(1), 64)
    blobs = [zstandard.compress(json.dumps({"text": text}).encode() + b"\n") for text in texts]
    files = []
    for number in range(count):
        path = f"{_PINNED}topic-{number % 200:03}/shard-{number:06}.jsonl.zst"
        place, data = mirror_path(folder / "mirror", path), blobs[number % 64]
        if number < 200:
            place.parent.mkdir(parents=True)
        place.write_bytes(data)
        files.append(CatalogFile(path, len(data), None, f"sha256:{number:064x} etag:{number:040x}"))
    source = f"{_PINNED}**/*.jsonl.zst"
    save_lock(lock_of([locked_source(source, source, files, "a" * 40, ["odc-by"])]), folder / "data.lock")
    return DataConfig(
        sources=[SourceConfig(path=source)],
        lanes=min(_LANES, count),
        lock=str(folder / "data.lock"),
        mirror=str(folder / "mirror"),
    )


def _time_start(setting: Setting, config: DataConfig, folder: Path) -> dict[str, float]:
    """Seconds of each phase."""
    phases: dict[str, float] = {}
    begin = time.perf_counter()

    def note(phase: str) -> None:
        nonlocal begin
        now = time.perf_counter()
        phases[phase], begin = now - begin, now

    locked = lock_of_run(config, RunFolder(folder / "run"), print)
    note("read lock, check mirror")
    encoder = DocumentEncoder.load(setting.tokenizer)
    catalog, problems = survey(config, locked, encoder)
    if problems:
        raise RuntimeError(problems[0])
    estimate_sources(config, catalog, encoder.tokenizer, AT_START)
    note("survey and estimate")
    catalog = pickle.loads(pickle.dumps(catalog))
    note("hand to other ranks")
    stream = setting.stream(config, catalog=catalog)
    note("open the stream")
    stream.next_batch(setting.batch_sequences)
    note("first batch")
    stream.close()
    return phases
