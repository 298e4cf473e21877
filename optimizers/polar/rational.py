"""The polar factor from inverses of the n x n Gram matrix, where a processor factorises fast.

polar(X) = X A^(-1/2) with A = X^T X. A rational function r(x) = x h(x^2) in partial fractions, h(a) = scale (1 + sum_j
w_j / (a + s_j)), takes one inverse (A + s_j I)^-1 for each pole, which Cholesky factors find in n^3 operations. Two
poles bring the singular values above 2^-11 of the Frobenius norm within 26 % of 1, two more within 8e-6, where
polynomials need seven steps with 22 products of 2 n^3.

Rounding: every entry of A is off by about eps of itself, which hides its small eigenvalues, the squares of the small
singular values. Where that matters there is a *restart* between the two functions: the second takes a fresh Gram matrix
A_1 of X_1 = X h_1(A), whose values are all near 1. Elsewhere A_1 = A h_1(A)^2 follows from what is at hand, and only A
and one product X Q have the size m x n. (docs/decisions, 2026-11-27, rational functions.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .coefficients import Rational, zolotarev
from .inverses import inverse
from .precision import Accuracy, Products
from .rows import HERE, Rows

RATIONALS: dict[Accuracy, tuple[Rational, ...]] = {
    "loose": zolotarev((2, 1), lower=2.0**-9, safety=1.05),
    "default": zolotarev((2, 2), lower=2.0**-11, safety=1.05),
    "tight": zolotarev((2, 3), lower=2.0**-11, safety=1.05),
}
"""The two functions. Singular values from `lower` times the Frobenius norm on arrive within 4e-4 of 1 (loose), 8e-6
(default) and 4e-8 (tight), before rounding."""

COUNTED: dict[Accuracy, float] = {"loose": 2.0**-16, "default": 2.0**-20, "tight": 2.0**-20}
"""The smallest eigenvalue of A, in terms of its trace, for which an error is stated (see polar.ERRORS)."""

MOST_HIDDEN: dict[Accuracy, float] = {"loose": 2500.0, "default": 500.0, "tight": 0.0}
"""Up to which ratio of the largest row norm of A to its smallest eigenvalue the restart is left out. That adds about
1.5e-7 times the ratio to the error of the singular values: 8e-5 (default) and 4e-4 (loose)."""

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

    if rows is not HERE:
        return _restarted(x, A, W, size, products, rows, accuracy)
    is_lost = ~(is_regular & _is_known(A, W[0], first.shifts[0], COUNTED[accuracy], MOST_HIDDEN[accuracy]))
    if A.is_meta or is_lost.all():
        return _restarted(x, A, W, size, products, rows, accuracy)
    Ah = _times_h_(first, A, W)
    h = _h_(first, W)
    A_1 = products.symmetric(Ah, h)
    del A, Ah
    h.div_(size.sqrt())
    X_1 = products.by_symmetric(x[is_lost], h[is_lost])
    A_1[is_lost] = products.symmetric(X_1.mT, X_1)
    h_1 = _h_(second, _inverses(A_1, second)[0])
    del A_1
    factor = products.by_symmetric(x, products.symmetric(h, h_1))
    factor[is_lost] = products.by_symmetric(X_1, h_1[is_lost])
    return factor


def _restarted(
    x: Tensor, A: Tensor, W: list[Tensor], size: Tensor, products: Products, rows: Rows, accuracy: Accuracy
) -> Tensor:
    """The factor with a restart of all matrices. A and W are used up."""
    first, second = RATIONALS[accuracy]
    X_1 = products.by_symmetric(x, _h_(first, W).div_(size.sqrt()))
    A_1 = rows.total(products.symmetric(X_1.mT, X_1, out=A))
    return products.by_symmetric(X_1, _h_(second, _inverses(A_1, second)[0]))


def _inverses(A: Tensor, r: Rational) -> tuple[list[Tensor], Tensor]:
    """(A + s I)^-1 for each shift, smallest first, and which matrices [k] were positive definite without a ridge.

    A has eigenvalues from 0 to 1, but for rounding; a ridge is added to it in place.
    """
    diagonal = A.diagonal(dim1=-2, dim2=-1)
    plain = diagonal.clone()

    def shifted(shift: float) -> tuple[Tensor, Tensor]:
        diagonal.copy_(plain + shift)
        return inverse(A, condition=1 + 1 / shift)

    found: list[Tensor] = []
    for shift in r.shifts:
        W, failed = shifted(shift)
        if not found:
            is_regular = ~failed
            for ridge in () if A.is_meta else RIDGES:
                if not failed.any():
                    break
                plain += ridge * failed[:, None]
                W, failed = shifted(shift)
        found.append(W)
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
    for W_j, weight, shift in zip(W, r.weights, r.shifts, strict=True):
        A.add_(W_j, alpha=-r.scale * weight * shift)
    A.diagonal(dim1=-2, dim2=-1).add_(r.scale * sum(r.weights))
    return A


def _is_known(A: Tensor, W: Tensor, shift: float, counted: float, limit: float) -> Tensor:
    """Whether [k] the largest row norm of A is at most `limit` times its smallest eigenvalue, by an estimate.

    Rounding errors of entries that are independent have about the spectral norm of the largest norm of a row. W is
    (A + shift I)^-1. Eigenvalues below `counted` need not arrive near 1: whatever rounding makes of them stays small.
    """
    smallest = (1 / _largest_eigenvalue(W) - shift).clamp(min=counted)
    return torch.linalg.vector_norm(A, dim=-1).amax(dim=-1) <= limit * smallest


def _largest_eigenvalue(A: Tensor) -> Tensor:
    """An estimate [k] of it from below, by power iteration from the row with the largest diagonal entry."""
    start = A.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)
    v = A[torch.arange(len(A), device=A.device), start].unsqueeze(-1)
    for _ in range(POWER_STEPS):
        v = torch.bmm(A, v / torch.linalg.vector_norm(v, dim=-2, keepdim=True))
    return torch.linalg.vector_norm(v, dim=(-2, -1))
