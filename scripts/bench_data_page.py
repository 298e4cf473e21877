"""The page that `bench_data.py` writes."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

_HEAD = """\
# Data pipeline

<!-- Written by `python scripts/bench_data.py --page`; do not edit. -->

`scripts/bench_data.py` on {date}: {cores} cores of {machine}, {threads} threads of the tokenizer, {gib:.0f} GiB;
{versions}.
Medians of {rounds} rounds, in which both sides of a ratio run one after the other, in an order that changes.
Ratios above 1 favour this pipeline in numbers 1, 2 and 5.

The text is put together from paragraphs of the vendored books, in documents of the lengths of web pages (log-normal,
median 2,000 characters, mean about 3,700, at most 100,000): {megabytes:g} MB of it for numbers 1, 2 and 5,
{large_megabytes:g} MB for 4 and 6. Sequences have {sequence_length:,} tokens, and batches {batch_sequences} sequences,
where the table does not say otherwise. The tokenizer is `{tokenizer}`.

| | what | measured | target | absolute |
|---|---|---|---|---|
"""

_FOOT = """
1. Bare encoding calls `encode_batch_fast` on texts that are in memory already. The two processes read half of the files
   each; two workers feed one process.
2. The bare loop slices a memory map and stacks the same rows.
3. `scripts/bench_data_exchange.py`; see there.
4. Every lane stands at the beginning of a document at 95 % or 5 % of its text. Plain files of lines are read from the
   byte that the state holds; parquet skips row groups, but decodes its way through the one that it stands in, so the
   figure is that of row groups of the stated size; compressed lines are decompressed from their beginning.
5. `datasets` reads the same files, with the same tokenizer and packing, in two ways: with its own `map` and a tokenizer
   of transformers, as its documentation shows, and with the fastest call of `tokenizers`, by hand. mosaicml-streaming
   and litdata read the same tokens in their own formats, in order, in a Python of their own, and stack them into
   batches of the same shape. They neither count documents and bytes nor take turns among lanes.
6. Memory is that of a process without workers that reads all of the text. A start is what happens between the config
   and the first batch: the lock is read, the mirror checked, the sources surveyed and their epochs estimated, the
   catalog pickled and unpickled as for another rank, the order of an epoch computed, a batch read.
"""


def describe_machine() -> dict[str, Any]:
    """Return what the page says about the machine and the libraries."""
    cores = len(os.sched_getaffinity(0))
    names = (line.partition(":")[2].strip() for line in _read("/proc/cpuinfo") if line.startswith("model name"))
    memory = next((line.split()[1] for line in _read("/proc/meminfo") if line.startswith("MemTotal")), "0")
    libraries = ("tokenizers", "pyarrow", "torch", "datasets")
    return {
        "machine": next(names, platform.machine()),
        "cores": cores,
        "threads": int(os.environ.get("RAYON_NUM_THREADS") or cores),
        "gib": int(memory) / (1 << 20),
        "versions": ", ".join(
            [f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in libraries)]
        ),
    }


def _read(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def cells(row: dict[str, Any]) -> list[str]:
    """Return the columns of a row."""
    digits = 0 if row["value"] >= 100 or row["unit"] == "files" else 2
    value = f"{row['value']:,.{digits}f}" + ("" if row["unit"] == "x" else f" {row['unit']}")
    return [str(row["number"]), row["what"], value, row["target"] or "reported", row["detail"]]


def page(report: dict[str, Any]) -> str:
    """Return the Markdown page of a report."""
    rows = sorted(report["rows"], key=lambda row: row["number"])
    return _HEAD.format(**report) + "".join(f"| {' | '.join(cells(row))} |\n" for row in rows) + _FOOT
