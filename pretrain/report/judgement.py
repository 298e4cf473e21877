"""The rules by which the values of a claim become a verdict.

A claim *holds* if the values of all seeds and the whole 95 % interval lie on the right side of its threshold, and *does
not hold* if all of them lie on the wrong side. Otherwise it is *undecided*, and so it is if

- there are fewer than three seeds;
- the values of all seeds agree, which says nothing about their spread;
- a seed has no value because its loss was not finite;
- there is a reservation: a point that is true by construction, or a tuned value at the edge of those tried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pretrain.report.statistics import Interval, mean_interval

Outcome = Literal["holds", "does not hold", "undecided", "not tested"]
LEAST_SEEDS = 3
"""With two seeds, the t interval is 12.7 standard errors wide on each side, and they may agree by chance."""


@dataclass(frozen=True)
class Judgement:
    """A verdict and its reasons.

    Attributes:
        outcome: the verdict; "not tested" if no seed has a value.
        note: why a claim is undecided, contradicted or not tested; which seeds are missing, and why.
        interval: mean and 95 % t interval of the values.
    """

    outcome: Outcome
    note: str
    interval: Interval | None


def judge(
    side: Literal["above", "below"],
    threshold: float,
    values: Mapping[str, float | None],
    *,
    missing: Sequence[str] = (),
    broken: bool = False,
    reservations: Sequence[str] = (),
) -> Judgement:
    """Judge a claim.

    Args:
        side: the side of the threshold on which the values must lie.
        threshold: in the unit of the values.
        values: seed -> value; None if there is none.
        missing: why seeds have no value, one text per seed.
        broken: whether a seed has no value because its loss was not finite.
        reservations: why the values decide nothing, whichever side they lie on.
    """
    known = [value for value in values.values() if value is not None]
    interval = mean_interval(known)
    if interval is None:
        return Judgement("not tested", "; ".join(["no seed has a value", *missing]), None)
    sign = 1 if side == "above" else -1
    margins = [sign * (value - threshold) for value in known]
    ends = (
        [] if interval.half_width is None else [sign * (interval.low - threshold), sign * (interval.high - threshold)]
    )
    reasons = [*_doubts(interval, margins, ends, broken), *reservations]
    if reasons:
        return Judgement("undecided", "; ".join([*reasons, *missing]), interval)
    provisional = ["provisional: some seeds are missing"] if missing else []
    if margins[0] > 0:
        return Judgement("holds", "; ".join([*provisional, *missing]), interval)
    contradicted = "contradicted: every seed and the whole interval lie on the wrong side"
    return Judgement("does not hold", "; ".join([contradicted, *provisional, *missing]), interval)


def _doubts(interval: Interval, margins: Sequence[float], ends: Sequence[float], broken: bool) -> list[str]:
    """Return why the values alone decide nothing.

    Args:
        interval: of the values.
        margins: how far each value lies on the right side of the threshold.
        ends: the same for the ends of the interval; empty with a single value.
        broken: whether a seed has no value because its loss was not finite.
    """
    doubts = ["a seed has no value because its loss was not finite"] if broken else []
    if interval.count < LEAST_SEEDS:
        counted = "one seed gives no interval" if interval.count == 1 else f"only {interval.count} seeds"
        doubts.append(f"{counted}; a verdict needs at least {LEAST_SEEDS}")
    if interval.is_degenerate:
        doubts.append("all seeds have the same value, which says nothing about their spread")
    elif all(margin > 0 for margin in margins):
        if not all(end > 0 for end in ends):
            doubts.append("every seed lies on the right side, but the interval crosses the threshold")
    elif not all(margin < 0 for margin in (*margins, *ends)):
        doubts.append("the seeds or the interval lie on both sides")
    if interval.is_degenerate and margins[0] == 0:
        doubts.append("they lie on the threshold")
    return doubts
