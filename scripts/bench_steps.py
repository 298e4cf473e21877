"""Whole optimizer steps over lists of matrices, beside torch.optim.Muon: the layers of a model, and many small ones.

    python scripts/bench_steps.py [--lists LIST,...] [--rounds N] [--json FILE]

A list is a number of equal matrices such as 1000x512x128, or a config with a number of layers such as
configs/aurora-1.1b.yaml:2. All layers of a model have the same matrices, so a few of them stand for all. Every
optimizer has its own momenta; weights and gradients are shared. The optimizers alternate in this process, in a new
order each round. Ratios are taken within a round, and medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bench_optimizers_inputs import Shape, gaussian, matrix_shapes
from bench_optimizers_measure import timed_rounds
from torch import Tensor
from torch.optim import Optimizer

from optimizers import Aurora
from pretrain.config import load_config
from pretrain.files import replace_text
from pretrain.processes.exit_codes import DONE
from pretrain.run.manifest import environment

LR = 1e-4
BASE = "torch.optim.Muon"
Maker = Callable[[list[Tensor]], Optimizer]


def _ours(**given: Any) -> Maker:
    return lambda weights: Aurora([{"params": weights, "kind": "matrix"}], lr=LR, **given)


OPTIMIZERS: dict[str, Maker] = {
    BASE: lambda weights: torch.optim.Muon(weights, lr=LR, weight_decay=0.0),
    "Muon": _ours(direction="muon"),
    "Muon, loose": _ours(direction="muon", polar_accuracy="loose"),
    "Aurora, K = 2": _ours(),
    "Aurora, carried": _ours(row_balance="carried"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    for name, shapes in options.lists.items():
        rows += measure(name, shapes, torch.device(options.device), options.rounds)
        print(table(rows[-len(OPTIMIZERS) :]), flush=True)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        replace_text(options.json, json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    return DONE


def measure(name: str, shapes: Counter[Shape], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Time a step of every optimizer over matrices of these shapes."""
    weights = [torch.zeros(shape, device=device).requires_grad_() for shape in shapes.elements()]
    for seed, weight in enumerate(weights):
        weight.grad = gaussian(*weight.shape, seed=seed)[0].to(device)
    optimizers = {each: make(weights) for each, make in OPTIMIZERS.items()}
    for optimizer in optimizers.values():
        optimizer.step()
    steps = {each: (lambda optimizer=optimizer: optimizer.step) for each, optimizer in optimizers.items()}
    took = timed_rounds(steps, device, rounds=rounds, at_least=rounds, budget=0.0)
    rows = []
    for each, times in took.items():
        ratios = [time / base for time, base in zip(times, took[BASE], strict=True)]
        rows.append(
            {
                "list": name,
                "matrices": sum(shapes.values()),
                "optimizer": each,
                "ms": 1e3 * statistics.median(times),
                "ratio": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "rounds": rounds,
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of one list as text."""
    lines = [f"{rows[0]['list']}: {rows[0]['matrices']} matrices, {rows[0]['rounds']} rounds"]
    for row in rows:
        extremes = f"({row['lowest']:.3f} to {row['highest']:.3f})"
        lines.append(f"  {row['optimizer']:18} {row['ms']:10.1f} ms  x {row['ratio']:.3f} {extremes}")
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "configs/aurora-1.1b.yaml:1,1000x512x128,1000x256x64"
    parser.add_argument("--lists", type=_lists, default=default, metavar="LIST,...", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), metavar="N")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    return parser.parse_args(arguments)


def _lists(text: str) -> dict[str, Counter[Shape]]:
    return {name: _shapes(name) for name in text.split(",")}


def _shapes(name: str) -> Counter[Shape]:
    path, colon, layers = name.rpartition(":")
    if colon and layers.isdecimal() and int(layers):
        config = load_config(path, [f"model.num_layers={layers}"])
        return matrix_shapes(config)
    parts = name.split("x")
    if len(parts) == 3 and all(part.isdecimal() and int(part) for part in parts):
        count, m, n = map(int, parts)
        return Counter({(m, n): count})
    raise argparse.ArgumentTypeError(f"{name!r}: expected COUNTxROWSxCOLUMNS or CONFIG:LAYERS")


if __name__ == "__main__":
    sys.exit(main())
