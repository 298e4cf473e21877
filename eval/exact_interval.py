"""Exact inference about a difference between two paired proportions, for few discordant items.

Of `items` independent items, `wins` are right only for the second model and `losses` only for the first. The counts are
trinomial with probabilities p (win) and q (loss), and the difference of the accuracies is p - q. A hypothesis about
the difference leaves p + q open. It is tested with Tango's score statistic (Tango 1998, Statistics in Medicine 17), and
the P value is the largest over p + q, which makes it exact (Chan and Zhang 1999, Biometrics 55). Only the p + q in a
confidence interval of level 1 - 1e-4 are searched, and 1e-4 is added (Berger and Boos 1994, JASA 89).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, xlogy
from scipy.stats import beta

Array = NDArray[np.float64]
_MISSED = 1e-4  # probability that p + q lies outside the range that is searched
_NUISANCE_POINTS = 25
_HALVINGS = 20


@lru_cache(maxsize=4096)
def exact_p_below(wins: int, losses: int, items: int, margin: float) -> float:
    """Return the P value of the hypothesis that the difference is `margin` or more; a small one speaks for less."""
    low, high = _discordant_range(wins, losses, items)
    low = max(low, abs(margin))
    if low > high:
        return _MISSED
    won, lost = np.meshgrid(
        _likely_counts(items, (low + margin) / 2, (high + margin) / 2),
        _likely_counts(items, (low - margin) / 2, (high - margin) / 2),
        indexing="ij",
    )
    possible = won + lost <= items
    won, lost = won[possible], lost[possible]
    observed = float(_score(np.array([wins]), np.array([losses]), items, margin)[0])
    extreme = _score(won, lost, items, margin) <= observed + 1e-9
    won, lost = won[extreme], lost[extreme]
    agreeing = items - won - lost
    log_ways = gammaln(items + 1) - gammaln(won + 1) - gammaln(lost + 1) - gammaln(agreeing + 1)
    discordant = np.linspace(low, high, _NUISANCE_POINTS)[:, None]
    log_probability = (
        log_ways
        + xlogy(won, np.maximum((discordant + margin) / 2, 0.0))
        + xlogy(lost, np.maximum((discordant - margin) / 2, 0.0))
        + xlogy(agreeing, np.maximum(1.0 - discordant, 0.0))
    )
    return min(1.0, float(np.exp(log_probability).sum(axis=1).max()) + _MISSED)


@lru_cache(maxsize=4096)
def exact_upper_bound(wins: int, losses: int, items: int, error: float) -> float:
    """Return the upper confidence bound of the difference, which is too low with probability `error` at most."""
    low, high = (wins - losses) / items, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if exact_p_below(wins, losses, items, middle) > error:
            low = middle
        else:
            high = middle
    return high


def _discordant_range(wins: int, losses: int, items: int) -> tuple[float, float]:
    """The Clopper-Pearson interval for p + q."""
    count = wins + losses
    low = float(beta.ppf(_MISSED / 2, count, items - count + 1)) if count else 0.0
    high = float(beta.ppf(1 - _MISSED / 2, count + 1, items - count)) if count < items else 1.0
    return low, high


def _likely_counts(items: int, low: float, high: float) -> Array:
    """All counts except those that have less than 1e-9 probability whatever the proportion between `low` and `high`."""
    least, most = (items * min(max(share, 0.0), 1.0) for share in (low, high))
    # The variance of a count is at most its mean, and at most the mean of the items not counted.
    spread = min(most, max(items - least, 0.0))
    first = math.floor(least - 6 * math.sqrt(min(least, spread)) - 10)
    last = math.ceil(most + 6 * math.sqrt(spread) + 10)
    return np.arange(max(first, 0), min(last, items) + 1, dtype=np.float64)


def _score(won: Array, lost: Array, items: int, difference: float) -> Array:
    """Tango's statistic: the distance of (won - lost) / items from `difference`, in standard errors under it."""
    b = -won - lost + (2 * items - won + lost) * difference
    c = -lost * difference * (1 - difference)
    q = (np.sqrt(np.maximum(b * b - 8 * items * c, 0.0)) - b) / (4 * items)
    variance = items * (2 * q + difference * (1 - difference))
    distance = won - lost - items * difference
    certain = variance <= 1e-12
    score = distance / np.sqrt(np.where(certain, 1.0, variance))
    score = np.where(certain, np.where(distance > 0, np.inf, -np.inf), score)
    return np.where(np.abs(distance) < 1e-9, 0.0, score)
