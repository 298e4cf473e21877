"""How long the commands and packages take to load: medians over alternating starts of new processes.

    python scripts/bench_startup.py [--rounds 7]

Each is also given as a ratio to a bare start of Python, which is what it cannot be faster than.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

STARTS = {
    "python": ["-c", "pass"],
    "aurora --help": ["-m", "pretrain", "--help"],
    "import pretrain": ["-c", "import pretrain"],
    "import torch": ["-c", "import torch"],
    "import optimizers": ["-c", "import optimizers"],
}


def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds of each start in every round; one round before the first is not counted."""
    found: dict[str, list[float]] = {name: [] for name in STARTS}
    for index in range(rounds + 1):
        for name, arguments in STARTS.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            if index:
                found[name].append(time.perf_counter() - started)
    return found


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="starts of each (default: %(default)s)")
    found = measure(parser.parse_args().rounds)
    bare = found["python"]
    print(f"{'start':<20}{'median s':>10}{'x python':>10}")
    for name, seconds in found.items():
        ratio = statistics.median(a / b for a, b in zip(seconds, bare, strict=True))
        print(f"{name:<20}{statistics.median(seconds):>10.3f}{ratio:>10.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
