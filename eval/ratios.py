"""Ratios of two sums over documents, such as bits per byte, with their uncertainty."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm
from scipy.stats import t as student

from eval.paired import CONFIDENCE

FEWEST_DOCUMENTS = 10
"""That an interval needs."""
_REPLICATES = 10_000
_AT_A_TIME = 1 << 22  # drawn documents
_SEED = 0  # the same results give the same interval


def ratio_of_sums(parts: Sequence[float], sizes: Sequence[int]) -> tuple[float, float | None]:
    """Return sum(parts) / sum(sizes) with its standard error, the pairs being drawn independently.

    By linearisation (Cochran, "Sampling Techniques", 1977, section 6.4); None for a single pair.
    """
    count, size = len(parts), sum(sizes)
    ratio = math.fsum(parts) / size
    if count < 2:
        return ratio, None
    squares = math.fsum((part - ratio * own) ** 2 for part, own in zip(parts, sizes, strict=True))
    return ratio, math.sqrt(squares * count / (count - 1)) / size


def ratio_interval(changes: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    """Return the 95 % interval of sum(changes) / sum(sizes) by bootstrap over the pairs.

    Percentiles, widened for the number of pairs (Hesterberg 2015, The American Statistician 69). Where a few long
    documents hold much of the text it covers less than it says: 91 % of 600 simulations with 80 documents of lognormal
    length (sigma 1). Studentized resamples did no better.
    """
    count = len(changes)
    over, under = np.asarray(changes, dtype=np.float64), np.asarray(sizes, dtype=np.float64)
    generator = np.random.default_rng(_SEED)
    ratios: list[NDArray[np.float64]] = []
    rows = max(1, _AT_A_TIME // count)
    for start in range(0, _REPLICATES, rows):
        drawn = generator.integers(count, size=(min(rows, _REPLICATES - start), count), dtype=np.int32)
        ratios.append(over[drawn].sum(axis=1) / under[drawn].sum(axis=1))
    quantile = math.sqrt(count / (count - 1)) * float(student.ppf((1 + CONFIDENCE) / 2, count - 1))
    low, high = np.quantile(np.concatenate(ratios), [norm.cdf(-quantile), norm.cdf(quantile)])
    return float(low), float(high)
