"""Inverses of stacks of positive definite matrices [k, n, n] in fp32, as a processor finds them fastest."""

import torch
from torch import Tensor

from .precision import Products

LARGEST_BY_HALVES = 256
"""The largest n for `inverse_factor`, on a CPU. LAPACK takes the matrices of a stack one after the other, and small
ones at a tenth of the speed of products: an inverse takes it 2.5 times as long for n = 128, as long for n = 512."""
LARGEST_CONDITION = 50.0
"""Up to which condition number an inverse comes from Schur complements, whose error grows with its square: three times
that of LAPACK at 300."""

SMALLEST, SMALLEST_OF_LARGE = 24, 64
"""Blocks of at most so many rows, up to LARGEST_BY_HALVES and above, are LAPACK's."""


def is_by_halves(A: Tensor) -> bool:
    """Whether products find inverses of these matrices fastest."""
    return A.shape[-1] <= LARGEST_BY_HALVES and Products.on(A.device, torch.float32).spelling.factorises


def inverse(A: Tensor, condition: float) -> tuple[Tensor, Tensor]:
    """A^-1, and which matrices [k] turned out not to be positive definite; those are not inverted.

    `condition` bounds the condition numbers. Up to LARGEST_CONDITION the inverse takes about two thirds of the time.
    """
    by_halves = is_by_halves(A)
    if condition <= LARGEST_CONDITION:
        smallest = SMALLEST if by_halves else SMALLEST_OF_LARGE
        return _by_schur_complements(A, Products.on(A.device, A.dtype), smallest)
    if by_halves:
        V, failed = inverse_factor(A)
        return torch.bmm(V, V.mT), failed
    return _by_lapack(A)


def _by_lapack(A: Tensor) -> tuple[Tensor, Tensor]:
    U, info = torch.linalg.cholesky_ex(A, upper=True)
    # LAPACK's columns are our rows; the inverse is symmetric.
    return torch.cholesky_inverse(U, upper=True).mT, info > 0


def _by_schur_complements(A: Tensor, products: Products, smallest: int) -> tuple[Tensor, Tensor]:
    """From the inverse P of the first half and the inverse R of its Schur complement S."""
    n = A.shape[-1]
    if n <= smallest:
        return _by_lapack(A)
    half = n // 2
    P, failed_1 = _by_schur_complements(A[:, :half, :half], products, smallest)
    B = A[:, :half, half:]
    Q = products.mm(P, B)
    S = products.symmetric(B.mT, Q, c=A[:, half:, half:], alpha=-1)
    R, failed_2 = _by_schur_complements(S, products, smallest)
    W = torch.empty_like(A, memory_format=torch.contiguous_format)
    T = products.mm(Q, R)
    W[:, :half, :half] = products.symmetric(T, Q.mT, c=P)
    W[:, half:, half:] = R
    W[:, :half, half:] = T.neg_()
    W[:, half:, :half] = T.mT
    return W, failed_1 | failed_2


def inverse_factor(A: Tensor) -> tuple[Tensor, Tensor]:
    """V = U^-1 for the upper Cholesky factor U of A, so that V V^T = A^-1; and which matrices [k] have none.

    By halves, so that nearly all of it is products of whole stacks. Only the upper triangle of A is read. The Schur
    complement comes from U and not from the inverse of a block of A, whose condition number is the square.
    """
    n = A.shape[-1]
    if n <= SMALLEST:
        U, info = torch.linalg.cholesky_ex(A, upper=True)
        eye = torch.eye(n, dtype=A.dtype, device=A.device).expand_as(U)
        return torch.linalg.solve_triangular(U, eye, upper=True), info > 0
    half = n // 2
    V_1, failed_1 = inverse_factor(A[:, :half, :half])
    U_12 = torch.bmm(V_1.mT, A[:, :half, half:])
    V_2, failed_2 = inverse_factor(torch.baddbmm(A[:, half:, half:], U_12.mT, U_12, alpha=-1))
    V = torch.zeros_like(A, memory_format=torch.contiguous_format)
    V[:, :half, :half] = V_1
    V[:, half:, half:] = V_2
    V[:, :half, half:] = torch.bmm(torch.bmm(V_1, U_12), V_2).neg_()
    return V, failed_1 | failed_2
