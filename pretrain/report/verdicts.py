"""Verdicts on the claims of a sweep, from its finished runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pretrain.report.claims import Claim, Labels, positive_number
from pretrain.report.judgement import Judgement, judge
from pretrain.report.statistics import log2_slope, mean_interval, value_at
from pretrain.report.sweep import Series, Sweep
from pretrain.report.tuning import edges
from pretrain.run.reader import Reading, Run

Points = dict[str, dict[str, Reading]]
"""Label of the axis over which a slope is taken (one empty label without a slope) -> seed -> what was read."""


@dataclass(frozen=True)
class Verdict:
    """A claim and its verdict.

    Attributes:
        claim: as written.
        numbers: seed -> its value; None if there is none.
        judgement: the verdict with its reasons, by the rules of `pretrain.report.judgement`.
        reservations: why the values decide nothing, whichever side they lie on.
        scale: parameters, tokens and steps at which it was measured.
    """

    claim: Claim
    numbers: dict[str, float | None]
    judgement: Judgement
    reservations: list[str]
    scale: str


def evaluate(sweep: Sweep) -> list[Verdict]:
    """Return a verdict for each claim of the sweep."""
    return [_verdict(sweep, claim) for claim in sweep.claims]


def _verdict(sweep: Sweep, claim: Claim) -> Verdict:
    points = _points(sweep, claim)
    readings = {seed: _reading(claim, {label: points[label][seed] for label in points}) for seed in sweep.seeds}
    numbers = {seed: reading.value for seed, reading in readings.items()}
    reservations = [*_by_construction(claim, points), *_at_edges(sweep, claim)]
    judgement = judge(
        claim.side,
        claim.threshold,
        numbers,
        missing=[f"seed {seed}: {reading.note}" for seed, reading in readings.items() if reading.value is None],
        broken=any(reading.broken for reading in readings.values()),
        reservations=reservations,
    )
    return Verdict(claim, numbers, judgement, reservations, _scale(sweep, claim))


def _wanted(sweep: Sweep, claim: Claim) -> dict[str, Labels]:
    """Return the labels of the claim's series, by label of the axis over which a slope is taken."""
    if claim.slope_over is None:
        return {"": claim.where}
    return {label: {**claim.where, claim.slope_over: label} for label in sweep.axes[claim.slope_over]}


def _points(sweep: Sweep, claim: Claim) -> Points:
    return {
        label: {seed: _compared(sweep, claim, wanted, seed) for seed in sweep.seeds}
        for label, wanted in _wanted(sweep, claim).items()
    }


def _reading(claim: Claim, points: Mapping[str, Reading]) -> Reading:
    """Return the claim's value for one seed: its only point, or the slope over all of them."""
    if claim.slope_over is None:
        return points[""]
    values = {label: point.value for label, point in points.items() if point.value is not None}
    if len(values) < len(points):
        return next(point for point in sorted(points.values(), key=lambda p: not p.broken) if point.value is None)
    return Reading(_slope(values))


def _slope(values: Mapping[str, float]) -> float:
    return log2_slope([positive_number(label) or 1.0 for label in values], list(values.values()))


def _by_construction(claim: Claim, points: Points) -> Iterator[str]:
    """Yield a reservation if both series have the same value for every seed, which no training decides.

    At expansion 1, for example, gate_proj and up_proj are square, and on square matrices Aurora is Muon.
    """
    if claim.other is None:
        return
    equal = 1.0 if claim.relation == "over" else 0.0
    constructed = [
        label
        for label, readings in points.items()
        if (known := {reading.value for reading in readings.values() if reading.value is not None}) == {equal} and known
    ]
    if not constructed:
        return
    same = "both series have the same value for every seed, which is true by construction or a limit of the measure"
    if claim.slope_over is None:
        yield same
        return
    rest = {label: readings for label, readings in points.items() if label not in constructed}
    yield f"at {claim.slope_over} {', '.join(constructed)} {same}{_slope_without(rest)}"


def _slope_without(rest: Points) -> str:
    """Say what the slope is without the points that are true by construction."""
    if len(rest) < 2:
        return ""
    by_seed = [
        {label: value for label, readings in rest.items() if (value := readings[seed].value) is not None}
        for seed in next(iter(rest.values()))
    ]
    found = mean_interval([_slope(values) for values in by_seed if len(values) == len(rest)])
    if found is None:
        return ""
    return f"; without it, the slope is {found.mean:.4f}" + (f" ± {found.half_width:.4f}" if found.half_width else "")


