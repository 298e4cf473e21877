"""Verdicts on the claims of a sweep, from its finished runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pretrain.report.claims import Claim, Labels, positive_number
from pretrain.report.statistics import Interval, log2_slope, mean_interval, value_at
from pretrain.report.sweep import Sweep
from pretrain.run.reader import Reading, Run

Outcome = Literal["holds", "does not hold", "not tested"]


@dataclass(frozen=True)
class Verdict:
    """A claim and its outcome.

    Attributes:
        claim: as written.
        numbers: seed -> its value; None if there is none.
        interval: mean and 95 % t interval of the values.
        outcome: "holds" only if every value and the whole interval lie on the right side of the threshold.
        note: whether the claim is undecided or contradicted, and which seeds are missing and why.
        scale: parameters, tokens and steps at which it was measured.
    """

    claim: Claim
    numbers: dict[str, float | None]
    interval: Interval | None
    outcome: Outcome
    note: str
    scale: str


def evaluate(sweep: Sweep) -> list[Verdict]:
    """Return a verdict for each claim of the sweep."""
    return [_verdict(sweep, claim) for claim in sweep.claims]


def _verdict(sweep: Sweep, claim: Claim) -> Verdict:
    readings = {seed: _number(sweep, claim, seed) for seed in sweep.seeds}
    values = [reading.value for reading in readings.values() if reading.value is not None]
    interval = mean_interval(values)
    broken = any(reading.broken for reading in readings.values())
    outcome, note = _decide(claim, values, interval, broken)
    missing = [f"seed {seed}: {reading.note}" for seed, reading in readings.items() if reading.value is None]
    if missing and outcome == "holds":
        note = "provisional: some seeds are missing"
    return Verdict(
        claim=claim,
        numbers={seed: reading.value for seed, reading in readings.items()},
        interval=interval,
        outcome=outcome,
        note="; ".join([note] * bool(note) + missing),
        scale=_scale(sweep, claim),
    )


def _decide(claim: Claim, values: list[float], interval: Interval | None, broken: bool) -> tuple[Outcome, str]:
    """Return the outcome, and a note that tells a contradicted claim from an undecided one."""
    if interval is None or len(values) < 2:
        return "not tested", "one seed gives no interval" if values else "no seed has a value"
    sign = 1 if claim.side == "above" else -1
    margins = [sign * (value - claim.threshold) for value in (*values, interval.low, interval.high)]
    if all(margin > 0 for margin in margins) and not broken:
        return "holds", ""
    if all(margin < 0 for margin in margins) and not broken:
        return "does not hold", "contradicted: every seed and the whole interval lie on the wrong side"
    if broken:
        return "does not hold", "undecided: a seed has no value because its loss was not finite"
    if all(margin > 0 for margin in margins[:-2]):
        return "does not hold", "undecided: every seed lies on the right side, but the interval crosses the threshold"
    return "does not hold", "undecided: the seeds or the interval lie on both sides"


def _number(sweep: Sweep, claim: Claim, seed: str) -> Reading:
    """Return the claim's value for one seed."""
    if claim.slope_over is None:
        return _compared(sweep, claim, claim.where, seed)
    labels = sweep.axes[claim.slope_over]
    points = [_compared(sweep, claim, {**claim.where, claim.slope_over: label}, seed) for label in labels]
    values = [point.value for point in points if point.value is not None]
    if len(values) < len(points):
        return next(point for point in sorted(points, key=lambda p: not p.broken) if point.value is None)
    return Reading(log2_slope([positive_number(label) or 1.0 for label in labels], values))


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
    labels = sweep.axes[claim.slope_over] if claim.slope_over else [None]
    wanted = [claim.where if label is None else {**claim.where, str(claim.slope_over): label} for label in labels]
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
