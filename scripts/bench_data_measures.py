"""What the benchmarks of the data pipeline measure. Both sides of a ratio run alternately on the same machine."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bench_data_inputs import SUFFIXES, write_files
from tokenizers import Tokenizer

from pretrain.config.data import DataConfig, SourceConfig, TokenizerConfig
from pretrain.data import TokenStream, load_tokenizer, make_catalog, separator_id
from pretrain.data.formats import read_unit

_SPAWN = multiprocessing.get_context("spawn")
_PARTS = 8


@dataclass(frozen=True)
class Setting:
    """What all measurements have in common."""

    folder: Path
    """An empty folder for files."""
    tokenizer: TokenizerConfig
    sequence_length: int
    batch_sequences: int
    megabytes: float
    """Text of the throughput measurements."""
    large_megabytes: float
    """Text of the measurements of a resume and of memory."""
    rounds: int

    def config(self, path: Path, lanes: int = 16, workers: int = 0) -> DataConfig:
        """Return the data section for the files below a path."""
        source = SourceConfig(path=str(path))
        return DataConfig(sources=(source,), lanes=lanes, workers=workers, validation_fraction=0.0)

    def stream(self, config: DataConfig, **options: Any) -> TokenStream:
        """Open one epoch of the data."""
        return TokenStream(config, self.tokenizer, self.sequence_length, epochs=1, **options)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    number: int
    """In the list of the benchmarks."""
    what: str
    value: float
    unit: str
    target: str
    """Empty: reported only."""
    detail: str


def count_targets(stream: TokenStream, batch_sequences: int, limit: int | None = None) -> Iterator[int]:
    """Yield the targets of batch after batch, and close the stream in the end; at most `limit` batches."""
    try:
        while limit is None or limit > 0:
            yield stream.next_batch(batch_sequences).num_targets
            limit = None if limit is None else limit - 1
    except StopIteration:
        return
    finally:
        stream.close()


def alternate(sides: dict[str, Callable[[], Iterator[int]]], rounds: int, total: int) -> dict[str, list[float]]:
    """Run all sides in parts of about 1/8 of their work, alternating; return the seconds of each in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        running = {name: make() for name, make in sides.items()}
        spent = dict.fromkeys(sides, 0.0)
        while running:
            for name in list(running) if number % 2 == 0 else list(running)[::-1]:
                start, tokens = time.perf_counter(), 0
                for count in running[name]:
                    tokens += count
                    if tokens > total // _PARTS:
                        break
                else:
                    del running[name]
                spent[name] += time.perf_counter() - start
        for name, value in spent.items():
            seconds[name].append(value)
    return seconds


