"""The spellings of the products of a polar factor, timed on this machine, from which `optimizers.polar` chooses.

    python scripts/bench_products.py [--device cuda] [--shapes 8192x2048,512x128x64] [--dtypes fp32,bf16] [--json FILE]

A product that is known to be symmetric can be computed in full, or in strips up to its diagonal, which saves up to 3/8
of the operations and costs smaller products and copies. X^T X of a tall X can be read from X or from a contiguous X^T.
In fp32 the inverse of A by a Cholesky factor is timed beside A A, whose place it may take.
All spellings of a product alternate in this process, in a new order each round. Ratios are taken within a round: above
1 where a spelling is slower than the full product by one call.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from optimizers.polar.precision import DTYPES, Products, Spelling, as_stated
from pretrain.files import replace_text
from pretrain.processes.exit_codes import DONE
from pretrain.run.manifest import environment

FULL = "full"
LEAST_SECONDS = 0.02
"""A timing repeats a call until it takes about this long."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    options = parse(arguments)
    device = torch.device(options.device)
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for dtype in options.dtypes:
        for shape in options.shapes:
            with torch.no_grad(), as_stated(device):
                rows += measure(shape, DTYPES[dtype], device, options.rounds)
    print(table(rows, device))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        replace_text(options.json, json.dumps({"environment": environment(), "rows": rows}, indent=1))
    return DONE


def measure(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Time all spellings for a stack of k matrices m x n.

    Args:
        shape: (m, n) or (m, n, k).
        dtype: of the products.
        device: where they run.
        rounds: over which medians are taken.
    """
    m, n, k = (*shape, 1)[:3]
    generator = torch.Generator().manual_seed(1)
    products = Products.on(device, dtype)
    X = products.round(torch.randn(k, m, n, generator=generator).to(device) / m**0.5)
    A = products.mm(X.mT, X)
    XT = X.mT.contiguous()
    out, spare = torch.empty_like(A), torch.empty_like(X)
    halves, quarters = (replace(products, spelling=Spelling(max(1, n // count))) for count in (2, 4))
    operations = {"A A": 2 * k * n**3, "X^T X": 2 * k * m * n * n, "X Q": 2 * k * m * n * n}
    ways: dict[str, dict[str, Callable[[], Any]]] = {
        "A A": {
            FULL: lambda: products.mm_add(A, A, A, out=out),
            "2 strips": lambda: halves.symmetric(A, A, c=A, out=out),
            "4 strips": lambda: quarters.symmetric(A, A, c=A, out=out),
        },
        "X^T X": {
            FULL: lambda: products.mm(X.mT, X, out=out),
            "4 strips": lambda: quarters.symmetric(X.mT, X, out=out),
            "X^T contiguous": lambda: products.mm(XT, XT.mT, out=out),
            "X^T contiguous, 4 strips": lambda: quarters.symmetric(XT, XT.mT, out=out),
            "X^T copied": lambda: products.mm(XT.copy_(X.mT), XT.mT, out=out),
        },
        "X Q": {
            FULL: lambda: products.mm_add(X, X, A, out=spare),
            "Q X^T": lambda: products.mm_add(XT, A, XT, out=spare.view_as(XT)),
        },
    }
    if dtype == torch.float32:
        B = A + torch.eye(n, device=device)
        ways["A A"]["A^-1 by Cholesky"] = lambda: torch.cholesky_inverse(
            torch.linalg.cholesky_ex(B, upper=True).L, upper=True
        )
    rows = []
    for product, spelled in ways.items():
        seconds = timed(spelled, device, rounds)
        for spelling, times in seconds.items():
            ratios = [time / full for time, full in zip(times, seconds[FULL], strict=True)]
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "shape": "x".join(map(str, shape)),
                    "product": product,
                    "spelling": spelling,
                    "ms": 1e3 * statistics.median(times),
                    "ratio": statistics.median(ratios),
                    "tflops": operations[product] / statistics.median(times) / 1e12,
                }
            )
    return rows


def timed(ways: dict[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of a call of each way, by round."""
    repeats = {name: max(1, round(LEAST_SECONDS / _seconds(call, device, 2))) for name, call in ways.items()}
    found: dict[str, list[float]] = {name: [] for name in ways}
    order = list(ways)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            found[name].append(_seconds(ways[name], device, repeats[name]))
    return found


def _seconds(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    call()
    _wait(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait(device)
    return (time.perf_counter() - started) / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def table(rows: Sequence[dict[str, Any]], device: torch.device) -> str:
    """The rows as text."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    lines = [f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"]
    lines.append(f"{'dtype':9} {'shape':14} {'product':7} {'spelling':25} {'ms':>9} {'x full':>7} {'TFLOP/s':>8}")
    for row in rows:
        lines.append(
            f"{row['dtype']:9} {row['shape']:14} {row['product']:7} {row['spelling']:25} {row['ms']:9.3f} "
            f"{row['ratio']:7.3f} {row['tflops']:8.2f}"
        )
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--shapes", type=_shapes, default="8192x2048,5632x2048,512x128x32", metavar="MxN[xK],...")
    parser.add_argument("--dtypes", type=_dtypes, default="fp32", metavar="NAME,...", help=", ".join(DTYPES))
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    return parser.parse_args(arguments)


def _shapes(text: str) -> list[tuple[int, ...]]:
    return [tuple(int(part) for part in shape.split("x")) for shape in text.split(",")]


def _dtypes(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in DTYPES]:
        raise argparse.ArgumentTypeError(f"unknown dtype {unknown[0]!r}")
    return names


if __name__ == "__main__":
    sys.exit(main())
