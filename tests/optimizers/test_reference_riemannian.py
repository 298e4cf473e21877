"""Riemannian Aurora in the reference, against what the geometry promises."""

import math

import pytest
import torch
from torch import Tensor

from optimizers import reference
from tests.optimizers.helpers import error, gaussian, low_rank, row_spread, uneven

TALL = [(16, 4), (40, 36), (9, 1), (60, 12)]


def alignment(u: Tensor, d: Tensor) -> float:
    """Tr(u^T d) over its largest value for a d with orthonormal columns."""
    return float((u * d).sum() / torch.linalg.svdvals(u).sum())


def orthonormality(d: Tensor) -> float:
    return float((d.T @ d - torch.eye(d.shape[1], dtype=torch.float64)).abs().max())


@pytest.mark.parametrize(("m", "n"), TALL)
def test_the_exact_multiplier_matrix_is_a_laplacian_with_the_constants_as_kernel(m: int, n: int) -> None:
    M = reference.multiplier_matrix(reference.muon(uneven(m, n)))
    assert float((M @ torch.ones(m, dtype=torch.float64)).abs().max()) < 1e-12
    assert error(M.T, M) < 1e-12
    assert float((M - torch.diag(M.diagonal())).max()) <= 0
    values = torch.linalg.eigvalsh(M)
    assert float(values[0]) > -1e-12
    assert float(values[1]) > 1e-6


def test_the_released_multiplier_matrix_by_hand() -> None:
    # Rows of squared norm 0.5, 0.5 and 1 against n/m = 2/3: the largest fourth power, 1, asks for a shift to 1.001.
    U = torch.tensor([[0.5**0.5, 0.0], [0.5**0.5, 0.0], [0.0, 1.0]], dtype=torch.float64)
    wanted = 1.001 * torch.eye(3) - torch.tensor([[0.25, 0.25, 0.0], [0.25, 0.25, 0.0], [0.0, 0.0, 1.0]])
    assert error(reference.multiplier_matrix(U, riemannian="released"), wanted) < 1e-6
    even = torch.full((4, 1), 0.5, dtype=torch.float64)
    wanted = 0.25 * torch.eye(4) - torch.full((4, 4), 1 / 16)
    assert error(reference.multiplier_matrix(even, riemannian="released"), wanted) < 1e-6


def test_conjugate_gradient_solves_definite_and_consistent_singular_systems() -> None:
    a = gaussian(8, 8)
    M, q = a @ a.T + torch.eye(8, dtype=torch.float64), gaussian(8, 1)[:, 0]
    assert error(reference.conjugate_gradient(M, q), torch.linalg.solve(M, q)) < 1e-8
    laplacian = reference.multiplier_matrix(reference.muon(gaussian(10, 3)))
    q = gaussian(10, 1)[:, 0]
    q = q - q.mean()
    assert error(laplacian @ reference.conjugate_gradient(laplacian, q), q) < 1e-7
    assert not reference.conjugate_gradient(torch.zeros(8, 8, dtype=torch.float64), gaussian(8, 1)[:, 0]).any()
    assert not reference.conjugate_gradient(M, torch.zeros(8, dtype=torch.float64)).any()


def test_the_tangent_keeps_both_constraints_to_first_order() -> None:
    u = uneven(24, 6)
    U = reference.aurora(u, iterations=60)
    Z = reference.tangent(u, U)
    assert float((U.T @ Z + Z.T @ U).abs().max()) < 1e-6
    assert float((U * Z).sum(dim=1).abs().max()) < 1e-6
    # An orthogonal projection: what is left is normal to the tangent, and tangents are kept.
    assert float(((u - Z) * Z).sum()) == pytest.approx(0.0, abs=1e-6 * float(u.norm() ** 2))
    assert error(reference.tangent(Z, U), Z) < 1e-6


@pytest.mark.parametrize(("m", "n"), [(64, 16), (60, 12), (40, 30)])
def test_riemannian_aligns_better_than_aurora_and_is_more_even_than_muon(m: int, n: int) -> None:
    u = uneven(m, n)
    muon, aurora = reference.muon(u), reference.aurora(u, iterations=40)
    d = reference.riemannian_aurora(u)
    assert orthonormality(d) < 1e-12
    assert row_spread(d) < row_spread(muon)
    assert alignment(u, d) > alignment(u, aurora)
    settled = reference.riemannian_aurora(u, outer_steps=60)
    assert row_spread(settled) < row_spread(d)
    # Both constraints hold now, and it is a better point than the one of the balance.
    assert alignment(u, settled) > alignment(u, aurora)


def test_no_outer_step_is_muon() -> None:
    u = uneven(12, 5)
    assert error(reference.riemannian_aurora(u, outer_steps=0), reference.muon(u)) < 1e-12


def test_the_released_form_loses_its_ascent_at_the_size_of_real_gradients() -> None:
    u = uneven(24, 6)
    projected = reference.muon(u)
    for _ in range(6):
        rows = projected / projected.norm(dim=1, keepdim=True) * math.sqrt(6 / 24)
        projected = reference.polar(rows)
    assert error(reference.riemannian_aurora(u * 1e-8, riemannian="released"), projected) < 1e-6
    assert error(reference.riemannian_aurora(u * 1e-8, riemannian="exact"), projected) > 1e-3


def test_riemannian_keeps_zero_rows_and_survives_degenerate_matrices() -> None:
    for u in (torch.cat([uneven(8, 3), torch.zeros(4, 3)]), torch.cat([uneven(3, 3), torch.zeros(4, 3)])):
        for form in ("exact", "released"):
            d = reference.riemannian_aurora(u, riemannian=form)
            assert bool(d.isfinite().all())
            assert not d[-4:].any()
    d = reference.riemannian_aurora(low_rank(12, 5, 2))
    assert float(d.square().sum()) == pytest.approx(2)