def ratios(above: list[float], below: list[float]) -> float:
    """The median of the ratios of the rounds."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def against_encoding(setting: Setting, files: Path) -> list[Row]:
    """1: one process, files to batches, compared with batch encoding of the texts in memory."""
    config, tokenizer = setting.config(files), load_tokenizer(setting.tokenizer)
    [units] = make_catalog(config).units(config)
    texts = [text for unit in units for _, text in read_unit(unit, 0, 1 << 20) if isinstance(text, str)]
    total = sum(encode_bare(tokenizer, texts))
    seconds = alternate(
        {
            "bare": lambda: encode_bare(tokenizer, texts),
            "pipeline": lambda: count_targets(setting.stream(config), setting.batch_sequences),
        },
        setting.rounds,
        total,
    )
    rate = total / statistics.median(seconds["pipeline"])
    value = ratios(seconds["bare"], seconds["pipeline"])
    return [Row(1, "one process, over raw batch encoding", value, "x", "at least 0.9", f"{rate:,.0f} tokens/s")]


def encode_bare(tokenizer: Tokenizer, texts: list[str]) -> Iterator[int]:
    """Encode the texts in 32 calls, turn them into int32 arrays; yield the number of tokens of each call."""
    for begin in range(0, len(texts), step := -(-len(texts) // 32)):
        encodings = tokenizer.encode_batch(texts[begin : begin + step], add_special_tokens=False)
        yield sum(len(array) for array in [np.array(encoding.ids, dtype=np.int32) for encoding in encodings])


def two_workers(setting: Setting, files: Path) -> list[Row]:
    """1: two workers, compared with two independent processes that read half of the files each."""
    paths = sorted(files.iterdir())
    halves = [files.parent / f"half-{side}" for side in (0, 1)]
    for side, half in enumerate(halves):
        half.mkdir(exist_ok=True)
        for path in paths[side::2]:
            os.link(path, half / path.name)
    apart, workers = [], []
    for _ in range(setting.rounds):
        workers.append(_timed(setting, [files], workers=2))
        apart.append(_timed(setting, halves, workers=0))
    value = ratios(apart, workers)
    detail = f"{statistics.median(workers):.2f} s and {statistics.median(apart):.2f} s"
    return [Row(1, "two workers, over two independent processes", value, "x", "at least 0.85", detail)]


def _timed(setting: Setting, folders: list[Path], workers: int) -> float:
    """Seconds from the moment when all processes have their first batch to the last batch of any."""
    barrier, ends = _SPAWN.Barrier(len(folders) + 1), _SPAWN.Array("d", len(folders))
    processes = [
        _SPAWN.Process(target=_read_all, args=(setting, folder, workers, barrier, ends, index))
        for index, folder in enumerate(folders)
    ]
    for process in processes:
        process.start()
    barrier.wait(timeout=600)
    start = time.monotonic()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a process of the benchmark failed")
    return max(ends) - start


def _read_all(setting: Setting, folder: Path, workers: int, barrier: Any, ends: Any, index: int) -> None:
    try:
        stream = setting.stream(setting.config(folder, lanes=8, workers=workers))
        stream.next_batch(setting.batch_sequences)
    except BaseException:
        barrier.abort()
        raise
    barrier.wait(timeout=600)
    for _ in count_targets(stream, setting.batch_sequences):
        pass
    ends[index] = time.monotonic()


def after_resume(setting: Setting) -> list[Row]:
    """4: the first batch after a resume at 95 % of the text, compared with one at 5 %."""
    rows = []
    for suffix in SUFFIXES:
        files = write_files(setting.folder / f"resume{suffix}", suffix, setting.large_megabytes, files=8)
        config = setting.config(files, lanes=8)
        catalog = make_catalog(config)
        states = _states(setting, config, (0.05, 0.95))
        seconds: dict[float, list[float]] = {place: [] for place in states}
        for _ in range(setting.rounds):
            for place, state in states.items():
                start = time.perf_counter()
                stream = setting.stream(config, state=state, catalog=catalog)
                stream.next_batch(setting.batch_sequences)
                seconds[place].append(time.perf_counter() - start)
                stream.close()
        value = ratios(seconds[0.95], seconds[0.05])
        late, early = (statistics.median(seconds[place]) for place in (0.95, 0.05))
        target = "at most 1.2" if suffix in (".parquet", ".jsonl") else ""
        what = f"first batch after a resume at 95 %, over 5 %: {suffix[1:]}"
        rows.append(Row(4, what, value, "x", target, f"{late:.2f} s and {early:.2f} s"))
    return rows


def _states(setting: Setting, config: DataConfig, places: tuple[float, ...]) -> dict[float, Any]:
    """The states of the stream at these shares of the text."""
    wanted, total = list(places), setting.large_megabytes * 1e6
    found: dict[float, Any] = {}
    stream = setting.stream(config)
    try:
        while wanted:
            stream.next_batch(setting.batch_sequences)
            state = stream.state()
            if state["text_bytes"] >= wanted[0] * total:
                found[wanted.pop(0)] = state
    finally:
        stream.close()
    return found


def against_datasets(setting: Setting) -> list[Row]:
    """5: compared with Hugging Face `datasets` streaming the same files, tokenizer and packing."""
    tokenizer = load_tokenizer(setting.tokenizer)
    eos_id = separator_id(tokenizer, setting.tokenizer)
    rows = []
    for suffix in (".parquet", ".jsonl"):
        files = write_files(setting.folder / f"datasets{suffix}", suffix, setting.megabytes, files=16)
        config = setting.config(files)
        total = sum(count_targets(setting.stream(config), setting.batch_sequences))

        def theirs(files: Path = files) -> Iterator[int]:
            return stream_datasets(setting, files, tokenizer, eos_id)

        def ours(config: DataConfig = config) -> Iterator[int]:
            return count_targets(setting.stream(config), setting.batch_sequences)

        seconds = alternate({"datasets": theirs, "ours": ours}, setting.rounds, total)
        value = ratios(seconds["datasets"], seconds["ours"])
        detail = ", ".join(f"{name} {total / statistics.median(of):,.0f} tokens/s" for name, of in seconds.items())
        rows.append(Row(5, f"over datasets streaming: {suffix[1:]}", value, "x", "above 1", detail))
    return rows


def stream_datasets(setting: Setting, files: Path, tokenizer: Tokenizer, eos_id: int) -> Iterator[int]:
    """Batches as ours from `datasets`: tokenized 1000 documents at a time, packed without gaps; yields targets."""
    import datasets

    datasets.disable_progress_bars()
    paths = sorted(map(str, files.iterdir()))
    kind = "parquet" if paths[0].endswith(".parquet") else "json"
    source = datasets.load_dataset(kind, data_files=paths, split="train", streaming=True)
    length, rows = setting.sequence_length, setting.batch_sequences
    tokens = np.full(1, eos_id, dtype=np.int32)
    for texts in source.batch(1000):
        encodings = tokenizer.encode_batch_fast(texts["text"], add_special_tokens=False)
        arrays = [np.array([*encoding.ids, eos_id], dtype=np.int32) for encoding in encodings]
        tokens = np.concatenate([tokens, *arrays])
        while len(tokens) > rows * length:
            batch = np.stack([tokens[row * length : (row + 1) * length + 1] for row in range(rows)])
            yield batch.size - rows
            tokens = tokens[rows * length :]
    if len(tokens) > 1:
        yield len(tokens) - 1


def memory(setting: Setting) -> list[Row]:
    """6: resident memory and open files of one process that reads all of the text with 128 lanes."""
    files = write_files(setting.folder / "memory", ".parquet", setting.large_megabytes, files=256)
    receiving, sending = _SPAWN.Pipe(duplex=False)
    process = _SPAWN.Process(target=_watch_memory, args=(setting, files, sending))
    process.start()
    sending.close()
    samples, most_files = receiving.recv()
    process.join()
    settled = samples[len(samples) // 5 :]  # buffers fill in the beginning
    growth = statistics.mean(settled[-len(settled) // 4 :]) / statistics.mean(settled[: max(1, len(settled) // 4)])
    detail = f"{setting.large_megabytes:,.0f} MB of text, 256 files"
    return [
        Row(6, "resident memory, last quarter over first", growth, "x", "0.95 to 1.05", detail),
        Row(6, "resident memory at 128 lanes, largest", max(samples) / 1e6, "MB", "under 2,000", detail),
        Row(6, "open files at 128 lanes, most", most_files, "files", "", detail),
    ]


def _watch_memory(setting: Setting, files: Path, sending: Any) -> None:
    stream = setting.stream(setting.config(files, lanes=128))
    samples, most_files, page = [], 0, os.sysconf("SC_PAGESIZE")
    for number, _ in enumerate(count_targets(stream, setting.batch_sequences)):
        if number % 8 == 0:
            samples.append(int(Path("/proc/self/statm").read_text().split()[1]) * page)
            most_files = max(most_files, len(os.listdir("/proc/self/fd")))
    sending.send((samples, most_files))
    sending.close()
