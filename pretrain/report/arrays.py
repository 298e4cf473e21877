"""The telemetry arrays of a run: leverage histograms by layer, and how many dead neurons stay dead."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pretrain.report.errors import ReportError
from pretrain.report.statistics import Curve
from pretrain.run.reader import Run

DEAD = 0.1  # of the mean leverage
_REFERENCE_STEP = 500  # used if the config does not set telemetry.reference_step
LOG_BINS = np.linspace(-3.0, 1.0, 41)  # log10 of leverage; values outside are counted in the first or last bin
_LEVERAGE = re.compile(r"layers\.(\d+)\.(gate_proj|up_proj)\.leverage")


@dataclass(frozen=True)
class Histograms:
    """Leverage histograms of the gate_proj and up_proj rows of a layer, over time.

    Attributes:
        layer: index of the layer.
        steps: measured steps, in ascending order.
        shares: [steps, bins]; share of the rows in each bin of LOG_BINS.
    """

    layer: int
    steps: list[int]
    shares: NDArray[np.float64]


@dataclass(frozen=True)
class Survival:
    """What happened to the rows of all layers that were dead at the reference step.

    Attributes:
        reference: the reference step.
        count: number of rows dead at that step.
        still: share of these rows that are dead at each later measurement.
        throughout: share of these rows that have been dead at every measurement up to each one.
    """

    reference: int
    count: int
    still: Curve
    throughout: Curve


def histograms(run: Run) -> list[Histograms]:
    """Return the leverage histograms of every layer, in layer order; empty without telemetry arrays."""
    by_layer: dict[int, dict[int, list[NDArray[np.float64]]]] = {}
    for step, path in run.telemetry_files.items():
        for (layer, _), leverage in _leverages(path).items():
            by_layer.setdefault(layer, {}).setdefault(step, []).append(leverage)
    return [
        Histograms(layer, list(found), np.stack([_histogram(np.concatenate(rows)) for rows in found.values()]))
        for layer, found in sorted(by_layer.items())
    ]


def survival(run: Run) -> Survival | None:
    """Follow the rows that were dead at the reference step, or at the last measurement before it.

    None if there is no later measurement, or if no row was dead; `why_no_survival` says which.
    """
    found = _follow(run)
    return None if isinstance(found, str) else found


def why_no_survival(run: Run) -> str:
    """Return why `survival` has found nothing; empty if it has found something."""
    found = _follow(run)
    return found if isinstance(found, str) else ""


def _follow(run: Run) -> Survival | str:
    """Return what `survival` returns, or the reason for None."""
    if not run.telemetry_files:
        return "there are no telemetry arrays"
    wanted = run.section("telemetry").get("reference_step")
    limit: int = wanted if isinstance(wanted, int) else _REFERENCE_STEP
    before = [step for step in run.telemetry_files if step <= limit]
    if not before:
        return f"the first telemetry arrays, of step {min(run.telemetry_files):,}, are later than step {limit:,}"
    reference = before[-1]
    start = {key: rows < DEAD for key, rows in _leverages(run.telemetry_files[reference]).items()}
    throughout = {key: dead.copy() for key, dead in start.items()}
    count = sum(int(dead.sum()) for dead in start.values())
    if not start:
        return f"the telemetry arrays of step {reference:,} have no leverage of gate_proj and up_proj"
    if not count:
        return f"no row was dead at step {reference:,}"
    points = [(reference, 1.0, 1.0)]
    for step, path in run.telemetry_files.items():
        later = _leverages(path) if step > reference else {}
        if not start.keys() <= later.keys() or any(len(later[key]) != len(start[key]) for key in start):
            continue  # leverage is undefined for some matrix at this step
        still = sum(int((later[key] < DEAD)[dead].sum()) for key, dead in start.items())
        for key, dead in throughout.items():
            dead &= later[key] < DEAD
        points.append((step, still / count, sum(int(dead.sum()) for dead in throughout.values()) / count))
    if len(points) < 2:
        return f"no telemetry arrays with the leverage of all matrices are later than step {reference:,}"
    table = np.array(points, dtype=np.float64)
    return Survival(reference, count, (table[:, 0], table[:, 1]), (table[:, 0], table[:, 2]))


def _leverages(path: Path) -> dict[tuple[int, str], NDArray[np.float64]]:
    """Return (layer, matrix) -> leverage of its rows, without the matrices for which it is undefined."""
    found = {}
    try:
        with safe_open(str(path), framework="numpy") as file:
            for name in sorted(file.keys()):
                if match := _LEVERAGE.fullmatch(name):
                    rows = np.asarray(file.get_tensor(name), dtype=np.float64).ravel()
                    if len(rows) and np.isfinite(rows).all():
                        found[int(match[1]), match[2]] = rows
    except (OSError, SafetensorError) as error:
        raise ReportError(f"{path}: cannot be read: {error}; delete it to skip this measurement") from None
    return found


def _histogram(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    logs = np.log10(np.clip(rows, 10 ** LOG_BINS[0], 10 ** LOG_BINS[-1]))
    counts, _ = np.histogram(np.clip(logs, LOG_BINS[0], LOG_BINS[-1]), LOG_BINS)
    return counts / len(rows)
