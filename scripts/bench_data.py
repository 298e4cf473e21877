#!/usr/bin/env python
"""Speed and memory of the data pipeline: the figures of docs/benchmarks/data.md.

    python scripts/bench_data.py [--only 1 4] [--megabytes 64] [--large-megabytes 1000] [--json build/data.json]
    python scripts/bench_data.py --table build/data.json docs/benchmarks/data.md

The numbers are those of the list below. Both sides of a ratio do the same work alternately, in this process and with
the same threads (RAYON_NUM_THREADS sets their number), so that other load on the machine affects both; a figure is the
median of the ratios of the rounds.

    1  one process, files to packed batches, over raw batch encoding; two workers over two independent processes
    4  the first batch after a resume at 95 % of the text, over one at 5 %
    5  over `datasets` of Hugging Face in streaming mode, with the same files, tokenizer and packing
    6  resident memory and open files over the whole text, with 128 lanes
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench_data_inputs import write_files
from bench_data_measures import Row, Setting, after_resume, against_datasets, against_encoding, memory, two_workers

from pretrain.config.data import TokenizerConfig

TOKENIZER = Path(__file__).parents[1] / "assets/tokenizer/tokenizer.json"
HEAD = """\
# Data pipeline

<!-- Written by `python scripts/bench_data.py --table`; do not edit. -->

`scripts/bench_data.py` on {cores} cores of {machine} with {threads} threads of the tokenizer; {megabytes:g} MB of text
for numbers 1 and 5, {large_megabytes:g} MB for 4 and 6; medians of {rounds} rounds.

| number | what | measured | target | absolute |
|---|---|---|---|---|
"""


def measure(setting: Setting, numbers: Sequence[int]) -> list[Row]:
    """Measure the numbers and print each row when it is known."""
    files = None
    if 1 in numbers:
        files = write_files(setting.folder / "text", ".parquet", setting.megabytes, files=16)
    measures: dict[int, list[Callable[[], list[Row]]]] = {
        1: [lambda: against_encoding(setting, files), lambda: two_workers(setting, files)] if files else [],
        4: [lambda: after_resume(setting)],
        5: [lambda: against_datasets(setting)],
        6: [lambda: memory(setting)],
    }
    rows: list[Row] = []
    for number in numbers:
        for one in measures[number]:
            for row in one():
                print("  ".join(_cells(asdict(row))), flush=True)
                rows.append(row)
    return rows


def _cells(row: dict[str, Any]) -> list[str]:
    value = f"{row['value']:.2f}" if row["unit"] == "x" else f"{row['value']:,.0f} {row['unit']}"
    return [str(row["number"]), row["what"], value, row["target"] or "-", row["detail"]]


def page(report: dict[str, Any]) -> str:
    """The Markdown page of a report."""
    return HEAD.format(**report) + "".join(f"| {' | '.join(_cells(row))} |\n" for row in report["rows"])


def main() -> None:
    """Measure, or write the table of an earlier measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", choices=(1, 4, 5, 6), default=[1, 4, 5, 6], metavar="NUMBER")
    parser.add_argument("--tokenizer", default=str(TOKENIZER), help="(default: the vendored one)")
    parser.add_argument("--sequence-length", type=int, default=512, help="(default: %(default)s)")
    parser.add_argument("--batch-sequences", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--megabytes", type=float, default=64, help="text for 1 and 5 (default: %(default)s)")
    parser.add_argument("--large-megabytes", type=float, default=1000, help="text for 4 and 6 (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the report there")
    parser.add_argument("--table", type=Path, nargs=2, metavar=("JSON", "PAGE"), help="only write the page of a report")
    args = parser.parse_args()
    if args.table:
        args.table[1].write_text(page(json.loads(args.table[0].read_text())), encoding="utf-8")
        return
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
        setting = Setting(
            folder=Path(folder),
            tokenizer=TokenizerConfig(path=args.tokenizer),
            sequence_length=args.sequence_length,
            batch_sequences=args.batch_sequences,
            megabytes=args.megabytes,
            large_megabytes=args.large_megabytes,
            rounds=args.rounds,
        )
        rows = measure(setting, sorted(set(args.only)))
    report = {
        "machine": platform.machine(),
        "cores": cores,
        "threads": int(os.environ.get("RAYON_NUM_THREADS") or cores),
        "megabytes": args.megabytes,
        "large_megabytes": args.large_megabytes,
        "rounds": args.rounds,
        "rows": [asdict(row) for row in rows],
    }
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
