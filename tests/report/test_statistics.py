"""The report's statistics against values computed by hand."""

import math

import numpy as np
import pytest

from pretrain.report.statistics import band, log2_slope, mean_interval, paired_band, smoothed, value_at


def test_t_interval_of_three_numbers() -> None:
    """1, 2, 3: s = 1, t(0.975; 2) = 4.30265, half-width 4.30265 / sqrt(3)."""
    found = mean_interval([1.0, 2.0, 3.0])
    assert found is not None
    assert (found.mean, found.count) == (2.0, 3)
    assert found.half_width == pytest.approx(2.484138, abs=1e-6)
    assert found.low == pytest.approx(-0.484138, abs=1e-6)
    assert found.high == pytest.approx(4.484138, abs=1e-6)


def test_t_interval_of_two_numbers() -> None:
    """0, 1: s = 1/sqrt(2), t(0.975; 1) = 12.7062, half-width 12.7062 / 2."""
    found = mean_interval([0.0, 1.0])
    assert found is not None
    assert found.half_width == pytest.approx(6.353102, abs=1e-6)


def test_t_interval_of_one_number_and_of_none() -> None:
    found = mean_interval([3.0])
    assert found is not None
    assert found.half_width is None
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert mean_interval([]) is None


@pytest.mark.parametrize(
    ("values", "agree"),
    [
        ([4.2 - 4.1, 4.3 - 4.2, 4.4 - 4.3], True),  # 0.1 with three different roundings
        ([0.0, 0.0], True),
        ([0.1, 0.1001, 0.1], False),
        ([-0.1, 0.1], False),
        ([1 / 4096, 2 / 4096], False),
        ([5.0], False),  # nothing to agree with
    ],
)
def test_values_that_agree_up_to_rounding(values: list[float], agree: bool) -> None:
    found = mean_interval(values)
    assert found is not None
    assert found.is_degenerate == agree


def test_paired_bands_are_t_intervals_of_the_differences() -> None:
    """Differences 1, 2, 3 everywhere, although the curves have other x; see the t interval of these numbers above."""
    x, other = np.array([0.0, 10.0, 20.0]), np.array([5.0, 15.0, 20.0])
    pairs = [((x, x + seed), (other, other)) for seed in (1.0, 2.0, 3.0)]
    found = paired_band(pairs, points=50)
    assert found is not None
    grid, mean, low, high = found
    np.testing.assert_allclose(grid, [10.0, 20.0])
    np.testing.assert_allclose(mean, 2.0)
    np.testing.assert_allclose(low, -0.484138, atol=1e-6)
    np.testing.assert_allclose(high, 4.484138, atol=1e-6)
    single = paired_band(pairs[:1], points=50)
    assert single is not None
    np.testing.assert_array_equal(single[2], single[3])
    assert paired_band([], points=50) is None
    assert paired_band([((x, x), (np.empty(0), np.empty(0)))], points=50) is None


def test_slope_is_the_change_per_doubling() -> None:
    assert log2_slope([2, 4, 8], [1.0, 1.5, 2.0]) == pytest.approx(0.5)
    assert log2_slope([1, 8], [0.0, 3.0]) == pytest.approx(1.0)
    # x = 0, 1, 2 and y = 0, 1, 1: sum((x - 1) (y - 2/3)) / sum((x - 1)^2) = 1/2.
    assert log2_slope([1, 2, 4], [0.0, 1.0, 1.0]) == pytest.approx(0.5)


def test_values_between_points_are_linear_and_none_outside() -> None:
    curve = (np.array([10.0, 20.0]), np.array([5.0, 4.0]))
    assert value_at(curve, 12.5) == pytest.approx(4.75)
    assert value_at(curve, 20.0) == 4.0
    assert value_at(curve, 9.9) is None
    assert value_at(curve, 20.1) is None
    assert value_at((np.empty(0), np.empty(0)), 1.0) is None


def test_smoothing_averages_stretches() -> None:
    x, y = smoothed((np.arange(4.0), np.array([1.0, 3.0, 5.0, 7.0])), points=2)
    np.testing.assert_allclose(x, [0.5, 2.5])
    np.testing.assert_allclose(y, [2.0, 6.0])
    x, y = smoothed((np.arange(1000.0), np.ones(1000)), points=60)
    assert len(x) == 60
    np.testing.assert_allclose(y, 1.0)


def test_a_band_covers_what_all_curves_cover() -> None:
    first = (np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 2.0]))
    second = (np.array([1.0, 2.0, 3.0]), np.array([3.0, 4.0, 5.0]))
    found = band([first, second], points=100)
    assert found is not None
    x, mean, lowest, highest = found
    np.testing.assert_allclose(x, [1.0, 2.0])
    np.testing.assert_allclose(mean, [2.0, 3.0])
    np.testing.assert_allclose(lowest, [1.0, 2.0])
    np.testing.assert_allclose(highest, [3.0, 4.0])
    assert band([], points=10) is None
    assert band([first, (np.array([5.0]), np.array([1.0]))], points=10) is None
    long = (np.arange(500.0), np.arange(500.0))
    thinned = band([long], points=50)
    assert thinned is not None
    assert len(thinned[0]) == 50
