"""Leverage scores: the squared row norms of polar(X). All polar calls of Aurora but the last serve only to find them.

l_i = x_i (X^T X)^-1 x_i^T needs only a factorisation of the n x n Gram matrix. The rows of X = D u have norms near 1,
so X is well conditioned even if u is not. Every function takes a tall stack X [k, m, n] in fp32 and returns the scores
[k, m, 1] in fp32 with the number of retries [k]. `rows` may cover more rows than these.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..polar.gram import inverse_sqrt
from ..polar.inverses import inverse_factor, is_by_halves
from ..polar.precision import as_stated, gram_matrix
from ..polar.rows import HERE, Rows

RIDGES = (1e-8, 1e-6)
"""Shares of the trace that are added to the diagonal of a Gram matrix; the second is used if the Cholesky factorisation
fails with the first. They are about the rounding error of an fp32 Gram matrix. Without them a rank-deficient matrix has
no factor."""


def from_polar(factor: Tensor) -> tuple[Tensor, Tensor]:
    """The squared row norms of polar(X) [k, m, n], from any backend."""
    return factor.square().sum(dim=-1, keepdim=True), torch.zeros(len(factor), dtype=torch.int64, device=factor.device)


def from_cholesky(
    x: Tensor, fallback: Callable[[Tensor], tuple[Tensor, Tensor]], rows: Rows = HERE, *, each_alone: bool = False
) -> tuple[Tensor, Tensor]:
    """|L^-1 x_i|^2 with L L^T = X^T X + ridge: 2 m n^2 for the Gram matrix, m n^2 to solve, n^3 / 3.

    Where n is small on a CPU, a product with the inverse, of 2 m n^2, is faster than to solve.

    How products round depends on the place of a matrix in its stack. With `each_alone` there is one matrix at a time,
    in memory of its own.

    If the factorisation fails with the first ridge, the second is tried; if that fails too, `fallback` finds the
    scores. Each of these is one retry. Checking whether it failed waits for the device.
    """
    if each_alone and len(x) > 1:
        each = [from_cholesky(matrix.clone(), fallback, rows, each_alone=True) for matrix in x.split(1)]
        return torch.cat([scores for scores, _ in each]), torch.cat([retries for _, retries in each])
    with torch.no_grad(), as_stated(x.device):
        A = rows.total(gram_matrix(x))
        by_halves = is_by_halves(A) and not each_alone
        factor, failed = _factor(A, RIDGES[0], by_halves)
        retries = failed.long()
        if _any(failed):
            again, failed_again = _factor(A, RIDGES[1], by_halves)
            factor = torch.where(failed[:, None, None], again, factor)
            failed, retries = failed & failed_again, retries + (failed & failed_again)
        solve = torch.linalg.solve_triangular
        scores = _squared_rows(torch.bmm(x, factor) if by_halves else solve(factor, x, upper=True, left=False))
        if _any(failed):
            scores[failed] = fallback(x[failed])[0]
    return scores, retries


def from_gram(x: Tensor, rows: Rows = HERE) -> tuple[Tensor, Tensor]:
    """The squared row norms of X (X^T X + ridge)^(-1/2), by matrix products only and without waiting for the device."""
    with torch.no_grad(), as_stated(x.device):
        Q = inverse_sqrt(_ridged(rows.total(gram_matrix(x)), RIDGES[0]))
        scores = _squared_rows(torch.bmm(x, Q))
    return scores, torch.zeros(len(x), dtype=torch.int64, device=x.device)


def _factor(A: Tensor, ridge: float, by_halves: bool) -> tuple[Tensor, Tensor]:
    """L^T of A with a ridge, or by halves its inverse; and which of them failed, which must not be used."""
    ridged = _ridged(A, ridge)
    if by_halves:
        return inverse_factor(ridged)
    L, info = torch.linalg.cholesky_ex(ridged)
    return L.mT, info > 0


def _ridged(A: Tensor, ridge: float) -> Tensor:
    ridged = A.clone()
    # A zero matrix has trace 0; with 1 on its diagonal its scores are zeros, as they should be.
    trace = A.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    ridged.diagonal(dim1=-2, dim2=-1).add_(torch.where(trace > 0, ridge * trace, 1.0)[:, None])
    return ridged


def _squared_rows(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()


def _any(flags: Tensor) -> bool:
    """Whether any flag is true; False for a tensor without data."""
    return flags.device.type != "meta" and bool(flags.any())
