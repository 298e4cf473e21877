"""Claims: a value per seed, read from finished runs, is compared with a threshold.

A claim is written in a sweep file as

    claim: Muon leaves more neurons without an update than Aurora   # the sentence being tested
    measure: telemetry/starved          # a key of metrics.jsonl
    step: 500                           # or "last", the default; or `at: equal_time` instead
    where: {optimizer: muon}            # the series; must name every axis except the seed axis ...
    minus: {optimizer: aurora}          # optional: subtract this series, other axes and seed equal
    over: {optimizer: aurora}           # instead of minus: divide by this series
    slope_over: expansion               # optional: ... and except this one: slope over log2 of its labels
    above: 0.05                         # or `below`
    source: where the claim comes from  # optional

This module does not import numpy, so that a sweep file can be checked quickly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pretrain.processes.errors import did_you_mean
from pretrain.report.errors import ReportError

_KEYS = ("claim", "measure", "step", "at", "where", "minus", "over", "slope_over", "above", "below", "source")
_RELATIONS: tuple[Literal["minus", "over"], ...] = ("minus", "over")
Labels = Mapping[str, str]


class ClaimError(ReportError):
    """A claim that cannot be evaluated as written; one line per problem."""


@dataclass(frozen=True)
class Claim:
    """A claim as written.

    Attributes:
        text: the sentence being tested.
        measure: a key of metrics.jsonl.
        step: the step at which it is read; None for each run's last step.
        equal_time: whether it is read at the training time of the faster of the paired runs, instead of at a step.
        where: the series, axis -> label.
        other: the labels that differ in the series it is compared with, axis -> label; None without a comparison.
        relation: whether to subtract the other series or divide by it; None without a comparison.
        slope_over: the axis over whose log2(label) the slope is taken; None for the value itself.
        side: the side of the threshold on which the values must lie.
        threshold: in the unit of the measure (for a slope, per doubling of the label).
        source: where the claim comes from; empty if not given.
    """

    text: str
    measure: str
    step: int | None
    equal_time: bool
    where: Labels
    other: Labels | None
    relation: Literal["minus", "over"] | None
    slope_over: str | None
    side: Literal["above", "below"]
    threshold: float
    source: str

    @property
    def reading(self) -> str:
        """What is measured, in words."""
        other = "" if self.other is None else f" {self.relation} {format_labels(self.other)}, paired by seed"
        slope = "" if self.slope_over is None else f", slope per doubling of {self.slope_over}"
        return f"{self.measure} {self._moment}: {format_labels(self.where) or 'all runs'}{other}{slope}"

    @property
    def is_timing(self) -> bool:
        """Whether its values depend on the speed of the runs."""
        return self.equal_time or self.measure.endswith(("seconds", "_per_second", "mfu"))

    @property
    def _moment(self) -> str:
        if self.equal_time:
            return "at equal training time"
        return "at the last step" if self.step is None else f"at step {self.step}"

    @property
    def criterion(self) -> str:
        """The threshold, in words."""
        return f"{self.side} {self.threshold:g}"


def format_labels(labels: Labels) -> str:
    """Format `{"optimizer": "muon", "expansion": "4"}` as "optimizer=muon, expansion=4"."""
    return ", ".join(f"{axis}={label}" for axis, label in labels.items())


def parse_claim(data: Any) -> Claim:
    """Parse a claim as written in a sweep file.

    Raises:
        ClaimError: one line per problem. `check_claim` checks whether the axes and labels exist.
    """
    if not isinstance(data, Mapping):
        raise ClaimError(f"a claim is {data!r}; expected a mapping with the keys claim, measure, where, above or below")
    text = data.get("claim")
    problems = [_unknown(key) for key in data if key not in _KEYS]
    problems += [
        f"{key} is {data.get(key)!r}; expected text" for key in ("claim", "measure") if not _text(data.get(key))
    ]
    problems += _problems_of_reading(data)
    problems += _problems_of_labels(data)
    sides = [key for key in ("above", "below") if data.get(key) is not None]
    if len(sides) != 1:
        problems.append(f"exactly one of above and below is needed, got {' and '.join(sides) or 'neither'}")
    problems += [f"{key} is {data[key]!r}; expected a finite number" for key in sides if not _number(data[key])]
    if problems:
        name = repr(text) if _text(text) else "a claim"
        raise ClaimError("\n".join(f"{name}: {problem}" for problem in problems))
    step = data.get("step", "last")
    relation: Literal["minus", "over"] | None = next((key for key in _RELATIONS if data.get(key) is not None), None)
    return Claim(
        text=data["claim"],
        measure=data["measure"],
        step=None if step == "last" else step,
        equal_time=data.get("at") is not None,
        where=_labels(data["where"]),
        other=None if relation is None else _labels(data[relation]),
        relation=relation,
        slope_over=data.get("slope_over"),
        side="above" if sides == ["above"] else "below",
        threshold=float(data[sides[0]]),
        source=data.get("source") or "",
    )


def claim_problems(data: Any, axes: Mapping[str, Sequence[str]], seed_axis: str | None) -> list[str]:
    """Return the problems of a claim as written in a sweep file, one line each; arguments as for `check_claim`."""
    try:
        check_claim(parse_claim(data), axes, seed_axis)
    except ClaimError as error:
        return str(error).splitlines()
    return []


def check_claim(claim: Claim, axes: Mapping[str, Sequence[str]], seed_axis: str | None) -> None:
    """Check a claim against the axes of its sweep.

    Args:
        claim: the claim.
        axes: axis -> labels, including the seed axis.
        seed_axis: name of the seed axis.

    Raises:
        ClaimError: an unknown axis or label, an axis without a label, or a slope over labels that are not positive
            numbers.
    """
    open_axes = {axis: list(labels) for axis, labels in axes.items() if axis != seed_axis}
    problems = []
    for key, labels in (("where", claim.where), (claim.relation or "", claim.other or {})):
        for axis, label in labels.items():
            if axis == claim.slope_over:
                problems.append(f"{key}.{axis} and slope_over name the same axis; leave it to slope_over")
            elif axis == seed_axis:
                problems.append(f"{key}.{axis}: a claim is about all seeds; leave the axis out")
            elif axis not in open_axes:
                problems.append(f"{key}.{axis}: no such axis{did_you_mean(axis, open_axes)}")
            elif label not in open_axes[axis]:
                problems.append(f"{key}.{axis} is {label!r}; expected one of {', '.join(open_axes[axis])}")
    left = [axis for axis in open_axes if axis not in claim.where and axis != claim.slope_over]
    problems += [f"where leaves the axis {axis} open; choose one of {', '.join(open_axes[axis])}" for axis in left]
    if claim.slope_over is not None:
        problems += _problems_of_slope(claim.slope_over, open_axes)
    if claim.other and not problems and all(claim.where[axis] == label for axis, label in claim.other.items()):
        problems.append(f"{claim.relation} is the same series as where")
    if problems:
        raise ClaimError("\n".join(f"{claim.text!r}: {problem}" for problem in problems))


def _problems_of_reading(data: Mapping[str, Any]) -> list[str]:
    """Return the problems of step, at, slope_over and source."""
    problems = []
    step, at = data.get("step"), data.get("at")
    if step is not None and step != "last" and not (isinstance(step, int) and not isinstance(step, bool) and step > 0):
        problems.append(f"step is {step!r}; expected a step such as 500, or last")
    if at is not None and at != "equal_time":
        problems.append(f"at is {at!r}; expected equal_time")
    if at is not None and step is not None:
        problems.append("step and at cannot be combined; remove one of them")
    compared = [key for key in _RELATIONS if data.get(key) is not None]
    if len(compared) > 1:
        problems.append("minus and over cannot be combined; remove one of them")
    if at is not None and not compared:
        problems.append("at: equal_time compares two runs; name the other series under minus or over")
    for key in ("slope_over", "source"):
        if data.get(key) is not None and not _text(data[key]):
            problems.append(f"{key} is {data[key]!r}; expected text")
    return problems


def _problems_of_labels(data: Mapping[str, Any]) -> list[str]:
    """Return the problems of where, minus and over."""
    problems = []
    for key in ("where", *_RELATIONS):
        labels = data.get(key)
        if labels is None and key in _RELATIONS:
            continue
        if not isinstance(labels, Mapping) or not all(
            _text(axis) and isinstance(label, str | int | float) for axis, label in labels.items()
        ):
            problems.append(f"{key} is {labels!r}; expected a mapping from axes to labels, such as {{optimizer: muon}}")
        elif key in _RELATIONS and not labels:
            problems.append(f"{key} is empty; name the axis in which the other series differs, or leave it out")
    return problems


def _problems_of_slope(axis: str, axes: Mapping[str, Sequence[str]]) -> list[str]:
    if axis not in axes:
        return [f"slope_over is {axis!r}: no such axis{did_you_mean(axis, axes)}"]
    problems = [
        f"slope_over: label {label!r} of {axis} is not a positive number"
        for label in axes[axis]
        if positive_number(label) is None
    ]
    if len(set(axes[axis])) < 2:
        problems.append(f"slope_over: {axis} has one label; a slope needs two")
    return problems


def positive_number(label: str) -> float | None:
    """Return a label as a positive finite number, or None if it is not one."""
    try:
        value = float(label)
    except ValueError:
        return None
    return value if 0 < value < math.inf else None


def _unknown(key: Any) -> str:
    return f"unknown key {key!r}{did_you_mean(str(key), _KEYS)}"


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _labels(data: Mapping[str, Any]) -> dict[str, str]:
    """Return the labels as text; YAML reads `expansion: 4` as a number."""
    return {axis: str(label) for axis, label in data.items()}
