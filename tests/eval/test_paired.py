"""The statistics of paired comparisons: coverage, error rates and exactness, by enumeration and by simulation."""

import itertools
import math
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binom, multinomial, norm

from eval.exact_interval import exact_p_below, exact_upper_bound
from eval.paired import PairedOutcomes, holm

Array = NDArray[np.float64]


def paired(wins: int, losses: int, items: int) -> PairedOutcomes:
    first = [0] * wins + [1] * losses + [0] * (items - wins - losses)
    second = [1] * wins + [0] * losses + [0] * (items - wins - losses)
    return PairedOutcomes(first, second)


@cache
def verdicts(wins: int, losses: int, items: int, margin: float) -> tuple[float, float, float]:
    """Interval and P value of equivalence."""
    found = paired(wins, losses, items)
    return (*found.interval(), found.equivalence_p(margin) if margin else 1.0)


def rates(items: int, accuracy: float, difference: float, correlation: float, seed: int, count: int = 1000) -> Array:
    """Return how often the interval covers, and the test of equivalence at the true difference errs.

    `correlation` is that of a model's outcomes with those of a model of the same accuracy.
    """
    both = accuracy * (1 - accuracy) * (1 - correlation)
    won, lost = both + max(difference, 0), both + max(-difference, 0)
    drawn = np.random.default_rng(seed).multinomial(items, [won, lost, 1 - won - lost], size=count)
    rows = [verdicts(int(w), int(x), items, abs(difference)) for w, x, _ in drawn]
    covered = [low - 1e-9 <= difference <= high + 1e-9 for low, high, _ in rows]
    return np.array([np.mean(covered), np.mean([p <= 0.05 for *_, p in rows])])


@pytest.mark.parametrize(
    ("items", "accuracy", "difference", "correlation"), [(300, 0.3, 0.02, 0.8), (200, 0.5, 0, 0.9)]
)
def test_the_interval_covers_the_truth_in_93_to_97_percent_of_1000_comparisons(
    items: int, accuracy: float, difference: float, correlation: float
) -> None:
    covered, _ = rates(items, accuracy, difference, correlation, seed=1)
    assert 0.93 <= covered <= 0.97


@pytest.mark.long
@pytest.mark.parametrize("items", [100, 500, 2000])
@pytest.mark.parametrize("accuracy", [0.25, 0.5, 0.8])
@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("difference", [0.0, -0.02, 0.05])
def test_coverage_and_errors_of_equivalence_on_a_grid(
    items: int, accuracy: float, correlation: float, difference: float
) -> None:
    """Of 4,000 comparisons: of 1,000, at 81 points, one or another rate of 5 % would come out above 6.5 % by luck."""
    covered, erred = rates(items, accuracy, difference, correlation, seed=items, count=4000)
    assert 0.93 <= covered <= 0.97
    assert erred <= 0.065


def test_equivalence_errs_in_at_most_65_of_1000_comparisons_at_the_margin() -> None:
    """Enough items to be able to err: the rate is near 5 %, not 0."""
    _, erred = rates(2000, 0.8, 0.02, 0.95, seed=3)
    assert 0.03 <= erred <= 0.065


def clustered(count: int, sizes: list[int], correlation: float, seed: int, items_too: bool = False) -> Array:
    """Return coverage and the rate of false alarms for two equally good models; items of a source resemble each other.

    With `items_too`, the two rates again for an analysis that ignores sources.
    """
    rng, found = np.random.default_rng(seed), []
    for _ in range(count):
        owners = np.repeat(np.arange(len(sizes)), sizes)

        def latent(owners: NDArray[np.int64] = owners) -> Array:
            shared, own = rng.normal(size=len(sizes))[owners], rng.normal(size=len(owners))
            return math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own

        item = latent()
        first, second = ((0.7 * item + math.sqrt(0.51) * latent()) < 0.2 for _ in range(2))
        row = []
        for sources in (owners, None) if items_too else (owners,):
            result = PairedOutcomes(first, second, sources)
            low, high = result.interval()
            row += [low <= 0 <= high, result.difference_test()[0] <= 0.05]
        found.append(row)
    return np.array(found, dtype=float).mean(axis=0)


def test_the_interval_of_clustered_items_covers_and_ignoring_the_sources_would_not() -> None:
    covered, alarms, covered_by_items, alarms_by_items = clustered(200, [4] * 80, 0.7, 5, items_too=True)
    assert covered >= 0.92
    assert alarms <= 0.08
    assert covered_by_items <= 0.90
    assert alarms_by_items >= 0.09


