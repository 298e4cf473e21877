"""Statistics for the report: t intervals, slopes, interpolation, bands over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

Array = NDArray[np.float64]
Curve = tuple[Array, Array]
Band = tuple[Array, Array, Array, Array]
"""x, mean, lower and upper ends."""
CONFIDENCE = 0.95
_ROUNDING = 1e-9  # values whose range is below this share of the largest one differ by rounding only


@dataclass(frozen=True)
class Interval:
    """The mean of some values and the t interval around it.

    Attributes:
        mean: the mean.
        half_width: half-width of the 95 % interval; None with a single value.
        count: number of values.
        is_degenerate: whether there are several values and they agree up to rounding. The width of the interval is then
            no measure of certainty.
    """

    mean: float
    half_width: float | None
    count: int
    is_degenerate: bool = False

    @property
    def low(self) -> float:
        """Lower end; -inf with a single value."""
        return -math.inf if self.half_width is None else self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end; inf with a single value."""
        return math.inf if self.half_width is None else self.mean + self.half_width


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Return the mean and 95 % interval: mean ± t(0.975, n - 1) * s / sqrt(n), s the sample standard deviation.

    None without values; a single value has no half-width.
    """
    if not values:
        return None
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, None, count)
    half_width = _quantile(count) * float(np.std(values, ddof=1)) / math.sqrt(count)
    is_degenerate = max(values) - min(values) <= _ROUNDING * max(map(abs, values))
    return Interval(mean, half_width, count, is_degenerate)


def log2_slope(labels: Sequence[float], values: Sequence[float]) -> float:
    """Return the least-squares slope of `values` over log2(`labels`): the change per doubling."""
    x = np.log2(np.asarray(labels, dtype=np.float64))
    x -= x.mean()
    return float(x @ np.asarray(values, dtype=np.float64) / (x @ x))


def value_at(curve: Curve, where: float) -> float | None:
    """Interpolate linearly in a curve with ascending x; None outside its range."""
    x, y = curve
    if not len(x) or not x[0] <= where <= x[-1]:
        return None
    return float(np.interp(where, x, y))


def smoothed(curve: Curve, points: int) -> Curve:
    """Reduce a curve to at most `points` points, each the mean of x and y over a segment of equal length."""
    x, y = curve
    if len(x) <= points:
        return curve
    edges = np.linspace(0, len(x), points + 1).round().astype(int)
    widths = np.diff(edges)
    return np.add.reduceat(x, edges[:-1]) / widths, np.add.reduceat(y, edges[:-1]) / widths


def band(curves: Sequence[Curve], points: int) -> Band | None:
    """Return the mean, minimum and maximum of several curves over the x range that all of them cover.

    Returns:
        x, mean, minimum and maximum, at most `points` entries each; None if the curves' x ranges do not overlap.
    """
    found = _together([curve for curve in curves if len(curve[0])], points)
    if found is None:
        return None
    grid, rows = found
    return grid, rows.mean(axis=0), rows.min(axis=0), rows.max(axis=0)


def paired_band(pairs: Sequence[tuple[Curve, Curve]], points: int) -> Band | None:
    """Return the mean of the differences of paired curves, with its 95 % t interval at each point.

    Args:
        pairs: the curves whose difference is taken, first minus second; one pair per seed.
        points: maximum number of points.

    Returns:
        x, mean, and the ends of the interval, which equal the mean with a single pair; None if the x ranges do not
        overlap.
    """
    found = _together([curve for pair in pairs for curve in pair], points)
    if found is None:
        return None
    grid, rows = found
    differences = rows[0::2] - rows[1::2]
    mean, count = differences.mean(axis=0), len(differences)
    half_width = np.zeros_like(mean)
    if count > 1:
        half_width = _quantile(count) * differences.std(axis=0, ddof=1) / math.sqrt(count)
    return grid, mean, mean - half_width, mean + half_width


def _together(curves: Sequence[Curve], points: int) -> tuple[Array, Array] | None:
    """Return all curves over the x range that they share: x, at most `points` entries, and a row for each curve."""
    if not curves or not all(len(x) for x, _ in curves):
        return None
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    first = curves[0][0]
    grid = first[(first >= low) & (first <= high)]
    if not len(grid):
        return None
    if len(grid) > points:
        grid = np.linspace(low, high, points)
    return grid, np.stack([np.interp(grid, x, y) for x, y in curves])


def _quantile(count: int) -> float:
    """Return the half-width of the 95 % t interval over `count` values, in standard errors."""
    return float(student.ppf((1 + CONFIDENCE) / 2, count - 1))
