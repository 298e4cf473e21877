"""The polynomials of the polar iterations, derived once more by other means."""

import itertools
import math

import numpy as np
import pytest

from optimizers.polar import gram, iterations
from optimizers.polar.coefficients import Quintic, best_quintic, cans, polar_express

# The eight rows that the authors of Polar Express print for lower end 1e-3 (arXiv 2505.16932, implementation).
PUBLISHED = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]


def test_polar_express_gives_the_published_rows() -> None:
    chain = polar_express(8, lower=1e-3, cushion=0.02407327424182761, safety=1.0)
    for derived, published in zip(chain, PUBLISHED, strict=True):
        assert derived == pytest.approx(published, abs=1e-6)


def test_safety_stretches_all_but_the_last() -> None:
    first, last = polar_express(2, lower=0.1, cushion=0.01, safety=1.01)
    plain = best_quintic(0.1, 1.0)
    assert first(1.01 * 0.3) == pytest.approx(plain(0.3), rel=1e-12)
    assert last == pytest.approx(best_quintic(first(0.1), 2 - first(0.1)), rel=1e-9)


@pytest.mark.parametrize(
    ("low", "high"), [(1e-3, 1.0), (0.024, 1.0), (0.1, 1.9), (0.5, 1.5), (0.9, 1.1), (0.999, 1.001)]
)
def test_the_best_quintic_has_chebyshevs_signature_and_no_better_neighbour(low: float, high: float) -> None:
    p = best_quintic(low, high)
    grid = np.linspace(low, high, 20001)
    values = p.a * grid + p.b * grid**3 + p.c * grid**5
    error = np.abs(1 - values).max()
    # Four extreme values of alternating sign.
    extreme = [i for i in range(len(grid)) if abs(1 - values[i]) > error * (1 - 1e-5) - 1e-14]
    signs = [np.sign(1 - values[i]) for i in extreme]
    assert len([sign for sign, _ in itertools.groupby(signs)]) == 4
    # A least-squares fit weighted ever more towards the largest error (Lawson) ends at the same polynomial.
    basis, weights = np.stack([grid, grid**3, grid**5], 1), np.ones_like(grid)
    for _ in range(400):
        root = np.sqrt(weights)[:, None]
        fit = np.linalg.lstsq(basis * root, root[:, 0], rcond=None)[0]
        weights *= np.abs(1 - basis @ fit)
        weights /= weights.sum()
    assert np.abs(1 - basis @ fit).max() >= error * (1 - 1e-9)
    assert np.abs(1 - basis @ fit).max() < error * 1.1 + 1e-12


def test_a_narrow_interval_has_the_limit_polynomial() -> None:
    p = best_quintic(1 - 1e-9, 1 + 1e-9)
    slope, curvature = p.a + 3 * p.b + 5 * p.c, 6 * p.b + 20 * p.c
    assert p(1.0) == pytest.approx(1, abs=1e-8)
    assert slope == pytest.approx(0, abs=1e-8)
    assert curvature == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("cushion", [0.0, 0.1])
def test_cans_cubics_are_the_best_and_reach_the_tolerance(cushion: float) -> None:
    low, high = 2.0**-11, 1.0
    for p in cans(low, 1e-6, cushion=cushion):
        assert p.c == 0
        end, top = max(low, cushion * high), math.sqrt(-p.a / (3 * p.b))
        # Equal errors of alternating sign at both ends and at the maximum in between: Chebyshev's three points.
        errors = [1 - p(end), p(top) - 1, 1 - p(high)]
        assert errors == pytest.approx([errors[0]] * 3, rel=1e-6, abs=1e-15)
        low, high = p(low), p(top)
    assert max(high - 1, 1 - low) <= 1e-6


@pytest.mark.parametrize(
    ("chain", "lower", "bound"),
    [(iterations.EXPRESS, 2.0**-12, 2e-3), (gram.EXPRESS, 2.0**-11, 2e-5), (iterations.PRECISE, 2.0**-11, 1e-6)],
)
def test_the_chains_in_use_bring_their_interval_to_one(chain: tuple[Quintic, ...], lower: float, bound: float) -> None:
    for x in np.geomspace(lower, 1, 5001):
        y = float(x)
        for p in chain:
            y = p(y)
        assert abs(y - 1) < bound
    below = [0.0, lower / 100, lower / 3]
    for y in below:
        for p in chain:
            y = p(y)
        assert 0 <= y <= 1 + bound
