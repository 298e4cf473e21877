#!/usr/bin/env python3
"""Measure how a run stops: from the signal to the complete checkpoint, and until its processes are gone.

    scripts/bench_stopping.py                                   the quickstart's model, one process
    scripts/bench_stopping.py --processes 2 --signal USR1 --repeat 5 train.micro_batch_sequences=8
    scripts/bench_stopping.py --config my.yaml checkpoint.keep_last=2

A run in a temporary folder takes some steps and saves once by itself, so that the time of a step and of a save are
known; then its launcher receives the signal in the middle of a step. The bound is two steps and one and a half saves,
and ten seconds more for the end of the process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
POLL_SECONDS = 0.005
STEPS_BEFORE = 8


def main() -> None:
    """Measure, and print each run and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(REPOSITORY / "configs/quickstart.yaml"))
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--signal", default="TERM", choices=["TERM", "INT", "HUP", "USR1"])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    options = parser.parse_intermixed_args()
    found = [measure(options) for _ in range(options.repeat)]
    for result in found:
        print(json.dumps(result))
    for key in found[0]:
        if key.endswith("seconds"):
            print(f"median {key}: {statistics.median(result[key] for result in found):.3f}")


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One run; seconds each."""
    with tempfile.TemporaryDirectory(prefix="aurora-bench-stopping-") as root:
        folder = Path(root) / "run"
        settings = [f"run.root={root}", "run.name=run", f"checkpoint.save_every_steps={STEPS_BEFORE // 2}"]
        command = [sys.executable, "-m", "pretrain", "train", options.config, *options.overrides, *settings]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
        with (Path(root) / "output").open("w") as output:
            process = subprocess.Popen(
                [*command, "--processes", str(options.processes)], stdout=output, stderr=output, env=environment
            )
            try:
                return _observe(process, folder, signal.Signals[f"SIG{options.signal}"])
            finally:
                process.kill()


def _observe(process: subprocess.Popen[bytes], folder: Path, number: signal.Signals) -> dict[str, Any]:
    while len(_records(folder)) < STEPS_BEFORE + 2:
        if process.poll() is not None:
            output = (folder.parent / "output").read_text()[-2000:]
            raise SystemExit(f"{output}\nthe run ended by itself with code {process.returncode}")
        time.sleep(POLL_SECONDS)
    earlier = set(_checkpoints(folder))
    steps = [record["step_seconds"] for record in _records(folder)[1:]]
    time.sleep(statistics.median(steps) / 2)
    asked = time.monotonic()
    process.send_signal(number)
    while not (new := set(_checkpoints(folder)) - earlier):
        time.sleep(POLL_SECONDS)
    saved = time.monotonic() - asked
    code = process.wait()
    gone = time.monotonic() - asked
    step = max(int(name.removeprefix("step-")) for name in new)
    return {
        "exit_code": code,
        "step": step,
        "step_seconds": round(statistics.median(steps), 3),
        "to_checkpoint_seconds": round(saved, 3),
        "checkpoint_to_end_seconds": round(gone - saved, 3),
    }


def _records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _checkpoints(folder: Path) -> list[str]:
    return [path.name for path in (folder / "checkpoints").glob("step-????????")]


if __name__ == "__main__":
    main()
