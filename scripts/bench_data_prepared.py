"""Speed of prepared shards, compared with tokenizing the same text and with a bare loop over a memory map.

    python scripts/bench_data_prepared.py CONFIG [--lanes N] [--sequence-length T] [--rows B]

Prints tokens per second of three ways to the same global batches, in one process: text through `TokenStream`, prepared
shards through `TokenStream`, and a loop that slices a memory-mapped file and stacks the rows.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from pretrain.config import load_config
from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.data import TokenStream
from pretrain.data.prepared.prepare import prepare


@dataclass(frozen=True)
class Speeds:
    """Tokens per second; the median of the repetitions."""

    text: float
    prepared: float
    bare: float


def measure(
    data: DataConfig, tokenizer: TokenizerConfig, sequence_length: int, rows: int, repeats: int = 5, copies: int = 8
) -> Speeds:
    """Measure the three ways alternately.

    Args:
        data: sources of text, whose first batches are read.
        tokenizer: the tokenizer.
        sequence_length: T.
        rows: sequences in a batch.
        repeats: how often.
        copies: epochs of the prepared data in one repetition, which would be too short otherwise.
    """
    folder = Path(tempfile.mkdtemp(prefix="bench-data-"))
    try:
        done = prepare(data, tokenizer, folder / "prepared")
        sources = [{"path": str(one.folder)} for one in done]
        ready = DataConfig(**{**data.model_dump(), "sources": sources})
        files = [file for one in done for file in sorted(one.folder.glob("*.tokens"))]
        dtype = done[0].index.dtype
        found: dict[str, list[float]] = {"text": [], "prepared": [], "bare": []}
        for _ in range(repeats):
            found["text"].append(_speed(_batches(data, tokenizer, sequence_length, rows, 1)))
            found["prepared"].append(_speed(_batches(ready, tokenizer, sequence_length, rows, copies)))
            found["bare"].append(_speed(_bare(files, dtype, sequence_length, rows, copies)))
        return Speeds(**{name: float(np.median(speeds)) for name, speeds in found.items()})
    finally:
        shutil.rmtree(folder)


def _speed(batches: Iterator[torch.Tensor]) -> float:
    """Tokens per second, without the first batch, which opens files and loads the tokenizer."""
    next(batches)
    begin = time.perf_counter()
    tokens = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in batches)
    return tokens / (time.perf_counter() - begin)


def _batches(
    data: DataConfig, tokenizer: TokenizerConfig, sequence_length: int, rows: int, epochs: int
) -> Iterator[torch.Tensor]:
    stream = TokenStream(data, tokenizer, sequence_length, epochs=epochs)
    try:
        while True:
            yield stream.next_batch(rows).tokens
    except StopIteration:
        return
    finally:
        stream.close()


def _bare(files: list[Path], dtype: str, sequence_length: int, rows: int, epochs: int) -> Iterator[torch.Tensor]:
    """Slice memory maps and stack the rows, int32 [rows, T+1] as in the stream."""
    waiting = []
    for _ in range(epochs):
        for file in files:
            tokens = np.memmap(file, dtype, "r")
            for begin in range(0, len(tokens) - sequence_length - 1, sequence_length):
                waiting.append(torch.from_numpy(tokens[begin : begin + sequence_length + 1].astype(np.int32)))
                if len(waiting) == rows:
                    yield torch.stack(waiting)
                    waiting = []


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--lanes", type=int)
    parser.add_argument("--sequence-length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=256)
    options = parser.parse_args()
    config = load_config(options.config, [])
    data = config.data if options.lanes is None else config.data.model_copy(update={"lanes": options.lanes})
    torch.set_num_threads(1)
    speeds = measure(data, config.tokenizer, options.sequence_length, options.rows)
    for name in ("text", "prepared", "bare"):
        print(f"{name:9}{getattr(speeds, name) / 1e6:10.2f} M tokens/s")
    print(f"prepared / text: {speeds.prepared / speeds.text:.1f} (at least 50)")
    print(f"prepared / bare: {speeds.prepared / speeds.bare:.2f} (at least 0.8)")


if __name__ == "__main__":
    main()
