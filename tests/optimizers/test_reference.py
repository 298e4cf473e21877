"""The oracle against facts that do not come from it: numpy, torch's own optimizers, and what the formulas promise."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optimizers import reference
from tests.optimizers.helpers import error, every_direction, gaussian, low_rank, row_spread, uneven

TALL = [(16, 4), (40, 36), (9, 1), (60, 12)]


def orthonormality(d: Tensor) -> float:
    return float((d.T @ d - torch.eye(d.shape[1], dtype=torch.float64)).abs().max())


def same_everywhere(x: Tensor) -> float:
    return float(x.max() - x.min())


@pytest.mark.parametrize(("m", "n"), [(16, 4), (4, 16), (7, 7), (9, 1), (1, 9), (1, 1)])
def test_polar_is_the_symmetric_root_formula(m: int, n: int) -> None:
    x = uneven(m, n)
    a = x.numpy()
    # X (X^T X)^-1/2 by an eigendecomposition, on the side where it is invertible.
    values, vectors = np.linalg.eigh(a.T @ a if m >= n else a @ a.T)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    wanted = a @ root if m >= n else root @ a
    assert error(reference.polar(x), torch.from_numpy(wanted)) < 1e-9


def test_polar_is_the_nearest_matrix_with_orthonormal_columns() -> None:
    x = uneven(10, 4)
    nearest = float((x - reference.polar(x)).norm())
    for seed in range(50):
        other = torch.linalg.qr(gaussian(10, 4, seed))[0]
        assert float((x - other).norm()) > nearest


@pytest.mark.parametrize(("m", "n", "rank"), [(20, 8, 5), (8, 20, 1), (12, 12, 11)])
def test_polar_of_a_deficient_matrix_is_a_partial_isometry_on_its_row_space(m: int, n: int, rank: int) -> None:
    x = low_rank(m, n, rank).double()
    d = reference.polar(x)
    assert int(torch.linalg.matrix_rank(d)) == rank
    assert error(d @ d.T @ d, d) < 1e-12
    assert error(d.T @ d, torch.from_numpy(np.linalg.pinv(x.numpy()) @ x.numpy())) < 1e-10
    assert error(d @ torch.from_numpy(np.real(sqrtm(x.T @ x))), x) < 1e-7


def sqrtm(a: Tensor) -> np.ndarray:
    values, vectors = np.linalg.eigh(a.numpy())
    return vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T


@pytest.mark.parametrize(("m", "n", "rank"), [(20, 8, 8), (20, 8, 3), (8, 20, 8), (6, 6, 6)])
def test_leverage_is_the_diagonal_of_the_projection_on_the_columns(m: int, n: int, rank: int) -> None:
    x = low_rank(m, n, rank).double()
    wanted = np.diag(x.numpy() @ np.linalg.pinv(x.numpy()))
    scores = reference.leverage_scores(x)
    assert error(scores, torch.from_numpy(wanted.copy())) < 1e-10
    assert float(scores.sum()) == pytest.approx(rank)


@pytest.mark.parametrize("options", every_direction())
@pytest.mark.parametrize(("m", "n"), [(12, 5), (5, 12), (6, 6), (5, 1), (1, 5)])
def test_directions_have_no_scale_keep_zeros_and_spread_nan(m: int, n: int, options: dict[str, Any]) -> None:
    u = uneven(m, n)
    d, _ = reference.direction(u, options)
    for scale in (1e-20, 1e20):
        assert error(reference.direction(u * scale, options)[0], d) < 1e-9
    assert not reference.direction(torch.zeros(m, n), options)[0].any()
    for bad in (math.nan, math.inf):
        spoiled = u.clone()
        spoiled[-1, 0] = bad
        assert bool(reference.direction(spoiled, options)[0].isnan().all())


@pytest.mark.parametrize("options", every_direction())
def test_zero_rows_stay_zero_and_disturb_no_other(options: dict[str, Any]) -> None:
    u = uneven(20, 5)
    gaps = torch.cat([u[:7], torch.zeros(3, 5), u[7:]])
    d, _ = reference.direction(gaps, options)
    assert not d[7:10].any()
    size = math.sqrt(23 / 20) if options["direction"] == "u_normuon" else 1.0
    assert error(size * torch.cat([d[:7], d[10:]]), reference.direction(u, options)[0]) < 1e-9


@pytest.mark.parametrize("options", every_direction())
@pytest.mark.parametrize(("m", "n"), [(12, 5), (5, 12), (6, 6)])
def test_row_permutations_and_rotations_pass_through(m: int, n: int, options: dict[str, Any]) -> None:
    u = uneven(m, n)
    d, _ = reference.direction(u, options)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(1))
    assert error(reference.direction(u[order], options)[0], d[order]) < 1e-9
    if m > n or options["scope"] == "tall":
        rotation = torch.linalg.qr(gaussian(n, n, 3))[0]
        assert error(reference.direction(u @ rotation, options)[0], d @ rotation) < 1e-9


def test_normuon_by_hand() -> None:
    # Its own polar factor: orthonormal columns with squared rows 0.9, 0.1 and 1.
    u = torch.tensor([[math.sqrt(0.9), 0.0], [math.sqrt(0.1), 0.0], [0.0, 1.0]], dtype=torch.float64)
    before = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    d, v = reference.normuon(u, before, beta2=0.5)
    assert v.tolist() == pytest.approx([0.5 + 0.225, 0.025, 0.25 + 0.25])
    raw = [math.sqrt(0.9 / 0.725), math.sqrt(0.1 / 0.025), math.sqrt(1 / 0.5)]
    size = math.sqrt(2) / math.sqrt(sum(x * x for x in raw))
    assert d.norm(dim=1).tolist() == pytest.approx([x * size for x in raw])
    assert float(d.norm()) == pytest.approx(math.sqrt(2))
    unit, same_v = reference.normuon(u, before, beta2=0.5, target="unit")
    assert torch.equal(same_v, v)
    assert unit.norm(dim=1).tolist() == pytest.approx([1.0, 1.0, 1.0])
    assert before.tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize(("m", "n"), TALL)
def test_u_normuon_has_rows_of_the_target_norm_and_normuons_unit_is_longer_by_the_root_of_m_over_n(
    m: int, n: int
) -> None:
    u = uneven(m, n)
    d = reference.u_normuon(u)
    assert torch.allclose(d.norm(dim=1), torch.tensor(math.sqrt(n / m), dtype=torch.float64))
    assert float(d.norm()) == pytest.approx(math.sqrt(n))
    unit, _ = reference.normuon(u, torch.zeros(m), target="unit")
    assert error(unit, d * math.sqrt(m / n)) < 1e-12
    # Rows keep the direction that Muon gives them.
    assert torch.allclose(torch.cosine_similarity(d, reference.muon(u)), torch.ones(m, dtype=torch.float64))


def test_running_u_normuon_starts_as_the_stateless_one_and_then_follows_the_mean() -> None:
    u = uneven(12, 4)
    d, v = reference.u_normuon_running(u, torch.zeros(12))
    assert error(d, reference.u_normuon(u)) < 1e-7
    assert error(reference.u_normuon_running(u, v)[0], d) < 1e-12
    other = uneven(12, 4, seed=5)
    scores = reference.leverage_scores(other) / 4
    _, moved = reference.u_normuon_running(other, v, beta2=0.9)
    assert error(moved, 0.9 * v + 0.1 * scores) < 1e-12


@pytest.mark.parametrize(("m", "n"), [(5, 12), (6, 6)])
def test_normuons_of_wide_and_square_matrices_are_muon_and_leave_v(m: int, n: int) -> None:
    u, v = uneven(m, n), torch.full((m,), 0.3)
    for d, after in (reference.normuon(u, v), reference.u_normuon_running(u, v), (reference.u_normuon(u), v)):
        assert torch.equal(d, reference.muon(u))
        assert torch.equal(after.float(), v)


@pytest.mark.parametrize(("rule", "iterations"), [("odds", 60), ("tyler", 1000)])
@pytest.mark.parametrize(("m", "n"), TALL)
def test_the_balance_converges_to_even_rows_and_orthonormal_columns(m: int, n: int, rule: str, iterations: int) -> None:
    d = reference.aurora(uneven(m, n), iterations=iterations, balance_rule=rule)
    assert orthonormality(d) < 1e-12
    assert same_everywhere(d.norm(dim=1)) < 1e-6
    assert float(d.norm(dim=1).mean()) == pytest.approx(math.sqrt(n / m))


def test_both_rules_settle_at_tylers_m_estimator() -> None:
    u = uneven(30, 5)
    # The estimator itself: sigma = (n/m) sum x x^T / (x^T sigma^-1 x), iterated on the n x n matrix in numpy.
    x, sigma = u.numpy(), np.eye(5)
    for _ in range(500):
        weights = 1 / np.einsum("ij,jk,ik->i", x, np.linalg.inv(sigma), x)
        sigma = 5 / 30 * (x * weights[:, None]).T @ x
    scaled = torch.from_numpy(np.sqrt(1 / np.einsum("ij,jk,ik->i", x, np.linalg.inv(sigma), x)))[:, None] * u
    for rule, iterations in (("odds", 40), ("tyler", 400)):
        d = reference.aurora(u, iterations=iterations, balance_rule=rule)
        assert error(d, reference.polar(scaled)) < 1e-8


def test_one_iteration_only_normalises_the_rows() -> None:
    u = uneven(12, 5)
    assert error(reference.aurora(u, iterations=1), reference.polar(u / u.norm(dim=1, keepdim=True))) < 1e-12


@pytest.mark.parametrize("rule", ["odds", "tyler"])
@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_positive_row_scaling_changes_nothing(iterations: int, rule: str) -> None:
    u = gaussian(20, 6)
    d = reference.aurora(u, iterations=iterations, balance_rule=rule)
    assert error(reference.aurora(gaussian(20, 1, 7).exp() * u, iterations=iterations, balance_rule=rule), d) < 1e-10


def test_odds_is_faster_than_tyler_and_more_steps_are_better() -> None:
    u = uneven(40, 36)
    spreads = [row_spread(reference.aurora(u, iterations=k)) for k in (1, 2, 3, 4)]
    assert spreads == sorted(spreads, reverse=True)
    assert spreads[1] < spreads[0] / 5
    assert row_spread(reference.aurora(u, balance_rule="tyler")) > spreads[0] / 2


def test_a_tolerance_stops_at_the_first_evaluation_within_it() -> None:
    u = uneven(40, 10)
    steps = range(1, 13)
    factors = [reference.aurora(u, iterations=k) for k in steps]
    worst = [float((d.norm(dim=1) / math.sqrt(10 / 40) - 1).abs().max()) for d in factors]
    assert worst == sorted(worst, reverse=True)
    for tolerance in (1.0, 0.1, 0.01, 0.001):
        first = next(k for k in steps if worst[k - 1] <= tolerance)
        assert error(reference.aurora(u, iterations=12, tolerance=tolerance), factors[first - 1]) < 1e-12
        for most in range(1, first):
            assert error(reference.aurora(u, iterations=most, tolerance=tolerance), factors[most - 1]) < 1e-12


def test_a_polar_factor_is_computed_once_an_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    polar, calls = reference.polar, []
    monkeypatch.setattr(reference, "polar", lambda x: (calls.append(x), polar(x))[1])
    for k in (1, 2, 5):
        calls.clear()
        reference.aurora(uneven(40, 10), iterations=k)
        assert len(calls) == k


def test_a_raised_spread_is_taken_back_for_a_tyler_step(monkeypatch: pytest.MonkeyPatch) -> None:
    u = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, -0.6]])
    even, uneven_scores = torch.tensor([0.4, 0.6, 0.5, 0.5]), torch.tensor([0.1, 0.9, 0.5, 0.5])
    options: dict[str, Any] = {"beta": 0.3, "eps_mode": "relative", "tolerance": None, "iterations": 3}
    answers = [even, uneven_scores] * 2 + [uneven_scores, even]
    monkeypatch.setattr(reference, "leverage_scores", lambda _: answers.pop(0).double())
    D, fallbacks = reference.row_scale(u, balance_rule="odds", **options)
    assert fallbacks == 1
    assert torch.allclose(D, (0.5 / even).sqrt().double())
    D, fallbacks = reference.row_scale(u, balance_rule="tyler", **options)
    assert fallbacks == 0
    assert torch.allclose(D, ((0.5 / even) * (0.5 / uneven_scores)).pow(0.3).double())
    D, fallbacks = reference.row_scale(u, balance_rule="odds", **options)
    assert fallbacks == 0
    assert torch.allclose(D, ((1 - even) / even * (1 - uneven_scores) / uneven_scores).sqrt().double())


def test_without_freedom_only_the_rows_are_normalised() -> None:
    u = torch.cat([uneven(4, 4), torch.zeros(3, 4)])
    d = reference.aurora(u, iterations=5)
    assert error(d[:4], reference.polar(u[:4] / u[:4].norm(dim=1, keepdim=True))) < 1e-9
    assert not d[4:].any()


def test_rows_that_share_a_direction_cannot_be_even_and_nothing_breaks() -> None:
    # 6 of 8 rows share one direction of 2: they hold leverage 1 together, where evenness would ask for 6/4.
    u = torch.cat([torch.tensor([[1.0, 2.0]]).repeat(6, 1), torch.tensor([[1.0, 0.0], [0.0, 1.0]])])
    for rule in ("odds", "tyler"):
        d = reference.aurora(u, iterations=10, balance_rule=rule)
        assert bool(d.isfinite().all())
        assert orthonormality(d) < 1e-9
        assert float(d[:6].square().sum()) == pytest.approx(1, abs=0.3)


def test_scopes() -> None:
    forms = {"tall": uneven(12, 5), "wide": uneven(12, 5, seed=9).T, "square": uneven(6, 6)}
    for scope, balanced in {"tall": {"tall"}, "wide": {"wide"}, "all": {"tall", "wide"}}.items():
        for form, u in forms.items():
            for treat in (reference.aurora, reference.riemannian_aurora):
                d = treat(u, scope=scope)
                assert torch.equal(d, reference.muon(u)) == (form not in balanced)
                if form == "wide" and form in balanced:
                    assert torch.equal(d, treat(u.T, scope="all").T)


def test_absolute_eps_depends_on_the_scale_and_relative_does_not() -> None:
    u = uneven(12, 5)
    for rule in ("odds", "tyler"):
        same, tiny = (
            [reference.aurora(u * scale, balance_rule=rule, eps_mode=mode) for mode in ("relative", "absolute")]
            for scale in (1.0, 1e-12)
        )
        assert error(same[1], same[0]) < 1e-12
        assert error(tiny[0], same[0]) < 1e-12
        assert error(tiny[1], same[0]) > 0.01