def _at_edges(sweep: Sweep, claim: Claim) -> Iterator[str]:
    """Yield a reservation for each tuned value that is the smallest or largest of those tried."""
    found: dict[str, Series] = {}
    for wanted in _wanted(sweep, claim).values():
        for labels in (wanted, {**wanted, **(claim.other or {})}):
            if series := sweep.find(labels):
                found[series.name] = series
    for series in found.values():
        for edge in edges(sweep, series):
            yield f"{edge.key} of {series.name}, {edge.value}, is the {edge.side} value tried"


def _compared(sweep: Sweep, claim: Claim, labels: Labels, seed: str) -> Reading:
    """Return the measure of one series, minus or divided by that of the other series if the claim compares two."""
    pair = [labels] if claim.other is None else [labels, {**labels, **claim.other}]
    runs = [_run(sweep, wanted, seed) for wanted in pair]
    for run in runs:
        if isinstance(run, Reading):
            return run
    found = [run for run in runs if isinstance(run, Run)]
    readings = _readings(claim, found)
    values = [reading.value for reading in readings if reading.value is not None]
    if len(values) < len(pair):
        return _lacking(found, readings)
    value = values[0]
    if claim.relation == "minus":
        value -= values[1]
    elif claim.relation == "over":
        if values[1] == 0:
            return Reading(None, f"{found[1].name} has {claim.measure} 0, so the ratio is undefined")
        value /= values[1]
    return Reading(value, step=readings[0].step, tokens=readings[0].tokens)


def _readings(claim: Claim, runs: list[Run]) -> list[Reading]:
    """Return the measure of each run; no values if it depends on timings and those of a run are not usable."""
    if claim.is_timing and any(run.disturbances for run in runs):
        return [
            Reading(None, " and ".join(f"has no usable timings: {why}" for why in run.disturbances)) for run in runs
        ]
    return _at_equal_time(claim, runs) if claim.equal_time else [run.read(claim.measure, claim.step) for run in runs]


def _lacking(runs: list[Run], readings: list[Reading]) -> Reading:
    """Say why a pair has no value; the reading is broken if a loss was not finite, since that counts."""
    notes = [f"{run.name} {r.note}" for run, r in zip(runs, readings, strict=True) if r.value is None and r.note]
    return Reading(None, ", ".join(notes), any(reading.broken for reading in readings))


def _run(sweep: Sweep, labels: Labels, seed: str) -> Run | Reading:
    """Return the finished run of a series and seed, or a reading that says why there is none."""
    series = sweep.find(labels)
    job = series.jobs.get(seed) if series else None
    if series is None or job is None:
        return Reading(None, f"{series.name if series else 'the series'} has no chosen run")
    return job.run if job.run.state == "done" else Reading(None, f"{series.name} is {job.run.state}")


def _at_equal_time(claim: Claim, runs: list[Run]) -> list[Reading]:
    """Return the measure of paired runs at the training time at which the first of them finished."""
    ends = [run.read("train_seconds") for run in runs]
    known = [end.value for end in ends if end.value is not None]
    if len(known) < len(ends):
        return ends
    readings = []
    for run in runs:
        last = run.read(claim.measure)
        value = None if last.broken else value_at(run.curve(claim.measure, "train_seconds"), min(known))
        note = last.note or f"has no {claim.measure} around {min(known):,.0f} s of training"
        readings.append(Reading(value, "" if value is not None else note, last.broken))
    return readings


def _scale(sweep: Sweep, claim: Claim) -> str:
    """Describe the parameters, tokens and steps of the runs that the claim's values come from."""
    wanted = _wanted(sweep, claim).values()
    runs = [run for w in wanted if (series := sweep.find(w)) for run in series.done.values()]
    parameters = [counts.inner for run in runs if (counts := run.parameters)]
    readings = [run.read(claim.measure, claim.step) for run in runs]
    tokens = [reading.tokens for reading in readings if reading.tokens is not None]
    steps = [reading.step for reading in readings if reading.step is not None]
    totals = [total for run in runs if (total := run.total_steps)]
    parts = [f"{span(parameters)} parameters without embeddings"] if parameters else []
    parts += [f"{span(tokens)} tokens"] if tokens and not claim.equal_time else []
    if steps and not claim.equal_time:
        parts.append(f"step {span(steps)}" + (f" of {span(totals)}" if totals else ""))
    if claim.equal_time and totals:
        parts.append(f"runs of {span(totals)} steps")
    return ", ".join(parts)


def span(values: list[int]) -> str:
    """Format the range of some counts: a single number, or "smallest to largest"."""
    low, high = short(min(values)), short(max(values))
    return low if low == high else f"{low} to {high}"


def short(value: float) -> str:
    """Format a count for reading: 512, 4.2M, 1.1B."""
    for size, letter in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:,.0f}"
