"""Numbers 2 and 5: prepared shards, compared with tokenizing, a bare loop over a memory map, and other libraries."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_data_common import Row, Setting, ratios
from bench_data_inputs import write_files
from bench_data_others import Others

from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data import TokenStream
from pretrain.data.prepared.prepare import Prepared, prepare

_LENGTH, _ROWS = 2048, 256
_COPIES = 8


@dataclass(frozen=True)
class Shape:
    """The batches that are read."""

    tokenizer: TokenizerConfig
    sequence_length: int
    rows: int


def prepared(setting: Setting) -> Iterator[Row]:
    """2 and a part of 5: in batches of 256 sequences of 2,048 tokens, fewer if there is little text."""
    text = write_files(setting.folder / "prepared-text", ".parquet", setting.megabytes, files=16)
    rows = max(1, min(_ROWS, int(setting.megabytes * 1e6 / 4 / _LENGTH / 8)))
    shape = Shape(setting.tokenizer, _LENGTH, rows)
    data = setting.config(text)
    [done] = prepare(data, setting.tokenizer, setting.folder / "prepared")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        seconds, others = measure(data, done, shape, setting.rounds, setting.others, setting.folder / "others")
    finally:
        torch.set_num_threads(before)
    shutil.rmtree(text)
    typical = {name: statistics.median(found) for name, found in seconds.items()}
    speeds = {name: f"{1 / found / 1e6:,.1f}M tokens/s" for name, found in typical.items()}
    detail = f"{speeds['prepared']}, batches of {rows} x {_LENGTH:,}"
    over = {name: ratios(found, seconds["prepared"]) for name, found in seconds.items()}
    yield Row(2, "prepared shards, over tokenizing", over["text"], "x", "at least 50", detail)
    yield Row(2, "prepared shards, over a bare loop", over["bare"], "x", "at least 0.8", f"the loop {speeds['bare']}")
    for name, version in others.items():
        yield Row(5, f"prepared shards, over {name} {version}", over[name], "x", "", f"{name} {speeds[name]}")


def measure(
    data: DataConfig, done: Prepared, shape: Shape, rounds: int, python: str | None, folder: Path
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Measure all ways to the batches alternately.

    Args:
        data: sources of text.
        done: the same, prepared.
        shape: the batches.
        rounds: how often.
        python: that of an environment with other libraries; None: they are left out.
        folder: for the data in their formats; must not exist.

    Returns:
        Seconds per token of each round, by name, and the versions of the other libraries by name.

    """
    ready = DataConfig(**{**data.model_dump(), "sources": [{"path": str(done.folder)}]})
    files = sorted(done.folder.glob("*.tokens"))
    ways: dict[str, Callable[[], float]] = {
        "text": lambda: _seconds(_batches(data, shape, 1)),
        "prepared": lambda: _seconds(_batches(ready, shape, _COPIES)),
        "bare": lambda: _seconds(_bare(files, done.index.dtype, shape, _COPIES)),
    }
    seconds: dict[str, list[float]] = {}
    with Others(python, folder, files, done.index.dtype, shape.sequence_length, shape.rows, _COPIES) as others:
        for name in others.versions:
            ways[name] = lambda name=name: others.seconds(name)
        for number in range(rounds):
            for name in list(ways) if number % 2 == 0 else list(ways)[::-1]:
                seconds.setdefault(name, []).append(ways[name]())
        return seconds, others.versions


def _seconds(batches: Iterator[torch.Tensor]) -> float:
    """Seconds per token, without the first batch, which opens files and loads the tokenizer."""
    next(batches)
    begin = time.perf_counter()
    tokens = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)
    return (time.perf_counter() - begin) / tokens


def _batches(data: DataConfig, shape: Shape, epochs: int) -> Iterator[torch.Tensor]:
    stream = TokenStream(data, shape.tokenizer, shape.sequence_length, epochs=epochs)
    try:
        while True:
            yield stream.next_batch(shape.rows).tokens
    except StopIteration:
        return
    finally:
        stream.close()


def _bare(files: list[Path], dtype: str, shape: Shape, epochs: int) -> Iterator[torch.Tensor]:
    """Slice memory maps and stack the rows, int32 [rows, T+1] as in the stream."""
    length, waiting = shape.sequence_length, list[Any]()
    for _ in range(epochs):
        for file in files:
            tokens = np.memmap(file, dtype, "r")
            for begin in range(0, len(tokens) - length - 1, length):
                waiting.append(torch.from_numpy(tokens[begin : begin + length + 1].astype(np.int32)))
                if len(waiting) == shape.rows:
                    yield torch.stack(waiting)
                    waiting = []