@pytest.mark.long
@pytest.mark.parametrize("sizes", [[3] * 150, [1, 2, 3, 5] * 50, [10] * 30, [40] * 14, [1, 1, 1, 2, 9] * 40])
@pytest.mark.parametrize("correlation", [0.1, 0.6])
def test_coverage_of_clustered_items_on_a_grid(sizes: list[int], correlation: float) -> None:
    covered, alarms = clustered(1000, sizes, correlation, seed=len(sizes))
    assert 0.93 <= covered <= 0.97
    assert alarms <= 0.07


# --- McNemar ------------------------------------------------------------------------------------


def test_exact_mcnemar_is_never_anti_conservative() -> None:
    """By enumeration: under the null hypothesis, wins of m discordant items are binomial with 1/2."""
    for discordant in (*range(41), 100, 333):
        wins = np.arange(discordant + 1)
        p = np.array([paired(int(w), discordant - int(w), discordant + 5).mcnemar()[0] for w in wins])
        probability = binom.pmf(wins, discordant, 0.5)
        for level in np.unique(p):
            assert probability[p <= level].sum() <= level + 1e-12


def test_the_mid_p_value_is_close_to_uniform() -> None:
    for discordant in (40, 101, 400):
        wins = np.arange(discordant + 1)
        mid = np.array([paired(int(w), discordant - int(w), discordant).mcnemar()[1] for w in wins])
        probability = binom.pmf(wins, discordant, 0.5)
        steps = probability.max()
        for level in np.linspace(0.01, 1, 50):
            assert abs(probability[mid <= level].sum() - level) <= steps + 1e-9
        assert (mid * probability).sum() == pytest.approx(0.5, abs=0.01)  # the mean of a uniform variable


def test_mcnemar_by_hand() -> None:
    """8 wins, 2 losses: 2 * (1 + 10 + 45) / 1024; the mid-P value leaves out one 45."""
    exact, mid = paired(8, 2, 30).mcnemar()
    assert exact == pytest.approx(112 / 1024)
    assert mid == pytest.approx(67 / 1024)
    for wins in (0, 5):
        assert paired(wins, wins, 30).mcnemar() == pytest.approx((1.0, 1.0))
    assert paired(2, 8, 30).mcnemar()[0] == pytest.approx(exact)


def test_the_test_with_sources_is_the_enumeration_of_all_signs() -> None:
    nets = [3, -1, 2, 2, -2, 0, 1, 4, 1]
    first, second, sources = [], [], []
    for source, net in enumerate(nets):
        first += [int(net < 0)] * abs(net) + [1]
        second += [int(net > 0)] * abs(net) + [1]
        sources += [f"s{source}"] * (abs(net) + 1)
    sums = np.array([np.dot(signs, np.abs(nets)) for signs in itertools.product((-1, 1), repeat=len(nets))])
    tail = min((sums >= sum(nets)).mean(), (sums <= sum(nets)).mean())
    found = PairedOutcomes(first, second, sources)
    assert found.difference_test()[0] == pytest.approx(2 * tail)
    assert found.difference_test()[1] == pytest.approx(2 * tail - (sums == sum(nets)).mean())


def test_without_shared_sources_the_test_is_mcnemars() -> None:
    found = PairedOutcomes([1, 0, 0, 0, 0, 0, 1, 0], [0, 1, 1, 1, 1, 1, 1, 1], list("abcdefgh"))
    assert found.difference_test() == found.mcnemar()
    assert not found.clustered


# --- few discordant items -----------------------------------------------------------------------


def test_without_discordant_items_the_bound_is_that_of_a_proportion() -> None:
    """No item in n flipped: the share of flips is below 1 - 0.025^(1/n) with 97.5 % confidence."""
    for items in (20, 300, 10_042):
        low, high = paired(0, 0, items).interval()
        assert high == pytest.approx(1 - 0.025 ** (1 / items), rel=0.01)
        assert low == -high


def test_the_exact_interval_covers_for_every_truth() -> None:
    """By enumeration of all outcomes of 12 items."""
    items = 12
    outcomes = [(w, x) for w in range(items + 1) for x in range(items + 1 - w)]
    upper = {outcome: exact_upper_bound(*outcome, items, 0.025) for outcome in outcomes}
    for won, lost in itertools.product((0.0, 0.02, 0.1, 0.3, 0.5), repeat=2):
        probability = multinomial.pmf([(w, x, items - w - x) for w, x in outcomes], items, [won, lost, 1 - won - lost])
        covers = [-upper[x, w] - 1e-9 <= won - lost <= upper[w, x] + 1e-9 for w, x in outcomes]
        assert probability[covers].sum() >= 0.95


