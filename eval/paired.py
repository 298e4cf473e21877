"""Statistics of two models on the same items: what the items that only one of them gets right can show.

The difference is that of the mean outcomes, second model minus first. The unit is the source: items that were made from
one source (one video, one question) are not independent, so a source is drawn, or has its sign flipped, as a whole. An
item without a source is its own.

- Test of a difference: exact McNemar (binomial over the discordant items). With sources of several items, the signs of
  the sources' net wins are flipped instead; the exact distribution is computed, and it equals McNemar's if every source
  has one item.
- Interval: BCa bootstrap over sources (Efron 1987, JASA 82), widened for their number as Hesterberg (2015, The American
  Statistician 69) does for percentile intervals. With few discordant items the exact interval of `eval.exact_interval`.
- Equivalence: two one-sided tests (Schuirmann 1987) that invert that same interval.

All of this covers the choice of items. It says nothing about how much another training seed would change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binom, norm
from scipy.stats import t as student

from eval.exact_interval import exact_p_below, exact_upper_bound

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
CONFIDENCE = 0.95
ERROR = 0.05  # of a test
POWER = 0.8
_REPLICATES = 10_000
_SEED = 0  # the same results give the same interval
_FEW = 25  # with fewer discordant sources the bootstrap covers less than it says
_FEWEST_SOURCES = 10  # that a bootstrap over sources of several items needs


class PairedOutcomes:
    """The outcomes of two models on the same items.

    Args:
        first: outcome of each item with the first model, 0 or 1.
        second: the same with the second model.
        sources: name of each item's source; None if every item is its own.
    """

    def __init__(self, first: Sequence[int], second: Sequence[int], sources: Sequence[str] | None = None) -> None:
        change = np.asarray(second, dtype=np.int64) - np.asarray(first, dtype=np.int64)
        self.items = len(change)
        self.wins = int((change > 0).sum())
        self.losses = int((change < 0).sum())
        self.difference = (self.wins - self.losses) / self.items
        if sources is None:
            net, sizes = change, np.ones(self.items, dtype=np.int64)
        else:
            _, owners = np.unique(np.asarray(sources), return_inverse=True)
            net = np.bincount(owners, weights=change).round().astype(np.int64)
            sizes = np.bincount(owners)
        self.sources = len(net)
        # Sources with the same net wins and number of items are alike, so a resample only counts each kind.
        kinds, self._counts = np.unique(np.stack([net, sizes], axis=1), axis=0, return_counts=True)
        self._net: Integers = kinds[:, 0]
        self._sizes: Integers = kinds[:, 1]

    @property
    def clustered(self) -> bool:
        """Whether a source has several items."""
        return self.sources < self.items

    @property
    def is_exact(self) -> bool:
        """Whether few sources are discordant, so that interval and equivalence test are exact."""
        _, per_net = np.unique(np.repeat(self._net, self._counts), return_counts=True)
        unlike = self.sources - int(per_net.max())
        dense = self.clustered and self.sources >= _FEWEST_SOURCES and 2 * unlike >= self.sources
        return unlike < _FEW and not dense

    def mcnemar(self) -> tuple[float, float]:
        """Return the exact two-sided P value and the mid-P value of McNemar's test on items."""
        return _sign_flips(np.array([1]), np.array([self.wins + self.losses]), self.wins)

    def difference_test(self) -> tuple[float, float]:
        """Return the exact P value and the mid-P value of the hypothesis that the two models are interchangeable."""
        size = np.abs(self._net)
        counts = np.bincount(size, weights=self._counts).round().astype(np.int64)
        present = np.flatnonzero(counts[1:]) + 1
        return _sign_flips(present, counts[present], int((self._net * self._counts)[self._net > 0].sum()))

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Return the two-sided confidence interval of the difference."""
        error = (1 - confidence) / 2
        if self.is_exact:
            return -self._exact_upper(error, mirrored=True), self._exact_upper(error)
        quantile = self._widening * float(student.ppf(1 - error, self.sources - 1))
        places = [float(norm.cdf(self._shifted(z))) for z in (-quantile, quantile)]
        low, high = np.quantile(self._resampled, places)
        return float(low), float(high)

    def equivalence_p(self, margin: float) -> float:
        """Return the P value of the hypothesis that the difference is `margin` or more, in either direction."""
        return max(self._p_below(margin), self._p_above(-margin))

    def smallest_difference(self, error: float = ERROR, power: float = POWER) -> float:
        """Return the smallest difference that these items would show to be one, with the given power.

        z * SE with z = z(1 - error/2) + z(power) and the standard error under no difference, from the discordant
        items found; at least z^2 of the items (or their equivalent in sources) must differ. At most 1.
        """
        z = float(norm.ppf(1 - error / 2) + norm.ppf(power))
        squares = float((self._net**2 * self._counts).sum())
        return min(1.0, max(z * math.sqrt(squares), z * z * self._worst_design_effect) / self.items)

    @property
    def _worst_design_effect(self) -> float:
        """Items per independent item if all items of a source had the same outcome."""
        return float((self._sizes**2 * self._counts).sum()) / self.items

    def _rounded(self, wins: int, losses: int) -> tuple[int, int, int]:
        """Effective wins, losses and items (Korn and Graubard 1998), the wins rounded up and the losses down.

        The design effect is the worst one or, where flips keep to sources larger than most, that of the flips found.
        """
        size = np.abs(self._net)
        flips = float((size * self._counts).sum())
        found = float((size**2 * self._counts).sum()) / flips if flips else 0.0
        effect = max(self._worst_design_effect, found)
        items = max(1, math.floor(self.items / effect + 1e-9))
        won = min(items, math.ceil(wins / effect - 1e-9))
        return won, min(items - won, math.floor(losses / effect + 1e-9)), items

    def exact_share(self, error: float) -> tuple[float, float]:
        """Return bounds of the probability of a win, each of which is wrong with probability `error` at most."""
        most, _, items = self._rounded(self.wins, 0)
        # Items that are not won, rounded up as well.
        least = items - self._rounded(self.items - self.wins, 0)[0]
        low = float(beta.ppf(error, least, items - least + 1)) if least else 0.0
        return low, float(beta.ppf(1 - error, most + 1, items - most)) if most < items else 1.0

    def _exact_upper(self, error: float, mirrored: bool = False) -> float:
        wins, losses = (self.losses, self.wins) if mirrored else (self.wins, self.losses)
        return exact_upper_bound(*self._rounded(wins, losses), error)

    def _p_below(self, margin: float) -> float:
        if self.is_exact:
            return exact_p_below(*self._rounded(self.wins, self.losses), margin)
        return self._bootstrap_p(self._share_below(margin))

    def _p_above(self, margin: float) -> float:
        if self.is_exact:
            return exact_p_below(*self._rounded(self.losses, self.wins), -margin)
        return 1 - self._bootstrap_p(self._share_below(margin))

    @cached_property
    def _resampled(self) -> Array:
        """Differences of resamples of the sources, ascending."""
        generator = np.random.default_rng(_SEED)
        drawn = generator.multinomial(self.sources, self._counts / self.sources, size=_REPLICATES)
        return np.sort((drawn @ self._net) / (drawn @ self._sizes))

    def _share_below(self, value: float) -> float:
        """The share of resamples below `value`, those equal to it counted half; never 0 or 1."""
        left = np.searchsorted(self._resampled, value - 1e-12, side="left")
        right = np.searchsorted(self._resampled, value + 1e-12, side="right")
        return float(((left + right) / 2 + 0.5) / (_REPLICATES + 1))

    @property
    def _widening(self) -> float:
        return math.sqrt(self.sources / (self.sources - 1))

    @cached_property
    def _bias(self) -> float:
        return float(norm.ppf(self._share_below(self.difference)))

    @cached_property
    def _acceleration(self) -> float:
        residual = self._net - self.difference * self._sizes
        cubes, squares = (float((residual**power * self._counts).sum()) for power in (3, 2))
        return cubes / (6 * squares**1.5)

    def _shifted(self, z: float) -> float:
        """The place among the resamples, as a normal quantile, of the bound that lies `z` standard errors away."""
        moved = self._bias + z
        return self._bias + moved / (1 - self._acceleration * moved)

    def _bootstrap_p(self, share_below: float) -> float:
        """The error of the upper bound that has this share of the resamples below it: `_shifted` solved for z."""
        distance = float(norm.ppf(share_below)) - self._bias
        z = distance / (1 + self._acceleration * distance) - self._bias
        return float(student.sf(z / self._widening, self.sources - 1))


def _sign_flips(sizes: Integers, counts: Integers, positive: int) -> tuple[float, float]:
    """Return exact and mid P values, two-sided, of the sum of positive net wins if every sign were a coin toss.

    Args:
        sizes: absolute net wins, each once.
        counts: number of sources with each.
        positive: observed sum of the positive ones.
    """
    distribution = np.ones(1)
    for size, count in zip(sizes.tolist(), counts.tolist(), strict=True):
        tosses = np.zeros(size * count + 1)
        tosses[::size] = binom.pmf(np.arange(count + 1), count, 0.5)
        distribution = np.convolve(distribution, tosses)
    lower, upper = float(distribution[: positive + 1].sum()), float(distribution[positive:].sum())
    tail, here = min(lower, upper), float(distribution[positive])
    return min(1.0, 2 * tail), min(1.0, 2 * tail - here)


def score_interval(outcomes: Sequence[int], sources: Sequence[str] | None = None) -> tuple[float, float]:
    """Return the 95 % confidence interval of the mean outcome of one model.

    One score has the same interval wherever it is shown, and items of one source do not count as independent: the
    interval is that of the difference from a model that gets nothing right. Where that one would be exact, so is this:
    Clopper and Pearson's (1934, Biometrika 26) of the effective counts, since the other model never wins.

    Args:
        outcomes: of the items, 0 or 1; at least one.
        sources: name of each item's source; None if every item is its own.
    """
    paired = PairedOutcomes([0] * len(outcomes), outcomes, sources)
    if paired.is_exact:
        return paired.exact_share((1 - CONFIDENCE) / 2)
    low, high = paired.interval()
    return max(0.0, low), min(1.0, high)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return P values adjusted for their number (Holm 1979, Scandinavian Journal of Statistics 6)."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
