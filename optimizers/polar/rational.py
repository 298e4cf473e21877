"""The polar factor from inverses of the n x n Gram matrix, where a processor factorises fast.

polar(X) = X A^(-1/2) with A = X^T X. A rational function r(x) = x h(x^2) in partial fractions, h(a) = scale (1 + sum_j
w_j / (a + s_j)), takes one inverse (A + s_j I)^-1 for each pole, which a Cholesky factor finds in n^3 operations. Two
poles bring the singular values above 2^-11 of the Frobenius norm within 26 % of 1, two more within 8e-6, where
polynomials need seven steps with 22 products of 2 n^3.

Rounding: A holds the squares of the singular values, so it knows the smallest to about eps kappa^2 / 3, with kappa the
largest over the smallest. Where that matters there is a *restart* between the two functions: the second takes a fresh
Gram matrix A_1 of X_1 = X h_1(A), whose values are all near 1. Where kappa is small, A_1 = A h_1(A)^2 follows from what
is at hand, and only A and one product X Q have the size m x n. (docs/decisions, 2026-11-27, rational functions.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .coefficients import Rational, zolotarev
from .precision import Accuracy, Products
from .rows import HERE, Rows

RATIONALS: dict[Accuracy, tuple[Rational, ...]] = {
    "loose": zolotarev((2, 1), lower=2.0**-9, safety=1.05),
    "default": zolotarev((2, 2), lower=2.0**-11, safety=1.05),
    "tight": zolotarev((2, 3), lower=2.0**-11, safety=1.05),
}
"""The two functions. Singular values from `lower` times the Frobenius norm on arrive within 4e-4 of 1 (loose), 8e-6
(default) and 4e-8 (tight), before rounding."""

LARGEST_DIRECT: dict[Accuracy, float] = {"loose": 200.0, "default": 20.0, "tight": 0.0}
"""The condition number up to which the restart is left out, which changes the direction by at most 3e-5 (default) and
4e-4 (loose) of its norm."""

POWER_STEPS = 4
# What is added to A, in terms of its trace, if rounding has left it indefinite. X_1 is then a little less even.
RIDGES = (2.0**-18, 2.0**-16, 2.0**-14)


def rational_polar(tall: Tensor, products: Products, rows: Rows = HERE, accuracy: Accuracy = "default") -> Tensor:
    """The polar factor of a stack [k, m, n] of tall or square matrices in fp32, at any scale.

    `rows` may cover more rows than these. Then there is a restart in any case, so that it is known beforehand what is
    summed over the processes.
    """
    first, second = RATIONALS[accuracy]
    x = tall if tall.is_contiguous() or tall.mT.is_contiguous() else tall.contiguous()
    A = rows.total(products.symmetric(x.mT, x))
    trace = A.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[:, None, None]
    size = torch.where(trace > 0, trace, 1.0)
    A.div_(size)
    W, is_regular = _inverses(A, first)

    # Both use up A and W, so that their memory is free for what follows.
    def direct(x: Tensor, A: Tensor, W: list[Tensor], size: Tensor) -> Tensor:
        Ah = _times_h_(first, A, W)
        h = _h_(first, W)
        h_1 = _h_(second, _inverses(products.symmetric(Ah, h), second)[0])
        return products.by_symmetric(x, products.symmetric(h, h_1, out=Ah).div_(size.sqrt()))

    def restarted(x: Tensor, A: Tensor, W: list[Tensor], size: Tensor) -> Tensor:
        X_1 = products.by_symmetric(x, _h_(first, W).div_(size.sqrt()))
        A_1 = rows.total(products.symmetric(X_1.mT, X_1, out=A))
        return products.by_symmetric(X_1, _h_(second, _inverses(A_1, second)[0]))

    if rows is not HERE:
        return restarted(x, A, W, size)
    is_direct = is_regular & _is_conditioned(A, W[0], first.shifts[0], LARGEST_DIRECT[accuracy])
    if A.is_meta:
        return restarted(x, A, W, size)
    ways = ((direct, is_direct), (restarted, ~is_direct))
    for way, chosen in ways:
        if chosen.all():
            return way(x, A, W, size)
    parts = [(way, chosen, A[chosen], [inverse[chosen] for inverse in W], size[chosen]) for way, chosen in ways]
    del A
    W.clear()
    factor = torch.empty_like(x)
    while parts:
        way, chosen, own_A, own_W, own_size = parts.pop()
        factor[chosen] = way(x[chosen], own_A, own_W, own_size)
    return factor


def _inverses(A: Tensor, r: Rational) -> tuple[list[Tensor], Tensor]:
    """(A + s I)^-1 for each shift, smallest first, and which matrices [k] were positive definite without a ridge.

    A is positive semidefinite but for rounding; a ridge is added to it in place.
    """
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    plain = diagonal.clone()

    def factor(shift: float) -> tuple[Tensor, Tensor]:
        # cholesky_ex copies what it is given.
        diagonal.copy_(plain + shift)
        U, info = torch.linalg.cholesky_ex(A, upper=True)
        return U, info > 0

    found: list[Tensor] = []
    for shift in r.shifts:
        U, failed = factor(shift)
        if not found:
            is_regular = ~failed
            for ridge in () if A.is_meta else RIDGES:
                if not failed.any():
                    break
                plain += ridge * failed[:, None]
                U, failed = factor(shift)
        # LAPACK's columns are our rows; the inverse is symmetric.
        found.append(torch.cholesky_inverse(U, upper=True).mT)
        del U
    diagonal.copy_(plain)
    return found, is_regular


def _h_(r: Rational, W: list[Tensor]) -> Tensor:
    """h(A) from the inverses W, in the memory of the first; W is empty then."""
    h = W.pop(0).mul_(r.scale * r.weights[0])
    for weight in r.weights[1:]:
        h.add_(W.pop(0), alpha=r.scale * weight)
    h.diagonal(dim1=-2, dim2=-1).add_(r.scale)
    return h


def _times_h_(r: Rational, A: Tensor, W: Sequence[Tensor]) -> Tensor:
    """A h(A) in the memory of A, without a product: A (A + s I)^-1 = I - s (A + s I)^-1."""
    A.mul_(r.scale)
    for inverse, weight, shift in zip(W, r.weights, r.shifts, strict=True):
        A.add_(inverse, alpha=-r.scale * weight * shift)
    A.diagonal(dim1=-2, dim2=-1).add_(r.scale * sum(r.weights))
    return A


def _is_conditioned(A: Tensor, inverse: Tensor, shift: float, limit: float) -> Tensor:
    """Whether [k] kappa(X) <= limit by estimates, and the smallest eigenvalue of A = X^T X is at least the shift.

    `inverse` is (A + shift I)^-1. Below the shift an eigenvalue would be the difference of numbers that nearly agree.
    """
    smallest = 1 / _largest_eigenvalue(inverse) - shift
    return smallest >= torch.clamp(_largest_eigenvalue(A) / limit**2, min=shift) if limit else smallest > torch.inf


def _largest_eigenvalue(A: Tensor) -> Tensor:
    """An estimate [k] of it from below, by power iteration from the row with the largest diagonal entry."""
    start = A.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)
    v = A[torch.arange(len(A), device=A.device), start].unsqueeze(-1)
    for _ in range(POWER_STEPS):
        v = torch.bmm(A, v / torch.linalg.vector_norm(v, dim=-2, keepdim=True))
    return torch.linalg.vector_norm(v, dim=(-2, -1))
