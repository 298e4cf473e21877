"""What differs between the seeds of a sweep, and so what the intervals over seeds cover."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pretrain.report.judgement import LEAST_SEEDS
from pretrain.report.sweep import Sweep

_NAMES = {"run.seed": "the initialisation", "data.seed": "the order of the data"}
_OF_THE_RUN = ("run.name", "run.root")


def varied_keys(sweep: Sweep) -> list[str]:
    """Return the dotted config keys that have another value for each seed, in every series that has several runs."""
    found: list[set[str]] = []
    for series in sweep.series:
        configs = [dict(_flat(run.config)) for run in series.shown.values() if run.config]
        if len(configs) > 1:
            keys = {key for config in configs for key in config}
            found.append({key for key in keys if len({repr(config.get(key)) for config in configs}) == len(configs)})
    return sorted(set.intersection(*found) - set(_OF_THE_RUN)) if found else []


def intervals_cover(varied: Sequence[str]) -> str:
    """Say what intervals over seeds cover that differ in these keys; empty without any."""
    if not varied:
        return ""
    others = [key for key in varied if key not in _NAMES]
    covered = " and ".join([*(name for key, name in _NAMES.items() if key in varied), *others])
    if "data.seed" in varied:
        return f"Intervals over seeds cover {covered}."
    return (
        f"Intervals over seeds cover {covered} only: the runs of all seeds read the same data in the same order, and "
        "how much the results depend on it is not known."
    )


def seed_warnings(axes: Mapping[str, Mapping[str, Mapping[str, Any]]], seed_axis: str) -> list[str]:
    """Return what the claims of a sweep file cannot say because of its seeds, before anything has been run.

    Args:
        axes: axis -> label -> dotted key -> value.
        seed_axis: name of the axis whose labels are repetitions.
    """
    labels = axes.get(seed_axis, {})
    if len(labels) < LEAST_SEEDS:
        count = f"the axis {seed_axis} has {len(labels) or 'no'} label{'s' * (len(labels) != 1)}"
        return [f"every claim will be undecided: {count}, and a verdict needs at least {LEAST_SEEDS} seeds"]
    if any("run.seed" in changes for changes in labels.values()) and not all(
        "data.seed" in changes for changes in labels.values()
    ):
        return [f"intervals will cover the initialisation only: not every label of the axis {seed_axis} sets data.seed"]
    return []


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