def test_the_exact_p_value_and_bound_agree_and_fall_with_the_margin() -> None:
    bound = exact_upper_bound(6, 2, 400, 0.05)
    assert exact_p_below(6, 2, 400, bound * 1.001) <= 0.05 <= exact_p_below(6, 2, 400, bound * 0.999)
    values = [exact_p_below(6, 2, 400, margin) for margin in (0.01, 0.02, 0.03, 0.05, 0.2)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0.2
    assert values[-1] < 0.001


def test_a_handful_of_wins_gives_an_exact_interval_that_the_bootstrap_would_miss() -> None:
    """Three wins, no loss: a bootstrap ends at 0, but so few items are compatible with a loss of quality."""
    found = paired(3, 0, 1000)
    low, high = found.interval()
    assert found.is_exact
    assert low < -0.0005
    assert 0.006 < high < 0.01
    assert not paired(40, 30, 1000).is_exact
    # Nearly every item flipped: the agreeing ones are few.
    assert paired(990, 0, 1000).is_exact
    assert paired(990, 0, 1000).interval()[1] < 1


def test_interval_and_bootstrap_meet_at_the_border() -> None:
    exact, bootstrap = paired(14, 10, 800), paired(15, 10, 800)
    assert (exact.is_exact, bootstrap.is_exact) == (True, False)
    widths = [high - low for low, high in (exact.interval(), bootstrap.interval())]
    assert widths[1] == pytest.approx(widths[0], rel=0.06)


def test_sources_with_one_outcome_count_as_one_item_each() -> None:
    """Identical models: 1,000 items of 20 sources show no more than 20 items do."""
    outcomes = [place % 2 for place in range(1000)]
    found = PairedOutcomes(outcomes, outcomes, [str(place // 50) for place in range(1000)])
    assert found.interval() == paired(0, 0, 20).interval()
    assert found.equivalence_p(0.02) > 0.5


def test_two_big_groups_decide_nothing() -> None:
    """600 wins and no loss, but all items belong to two sources."""
    found = PairedOutcomes([0] * 1000, [1] * 600 + [0] * 400, ["video"] * 500 + ["article"] * 500)
    assert found.difference_test()[0] >= 0.5
    low, high = found.interval()
    assert low <= 0
    assert high == pytest.approx(1, abs=0.01)


# --- equivalence, power, correction ---------------------------------------------------------------


def test_interval_of_two_one_sided_tests() -> None:
    """Equivalence at 5 % means that the 90 % interval lies within the margin, with both methods."""
    for wins, losses, items in ((4, 7, 900), (60, 75, 3000)):
        found = paired(wins, losses, items)
        low, high = found.interval(0.90)
        outer = max(-low, high)
        assert found.equivalence_p(outer * 1.02) <= 0.05 <= found.equivalence_p(outer * 0.98)


def test_equivalence_is_two_sided() -> None:
    for wins, losses in ((30, 80), (80, 30), (2, 12), (12, 2)):
        assert paired(wins, losses, 2000).equivalence_p(0.02) > 0.5 * (abs(wins - losses) > 40)
        assert paired(wins, losses, 200).equivalence_p(0.02) > 0.2
    assert paired(55, 55, 2000).equivalence_p(0.02) < 0.001
    one, other = paired(30, 60, 2000).equivalence_p(0.02), paired(60, 30, 2000).equivalence_p(0.02)
    assert one == pytest.approx(other, rel=0.1)


def test_bootstrap_intervals_are_near_those_of_a_normal_distribution_when_there_are_many_items() -> None:
    found = paired(900, 1000, 10_000)
    low, high = found.interval()
    error = math.sqrt(0.19 - 0.01**2) / 100
    assert low == pytest.approx(-0.01 - norm.ppf(0.975) * error, abs=0.0003)
    assert high == pytest.approx(-0.01 + norm.ppf(0.975) * error, abs=0.0003)
    assert paired(900, 1000, 10_000).interval() == (low, high)


@pytest.mark.parametrize(("items", "discordant"), [(1000, 200), (5000, 400)])
def test_the_smallest_difference_is_found_four_times_in_five(items: int, discordant: int) -> None:
    found = paired(discordant // 2, discordant // 2, items).smallest_difference()
    wins = np.arange(discordant + 1)
    significant = np.array([paired(int(w), discordant - int(w), discordant).mcnemar()[0] <= 0.05 for w in wins])
    share = (1 + found * items / discordant) / 2
    assert 0.72 <= binom.pmf(wins, discordant, share)[significant].sum() <= 0.85


def test_the_smallest_difference_of_identical_models_is_not_0() -> None:
    """McNemar's exact test needs six items that flip in the same direction."""
    assert paired(0, 0, 1000).smallest_difference() == pytest.approx(7.85 / 1000, abs=1e-4)
    assert paired(0, 0, 5).smallest_difference() == 1.0


def test_holm_by_hand() -> None:
    """0.01 * 4, 0.02 * 3, 0.03 * 2 = 0.06 (not less than the one before), 0.5 * 1."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
