#!/usr/bin/env python
"""Speed and memory of the data pipeline: the figures of docs/benchmarks/data.md.

    python scripts/bench_data.py [--only 1 4] [--others PYTHON] [--json FILE] [--page docs/benchmarks/data.md]
    python scripts/bench_data.py --from FILE --page docs/benchmarks/data.md

    1  one process, files to packed batches, over raw batch encoding; two workers over two independent processes
    2  prepared shards, over tokenizing and over a bare loop
    3  the exchange of rows between ranks, by scripts/bench_data_exchange.py
    4  the first batch after a resume at 95 % of the text, over one at 5 %
    5  over `datasets` of Hugging Face in streaming mode; with --others, prepared shards over mosaicml-streaming and
       litdata (scripts/bench_data_others.py says how to install them)
    6  resident memory and open files over the whole text, with 128 lanes and 3 x 128; start with a lock of many files

Both sides of a ratio do the same work one after the other, in an order that changes every round, with the same threads
(RAYON_NUM_THREADS sets their number), so that other load on the machine affects both; a figure is the median of the
ratios of the rounds. --json keeps the rows of numbers that are not measured this time, so that a part can be repeated.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench_data_common import Row, Setting
from bench_data_memory import memory
from bench_data_page import cells, describe_machine, page
from bench_data_prepared import prepared
from bench_data_resume import after_resume
from bench_data_speed import against_datasets, tokenizing

from pretrain.config.data import TokenizerConfig

TOKENIZER = "assets/tokenizer/tokenizer.json"
_EXCHANGE = Path(__file__).with_name("bench_data_exchange.py")


def exchange(setting: Setting) -> Iterator[Row]:
    """3: the rows that the script of that number writes: a list of objects with the fields of `Row`."""
    path = setting.folder / "exchange.json"
    subprocess.run([sys.executable, str(_EXCHANGE), "--json", str(path)], check=True)
    for row in json.loads(path.read_text()):
        yield Row(**row)


MEASURES: dict[int, list[Callable[[Setting], Iterator[Row]]]] = {
    1: [tokenizing],
    2: [prepared],
    3: [exchange] if _EXCHANGE.exists() else [],
    4: [after_resume],
    5: [against_datasets],
    6: [memory],
}
"""`prepared` also yields rows of number 5."""


def measure(setting: Setting, number: int, begin: float) -> Iterator[Row]:
    """Measure a number; print each row when it is known, with the time since `begin`."""
    for one in MEASURES[number]:
        for row in one(setting):
            print(f"[{time.monotonic() - begin:4.0f} s]  " + "  ".join(cells(asdict(row))), flush=True)
            yield row


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = sorted(MEASURES)
    parser.add_argument("--only", type=int, nargs="+", choices=every, default=every, metavar="NUMBER")
    parser.add_argument("--others", metavar="PYTHON", help="a Python with mosaicml-streaming and litdata")
    parser.add_argument("--tokenizer", default=TOKENIZER, help="(default: %(default)s)")
    parser.add_argument("--sequence-length", type=int, default=2048, help="(default: %(default)s)")
    parser.add_argument("--batch-sequences", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--megabytes", type=float, default=16, help="text for 1, 2 and 5 (default: %(default)s)")
    parser.add_argument("--large-megabytes", type=float, default=1000, help="text for 4 and 6 (default: %(default)s)")
    parser.add_argument("--lock-files", type=int, default=100_000, help="files in the lock of 6 (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--folder", help="for temporary files, about 3 GB (default: that of the system)")
    parser.add_argument("--json", type=Path, help="write the report there, and keep rows of numbers that it holds")
    parser.add_argument("--page", type=Path, help="write the Markdown page there")
    parser.add_argument("--from", type=Path, dest="saved", metavar="JSON", help="measure nothing; use this report")
    return parser


def _report(args: argparse.Namespace) -> dict[str, Any]:
    numbers = sorted(set(args.only))
    kept: list[dict[str, Any]] = []
    if args.json and args.json.exists():
        kept = [row for row in json.loads(args.json.read_text())["rows"] if row["measured_with"] not in numbers]
    rows: list[dict[str, Any]] = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-data-", dir=args.folder) as folder:
        for number in numbers:
            setting = Setting(
                folder=Path(folder) / str(number),
                tokenizer=TokenizerConfig(path=args.tokenizer),
                sequence_length=args.sequence_length,
                batch_sequences=args.batch_sequences,
                megabytes=args.megabytes,
                large_megabytes=args.large_megabytes,
                lock_files=args.lock_files,
                rounds=args.rounds,
                others=args.others,
            )
            setting.folder.mkdir()
            rows += [{**asdict(row), "measured_with": number} for row in measure(setting, number, begin)]
    sizes = ("sequence_length", "batch_sequences", "megabytes", "large_megabytes", "rounds", "tokenizer")
    return {
        "date": datetime.now(UTC).strftime("%d %B %Y"),
        **describe_machine(),
        **{name: getattr(args, name) for name in sizes},
        "rows": [*kept, *rows],
    }


def main() -> None:
    """Measure, or write the page of an earlier measurement."""
    args = _parser().parse_args()
    report = json.loads(args.saved.read_text()) if args.saved else _report(args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if args.page:
        args.page.write_text(page(report), encoding="utf-8")


if __name__ == "__main__":
    main()
