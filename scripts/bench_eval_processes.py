"""Measure what several processes gain in an evaluation: one evaluation by N processes against N independent parts.

    python scripts/bench_eval_processes.py MODEL --limit 400

The parts run at the same time, each with a share of the items as large as a process has. Both include loading; scores
are not kept. Prints the median times of the rounds, and how fast the shared evaluation is compared with the parts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Several processes in one evaluation, against independent parts.")
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face folder")
    parser.add_argument("--tasks", default="hellaswag", metavar="NAMES", help="tasks (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=400, metavar="N", help="items of each task (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds, alternating (default: %(default)s)")
    options = parser.parse_args()
    shared, parts = [], []
    for _ in range(options.rounds):
        shared.append(seconds(options, options.limit, ["--processes", str(options.processes)], 1))
        parts.append(seconds(options, options.limit // options.processes, [], options.processes))
    one, other = statistics.median(shared), statistics.median(parts)
    print(f"{options.processes} processes share {options.limit} items a task: {one:.1f} s")
    print(f"{options.processes} independent parts of {options.limit // options.processes}: {other:.1f} s")
    print(f"speed of the shared evaluation, independent parts being 1: {other / one:.2f}")
    return 0


def seconds(options: argparse.Namespace, limit: int, more: list[str], count: int) -> float:
    """Run `count` evaluations at the same time; return how long that takes."""
    threads = max(1, (os.cpu_count() or 1) // options.processes)
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "pretrain", "eval", options.model, "--tasks", options.tasks, "--no-cache"]
    command += ["--selection", "spread", "--limit", str(limit), *more]
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        processes = [
            subprocess.Popen([*command, "--out", str(Path(folder, str(index)))], env=environment, stdout=sys.stderr)
            for index in range(count)
        ]
        codes = [process.wait() for process in processes]
        if any(codes):
            raise SystemExit(f"an evaluation ended with exit code {max(codes)}")
        return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
