"""Polar factors by rational functions: the functions, when there is a restart, and what happens when rounding wins."""

import itertools
import math
from typing import Any

import pytest
import torch
from scipy.special import ellipj, ellipkm1
from torch import Tensor

from optimizers.flops import counter
from optimizers.polar import polar, rational
from optimizers.polar.coefficients import zolotarev
from optimizers.polar.precision import Products
from optimizers.polar.rational import RATIONALS
from optimizers.polar.rows import HERE, Rows

LOWER = {"loose": 2.0**-9, "default": 2.0**-11, "tight": 2.0**-11}


def of_condition(m: int, n: int, condition: float, seed: int = 0) -> Tensor:
    """An m x n matrix in fp32 whose singular values fall evenly, on a logarithmic scale, from 1."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(m, n, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    sigma = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)
    return ((left * sigma) @ right.T).float()


def error(d: Tensor, x: Tensor) -> float:
    left, _, right = torch.linalg.svd(x.double(), full_matrices=False)
    exact = left @ right
    return float((d.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("poles", "lower"), [(1, 0.3), (2, 2.0**-11), (3, 1e-4)])
def test_a_function_takes_its_extremes_in_turn_where_theory_puts_them(poles: int, lower: float) -> None:
    """Chebyshev: 2 poles + 2 of them, alternating, are what makes it the best. The zeros and shifts are SciPy's."""
    (r,) = zolotarev((poles,), lower=lower, safety=1.0)
    x = torch.logspace(math.log10(lower), 0, 200001, dtype=torch.float64).clamp(lower, 1.0)
    values = torch.tensor([r(value) for value in x.tolist()], dtype=torch.float64) - 1
    size = float(values.abs().max())
    turns = torch.nonzero(values.abs() > size * (1 - 1e-4)).flatten().tolist()
    signs = [math.copysign(1, float(values[turn])) for turn in turns]
    assert sum(a != b for a, b in itertools.pairwise(signs)) == 2 * poles + 1
    quarter = ellipkm1(lower**2)
    for j, shift in enumerate(r.shifts):
        sn, cn, *_ = ellipj((2 * j + 1) * quarter / (2 * poles + 1), 1 - lower**2)
        assert shift == pytest.approx((lower * sn / cn) ** 2, rel=1e-9)


@pytest.mark.parametrize(("accuracy", "stated"), [("loose", 4e-4), ("default", 8e-6), ("tight", 4e-8)])
def test_two_functions_bring_all_values_as_near_to_1_as_is_said(accuracy: Any, stated: float) -> None:
    first, second = RATIONALS[accuracy]
    lower = LOWER[accuracy]
    found = [second(first(lower ** (i / 2000))) - 1 for i in range(2001)]
    assert stated / 2 < max(map(abs, found)) < stated
    # Rounding may push a value above the largest, for which there is room; smaller ones than `lower` stay below 1.
    assert first(1.0) == pytest.approx(1 / 1.05)
    assert abs(second(1.05 * first(1.0)) - 1) < stated
    assert all(0 < second(first(lower * i / 1000)) < 1 + stated for i in range(1, 1000))


def test_a_restart_is_made_where_the_condition_number_asks_for_it() -> None:
    """Counted by the products with the whole matrix, of which it takes two more."""
    for condition, tall_products in ((1.5, 2), (12.0, 2), (30.0, 4), (500.0, 4)):
        x = of_condition(4000, 8, condition)
        with counter() as count:
            d = polar(x, "gram", dtype="fp32")
        assert count.get_total_flops() // (2 * 4000 * 8 * 8) == tall_products, condition
        assert error(d, x) < 1e-4 + 16 * 2.0**-24 * condition


