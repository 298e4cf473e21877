"""The values that were tried for the tuned keys of a series, and which of them were chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pretrain.report.claims import positive_number
from pretrain.report.schema import TunedRow
from pretrain.report.sweep import Job, Series, Sweep
from pretrain.run.reader import LOSS


@dataclass(frozen=True)
class Edge:
    """A chosen value at the edge of those tried, so that a better one may lie beyond it.

    Attributes:
        key: dotted key.
        value: the chosen value.
        side: whether it is the smallest or the largest.
    """

    key: str
    value: Any
    side: Literal["smallest", "largest"]


def tuned_rows(sweep: Sweep, series: Series) -> list[TunedRow]:
    """Return a row per combination of tuned values, sorted by value; empty if nothing was tuned."""
    groups: dict[str, list[Job]] = {}
    for job in sweep.jobs:
        if job.tuned and all(job.labels[axis] == label for axis, label in series.labels.items()):
            groups.setdefault(repr(sorted(job.tuned.items())), []).append(job)
    by_seed = {
        key: {job.labels.get(sweep.seed_axis or "", ""): job.run for job in jobs} for key, jobs in groups.items()
    }
    shared = set.intersection(*(set(runs) for runs in by_seed.values())) if by_seed else set()
    rows = []
    for key, jobs in groups.items():
        losses = {
            seed: run.read(LOSS).value if run.state == "done" else None for seed, run in sorted(by_seed[key].items())
        }
        common = [losses[seed] for seed in shared]
        known = [loss for loss in common if loss is not None]
        chosen = any(job.chosen for job in jobs)
        row: TunedRow = {
            "series": series.name,
            "tuned": jobs[0].tuned,
            "losses": losses,
            "mean": sum(known) / len(known) if known and len(known) == len(common) else None,
            "steps": ends([job.run.last_step for job in jobs if job.run.state == "done"]),
            "chosen": chosen,
            "alone": len(groups) == 1,
            "at_edge": _at_edge(jobs[0].tuned, [group[0].tuned for group in groups.values()]) if chosen else [],
            "state": ", ".join(sorted({job.run.state for job in jobs} - {"done"})) or "done",
        }
        rows.append(row)
    return sorted(rows, key=lambda row: [_order(value) for _, value in sorted(row["tuned"].items())])


def edges(sweep: Sweep, series: Series) -> Iterator[Edge]:
    """Yield the chosen values of a series that are the smallest or largest of those tried."""
    rows = tuned_rows(sweep, series)
    for row in rows:
        for key in row["at_edge"]:
            value = row["tuned"][key]
            smallest = all(_order(value) <= _order(other["tuned"][key]) for other in rows if key in other["tuned"])
            yield Edge(key, value, "smallest" if smallest else "largest")


def _at_edge(chosen: dict[str, Any], tried: Sequence[dict[str, Any]]) -> list[str]:
    """Return the keys whose chosen number is the smallest or largest of several that were tried."""
    found = []
    for key, value in chosen.items():
        values = sorted({_order(other[key]) for other in tried if key in other})
        if len(values) > 1 and _order(value) in (values[0], values[-1]) and positive_number(str(value)) is not None:
            found.append(key)
    return found


def ends(values: Sequence[int]) -> list[int]:
    """Return the smallest and largest value; empty if there are none."""
    return [min(values), max(values)] if values else []


def _order(value: Any) -> tuple[float, str]:
    return positive_number(str(value)) or 0.0, str(value)
