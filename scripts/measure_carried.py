"""How even the rows of directions are on recorded momenta: muon, two polar calls (K = 2), and row scales carried.

    python scripts/measure_carried.py recorded/* --out carried.json

reads what scripts/record_momenta.py has written. For each matrix and step it finds the variation of the row norms of a
direction (deviation over mean). It prints, for each recording, medians and 99th percentiles over the matrices and steps
after step 20, for each phase of the schedule (warm-up, plateau, decay) and matrix; the first steps; the 20 steps after
a spike (one gradient times 30); and the 20 steps after the scales were lost. Directions by gram in fp32, whose error is
below 0.01 %.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from record_momenta import momenta, step_file
from safetensors import safe_open
from torch import Tensor

from optimizers.directions import aurora, aurora_carried, muon
from optimizers.directions.carried import moved, row_scale, step_of

SETTLED, SPIKE = 20, 30.0
POLAR: dict[str, Any] = {"polar": "gram", "polar_dtype": "fp32"}

Direction = Callable[[Tensor], Tensor]


class Carried:
    """A direction with carried scales; `power` is the share of the odds step."""

    def __init__(self, power: float, polished: bool = False) -> None:
        self.power, self.polished = power, polished
        self.log_scale: Tensor | None = None

    def __call__(self, u: Tensor) -> Tensor:
        """The direction of u."""
        log_scale = torch.zeros(len(u)) if self.log_scale is None else self.log_scale
        if self.polished:
            d, self.log_scale = aurora_carried(u, log_scale, row_balance="polished", **POLAR)
            return d
        d = muon(row_scale(log_scale) * u, **POLAR)
        self.log_scale = moved(log_scale, step_of(u, d), power=self.power)
        return d

    def lose(self) -> None:
        """Begin again."""
        self.log_scale = None


def variants() -> dict[str, Direction]:
    """Fresh directions by name."""
    return {
        "muon": lambda u: muon(u, **POLAR),
        "K = 2": lambda u: aurora(u, **POLAR),
        "carried": Carried(1.0),
        "carried, half a step": Carried(0.5),
        "polished": Carried(1.0, polished=True),
    }


def variation(d: Tensor) -> float:
    """Deviation over mean of the row norms."""
    norms = d.norm(dim=1)
    return float(norms.std(correction=0) / norms.mean())


def off_orthogonal(d: Tensor) -> float:
    """The largest distance of a singular value from 1."""
    return float((torch.linalg.svdvals(d.double()) - 1).abs().max())


def phases(rates: list[float]) -> list[str]:
    """The phase of each step: the rate rises, has its peak, or falls."""
    peak = max(rates)
    top = [step for step, rate in enumerate(rates) if rate == peak]
    return ["warm-up" if i < top[0] else "decay" if i > top[-1] else "plateau" for i in range(len(rates))]


def series(folder: Path, name: str, spike: int | None, lost: int | None) -> dict[str, list[float]]:
    """The variation in each step by variant."""
    found: dict[str, list[float]] = defaultdict(list)
    chosen = variants()
    us = momenta(folder, name, spike=None if spike is None else (spike, SPIKE))
    last = None if spike is None and lost is None else (spike or lost or 0) + SETTLED
    for step, u in enumerate(us, start=1):
        if last is not None and step > last:
            break
        for key, direction in chosen.items():
            if step == lost and isinstance(direction, Carried):
                direction.lose()
            found[key].append(variation(direction(u)))
    return found


def quantiles(values: list[float]) -> dict[str, float]:
    """Median and 99th percentile in per cent, and their number."""
    x = torch.tensor(values, dtype=torch.float64)
    return {"median": 100 * float(x.quantile(0.5)), "p99": 100 * float(x.quantile(0.99)), "n": len(values)}


def measured(folder: Path) -> dict[str, Any]:
    """Everything about one recording."""
    about = json.loads((folder / "recording.json").read_text())
    with safe_open(step_file(folder, 1), "pt") as first:
        names = sorted(first.keys())
        shapes = {name: list(first.get_slice(name).get_shape()) for name in names}
    middle, by_phase = len(about["lr"]) // 2, phases(about["lr"])
    found: dict[str, Any] = {**{key: about[key] for key in ("config", "overrides")}, "shapes": shapes}
    plain = {name: series(folder, name, None, None) for name in names}

    def over(wanted: Callable[[str, int], bool]) -> dict[str, dict[str, float]]:
        table = {}
        for key in variants():
            chosen = [x for name in names for i, x in enumerate(plain[name][key]) if wanted(name, i)]
            if chosen:
                table[key] = quantiles(chosen)
        return table

    found["settled"] = over(lambda _, i: i >= SETTLED)
    found["phases"] = {p: over(lambda _, i, p=p: i >= SETTLED and by_phase[i] == p) for p in dict.fromkeys(by_phase)}
    found["matrices"] = {n: over(lambda other, i, n=n: i >= SETTLED and other == n) for n in names}
    found["start"] = [over(lambda _, i, step=step: i == step) for step in range(10)]
    spiked = [series(folder, name, middle, None) for name in names]
    restarted = [series(folder, name, None, middle) for name in names]
    for key, given in (("spike", spiked), ("restart", restarted)):
        found[key] = {
            variant: [quantiles([one[variant][step - 1] for one in given])["median"] for step in window(middle)]
            for variant in variants()
        }
    found["off_orthogonal"] = _orthogonality(folder, names[0], middle)
    return found


def window(step: int) -> Iterator[int]:
    """The step of an event and the 20 after it."""
    return iter(range(step, step + SETTLED + 1))


def _orthogonality(folder: Path, name: str, steps: int) -> dict[str, float]:
    chosen, worst = variants(), dict.fromkeys(variants(), 0.0)
    for step, u in enumerate(momenta(folder, name), start=1):
        if step > steps:
            break
        for key, direction in chosen.items():
            d = direction(u)
            worst[key] = max(worst[key], off_orthogonal(d)) if step > SETTLED else 0.0
    return worst


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recordings", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a JSON file with all numbers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {folder.name: measured(folder) for folder in options.recordings}
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    for folder, one in found.items():
        print(folder, " ".join(one["overrides"]))
        for key, q in one["settled"].items():
            print(f"  {key:22} median {q['median']:6.2f} %  99th {q['p99']:6.2f} %  ({q['n']} momenta)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
