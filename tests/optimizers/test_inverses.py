"""Inverses of positive definite stacks by halves: as exact as LAPACK's, and made of products."""

import math

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from optimizers.polar import inverses, precision
from optimizers.polar.inverses import (
    LARGEST_BY_HALVES,
    LARGEST_CONDITION,
    SMALLEST,
    SMALLEST_OF_LARGE,
    inverse,
    inverse_factor,
)

SIZES = [1, 2, SMALLEST, SMALLEST + 1, 97, 128, 200, LARGEST_BY_HALVES, LARGEST_BY_HALVES + 1]


def positive(k: int, n: int, condition: float) -> Tensor:
    """Positive definite matrices in fp32 whose eigenvalues fall evenly, on a logarithmic scale, from 1."""
    generator = torch.Generator().manual_seed(n)
    turn = torch.linalg.qr(torch.randn(k, n, n, generator=generator, dtype=torch.float64)).Q
    values = torch.logspace(0, -math.log10(condition), n, dtype=torch.float64)
    return ((turn * values) @ turn.mT).float()


def by_lapack(A: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky_ex(A, upper=True).L, upper=True)


def error(W: Tensor, A: Tensor) -> float:
    exact = torch.stack([torch.linalg.inv(each) for each in A.double()])
    return float((W - exact).norm() / exact.norm())


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("condition", [1.0, LARGEST_CONDITION, 300.0, 1e6])
def test_inverses_are_nearly_as_exact_as_those_of_lapack(n: int, condition: float) -> None:
    A = positive(3, n, condition)
    W, failed = inverse(A, condition)
    assert not failed.any()
    assert float((W - W.mT).abs().max()) <= 1e-5 * float(W.abs().max())
    # From Schur complements alone the worst would be 200 times as large, and more.
    assert error(W, A) < 4 * error(by_lapack(A), A) + 1e-6


@pytest.mark.parametrize("n", [1, 30, 200])
def test_the_factor_is_that_of_the_upper_triangle(n: int) -> None:
    A = positive(2, n, 50.0)
    V, failed = inverse_factor(A.triu() + torch.full_like(A, 1e3).tril(-1))
    U = torch.linalg.cholesky(A.double(), upper=True)
    assert not failed.any()
    assert torch.equal(V, V.triu())
    assert float((V.double() @ U - torch.eye(n)).abs().max()) < 1e-4


@pytest.mark.parametrize("n", [3, 100, LARGEST_BY_HALVES + 1])
@pytest.mark.parametrize("where", [0, -1])
@pytest.mark.parametrize("condition", [20.0, 1e6])
def test_a_matrix_that_is_not_positive_definite_is_told_and_spoils_no_other(
    n: int, where: int, condition: float
) -> None:
    A = torch.cat([positive(1, n, 10.0), torch.eye(n)[None], positive(1, n, 20.0)])
    A[1, where, where] = -1e-3
    W, failed = inverse(A, condition)
    assert failed.tolist() == [False, True, False]
    assert error(W[::2], A[::2]) < 1e-5


def test_products_invert_small_matrices_and_well_conditioned_ones() -> None:
    """LAPACK would take each of them in turn; it gets only small blocks, and large matrices of a bad condition."""
    seen: list[tuple[str, int]] = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name = func.overloadpacket.__name__
            if name in ("linalg_cholesky_ex", "cholesky_inverse", "linalg_solve_triangular", "bmm", "baddbmm"):
                seen.append((name, args[0].shape[-1]))
            return func(*args, **(kwargs or {}))

    for n, condition, largest in (
        (LARGEST_BY_HALVES, 1e6, 16),
        (LARGEST_BY_HALVES, 10.0, 16),
        (4 * LARGEST_BY_HALVES, 1e6, 4 * LARGEST_BY_HALVES),
        (4 * LARGEST_BY_HALVES, 10.0, SMALLEST_OF_LARGE),
    ):
        A = positive(1, n, 10.0)
        seen.clear()
        with Watching():
            inverse(A, condition)
        assert max(size for name, size in seen if "bmm" not in name) == largest


def test_a_device_that_does_not_factorise_fast_keeps_its_own_way() -> None:
    assert inverses.is_by_halves(torch.eye(8)[None])
    with precision.counted_as("cuda"):
        assert not inverses.is_by_halves(torch.empty(1, 8, 8, device="meta"))
    assert not inverses.is_by_halves(torch.empty(1, LARGEST_BY_HALVES + 1, LARGEST_BY_HALVES + 1, device="meta"))
