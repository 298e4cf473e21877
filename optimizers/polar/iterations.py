"""Polar iterations on the matrix itself: X <- p(X), a few odd polynomials p in turn.

An odd quintic of a wide X is X <- a X + (b A + c A^2) X with A = X X^T: two products of the size of X and one of the
size of A. All functions take and return a stack [k, m, n]. They divide it by its Frobenius norm first, which brings all
singular values into [0, 1].
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .coefficients import Quintic, cans, polar_express
from .precision import Products

QUINTIC = Quintic(2.0, -1.5, 0.5)
"""The released code's polynomial: p(1) = 1, p'(1) = 0, and small values double."""
QUINTIC_STEPS = 12

# Guards the division by the Frobenius norm, as in the released code.
NORM_EPS = 1e-7

# 2^-12: with this safety, everything above 2^-11 of the Frobenius norm arrives near 1 (see polar.ERRORS).
EXPRESS = polar_express(7, lower=2.0**-12, cushion=0.024, safety=1.01)
PRECISE = cans(2.0**-11, 1e-6, cushion=0.1)


def quintic(x: Tensor, dtype: torch.dtype) -> Tensor:
    """12 steps of `QUINTIC`: the reference, with every product computed in full, as in the released code."""
    return _iterate(x, [QUINTIC] * QUINTIC_STEPS, Products.on(x.device, dtype, mirrored=False))


def express(x: Tensor, dtype: torch.dtype) -> Tensor:
    """7 steps of Polar Express."""
    return _iterate(x, EXPRESS, Products.on(x.device, dtype))


def precise(x: Tensor, dtype: torch.dtype) -> Tensor:
    """CANS: cubics until everything above 2^-11 of the Frobenius norm is within 1e-6 of 1, then rounding decides."""
    return _iterate(x, PRECISE, Products.on(x.device, dtype))


def released_quintic(X: Tensor) -> Tensor:
    """The released iteration on one wide bf16 matrix [m, n]: every operation rounded to bf16, in the same order.

    The strides matter too: they decide the order in which products and sums run.
    """
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + NORM_EPS)
    for _ in range(QUINTIC_STEPS):
        A = X @ X.mT
        B = -1.5 * A + (0.5 * A) @ A
        X = 2 * X + B @ X
    return X


def _iterate(x: Tensor, polynomials: Iterable[Quintic], products: Products) -> Tensor:
    """The polynomials in turn on the wide orientation."""
    tall = x.shape[-2] > x.shape[-1]
    wide = (x.mT if tall else x).float()
    X = products.round_(wide / (torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True) + NORM_EPS))
    spare, A, B = torch.empty_like(X), _square_like(X), _square_like(X)
    for p in polynomials:
        products.symmetric(X, X.mT, out=A)
        if p.c:
            products.symmetric(A, A, c=A, beta=p.b, alpha=p.c, out=B)
            products.mm_add(X, B, X, beta=p.a, out=spare)
        else:
            products.mm_add(X, A, X, beta=p.a, alpha=p.b, out=spare)
        X, spare = spare, X
    return X.mT if tall else X


def _square_like(X: Tensor) -> Tensor:
    return X.new_empty(*X.shape[:-1], X.shape[-2])