def test_a_few_large_values_hide_nothing() -> None:
    """The condition number alone would ask for a restart: it is the same in both, and the small values are not."""
    base = torch.linalg.qr(torch.randn(4000, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).Q
    turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    for large, tall_products in ((1, 2), (32, 4)):
        sigma = torch.ones(64, dtype=torch.float64)
        sigma[:large] = 30.0
        x = ((base * sigma) @ turn.T).float()
        with counter() as count:
            d = polar(x, "gram", dtype="fp32")
        assert count.get_total_flops() // (2 * 4000 * 64 * 64) == tall_products, large
        assert float((torch.linalg.svdvals(d.double()) - 1).abs().max()) < 1e-4


def test_without_restarts_badly_conditioned_matrices_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    x = of_condition(512, 64, 150.0)
    good = error(polar(x, "gram", dtype="fp32"), x)
    monkeypatch.setitem(rational.MOST_HIDDEN, "default", 1e9)
    assert error(polar(x, "gram", dtype="fp32"), x) > 2 * good


def test_each_matrix_of_a_stack_is_judged_by_itself() -> None:
    each = [of_condition(96, 24, condition, seed) for seed, condition in enumerate((3.0, 400.0, 5.0, 90.0))]
    together = polar(torch.stack(each), "gram", dtype="fp32")
    for alone, d in zip(each, together, strict=True):
        assert torch.allclose(polar(alone, "gram", dtype="fp32"), d, rtol=0, atol=1e-6)
        assert error(d, alone) < 2e-4


def test_rows_on_several_processes_always_restart() -> None:
    """So that what is summed is known beforehand: one Gram matrix before the restart, one after."""

    class Elsewhere(Rows):
        def __init__(self) -> None:
            self.sums: list[tuple[int, ...]] = []

        def total(self, x: Tensor) -> Tensor:
            self.sums.append(tuple(x.shape))
            return x

    products = Products.on(torch.device("cpu"), torch.float32)
    for condition in (2.0, 500.0):
        rows, x = Elsewhere(), of_condition(64, 16, condition)[None]
        there = rational.rational_polar(x, products, rows)
        assert rows.sums == [(1, 16, 16)] * 2
        assert torch.allclose(there, rational.rational_polar(x, products, HERE), rtol=0, atol=3e-5)


@pytest.mark.parametrize("negative", [-3e-6, -1e-5, -6e-5])
def test_a_ridge_makes_up_for_a_gram_matrix_that_rounding_left_indefinite(negative: float) -> None:
    A = torch.diag_embed(torch.tensor([[0.5, 0.3, 0.2, negative], [0.4, 0.3, 0.2, 0.1]]))
    W, is_regular = rational._inverses(A, RATIONALS["default"][0])
    assert is_regular.tolist() == [False, True]
    assert all(inverse.isfinite().all() and (inverse.diagonal(dim1=1, dim2=2) > 0).all() for inverse in W)
    # Only the first has a ridge, which shifts all of its eigenvalues alike.
    ridge = A[0].diagonal() - torch.tensor([0.5, 0.3, 0.2, negative])
    assert 0 < ridge.max() < 3e-4
    assert torch.equal(A[1].diagonal(), torch.tensor([0.4, 0.3, 0.2, 0.1]))


def test_a_matrix_that_needed_a_ridge_is_restarted(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.stack([of_condition(400, 8, 1.5), of_condition(400, 8, 1.5, seed=1)])
    real, calls = rational.inverse, []

    def first_fails(A: Tensor, condition: float) -> tuple[Tensor, Tensor]:
        calls.append(condition)
        return real(A, condition)[0], torch.tensor([False, len(calls) == 1])

    with counter() as plain:
        polar(x, "gram", dtype="fp32")
    monkeypatch.setattr(rational, "inverse", first_fails)
    with counter() as ridged:
        d = polar(x, "gram", dtype="fp32")
    # X_1, its Gram matrix and its product for the second matrix; and one more inverse.
    assert (ridged.get_total_flops() - plain.get_total_flops()) // (2 * 400 * 8 * 8) == 3
    assert max(error(d[0], x[0]), error(d[1], x[1])) < 1e-4


def test_matrices_without_full_rank_give_partial_isometries() -> None:
    x = of_condition(200, 20, 5.0)
    x[:, 3] = x[:, 4]
    x[:, 7] = 0
    sigma = torch.linalg.svdvals(polar(x, "gram", dtype="fp32").double())
    assert ((sigma[:18] - 1).abs() < 1e-4).all()
    assert float(sigma[18:].max()) < 1.0001
    assert float(polar(x, "gram", dtype="fp32")[:, 7].abs().max()) < 1e-6


@pytest.mark.parametrize("n", [5, 40, 200])
def test_the_largest_eigenvalue_is_estimated_from_below(n: int) -> None:
    A = torch.stack([(x := torch.randn(3 * n, n)).T @ x for _ in range(5)])
    estimate = rational._largest_eigenvalue(A)
    largest = torch.linalg.eigvalsh(A)[:, -1]
    assert ((estimate <= largest * (1 + 1e-5)) & (estimate > 0.6 * largest)).all()
