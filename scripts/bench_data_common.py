"""What the measurements of `bench_data.py` have in common. Both sides of a ratio run alternately."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config.data import DataConfig, SourceConfig, TokenizerConfig
from pretrain.data import TokenStream


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
    lock_files: int
    """Files in the lock of the start-up measurement."""
    rounds: int
    others: str | None = None
    """A Python with mosaicml-streaming and litdata; None: they are left out."""

    def config(self, *paths: Path, lanes: int = 16, workers: int = 0, **options: Any) -> DataConfig:
        """Return the data section for the files below some paths."""
        sources = tuple(SourceConfig(path=str(path)) for path in paths)
        return DataConfig(sources=sources, lanes=lanes, workers=workers, validation_fraction=0.0, **options)

    def stream(self, config: DataConfig, **options: Any) -> TokenStream:
        """Open one epoch of the data."""
        return TokenStream(config, self.tokenizer, self.sequence_length, **{"epochs": 1, **options})


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    number: int
    """In the list of the benchmarks."""
    what: str
    value: float
    unit: str
    """`x` for a ratio."""
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


def alternate(sides: dict[str, Callable[[], Iterator[int]]], rounds: int) -> dict[str, list[float]]:
    """Run the sides one after the other, in an order that changes every round; return the seconds of each round.

    A side runs to its end before the next one begins. Were they to take turns in between, what one of them reads and
    tokenizes ahead would run in the time of the other. Constructing a stream, before its first batch, is not measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in list(sides) if number % 2 == 0 else list(sides)[::-1]:
            running = sides[name]()
            start = time.perf_counter()
            for _ in running:
                pass
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratios(above: list[float], below: list[float]) -> float:
    """The median of the ratios of the rounds."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))
