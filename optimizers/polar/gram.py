"""The polar factor from the n x n Gram matrix: only two products per restart have the size m x n.

In fp32 on a CPU rational functions find it (see `rational`), otherwise polynomials:

polar(X) = X (X^T X)^(-1/2). An odd polynomial p(x) = x r(x^2) of X is X R with R = r(A) and A = X^T X, and the Gram
matrix of the result is R A R. So a chain of polynomials needs only n x n products, collected in Q, and one product X Q
at the end. All matrices in between are polynomials of A: they are symmetric and commute.

Rounding: A holds the squares of the singular values, so the small ones are lost in it, and A <- R A R multiplies the
error of a value that should be 0 by up to 68 per step, until it is large and negative. A *restart* forms X Q, and a
fresh A from it, before that happens. How often that is needed was measured (docs/decisions, 2026-11-22, Gram
iteration): in bf16, whose products keep 8 bits, the first steps cannot be joined at all. Q is kept as q I + Q', since
rounding the share of the identity would cost 0.4 % in bf16. In the short types a last step X <- X - X E / 2, with the
residual E = X^T X - I, removes most of what rounding left. In bf16, rounding X itself would be the largest error of
all, in the directions of the small singular values. Therefore the first product X Q takes X in two parts: its rounded
value and the rest. (After that product the small values are larger. The Gram matrix, in which they are lost anyway, is
that of the first part.)
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .coefficients import Quintic, polar_express
from .precision import Accuracy, Products
from .rational import rational_polar
from .rows import HERE, Rows

CHAINS: dict[Accuracy, tuple[Quintic, ...]] = {
    "loose": polar_express(5, lower=2.0**-8, cushion=0.024, safety=1.01),
    "default": polar_express(7, lower=2.0**-11, cushion=0.024, safety=1.01),
    "tight": polar_express(8, lower=2.0**-12, cushion=0.024, safety=1.01),
}
"""The polynomials. Singular values from `lower` times the Frobenius norm on arrive within 2e-3 of 1 (loose), 2e-5
(default) and 1e-8 (tight), before rounding."""
EXPRESS = CHAINS["default"]

SEGMENTS: dict[Accuracy, dict[torch.dtype, tuple[int, ...]]] = {
    "loose": {torch.float32: (2, 3), torch.float16: (2, 3), torch.bfloat16: (1, 1, 1, 2)},
    "default": {torch.float32: (3, 4), torch.float16: (2, 2, 3), torch.bfloat16: (1, 1, 1, 2, 2)},
    "tight": {torch.float32: (3, 3, 2)},
}
"""The number of steps between restarts, by dtype of the products."""


def gram_polar(
    x: Tensor, dtype: torch.dtype, even: Callable[[Tensor], Tensor] | None = None, accuracy: Accuracy = "default"
) -> Tensor:
    """The polar factor of a stack [k, m, n], scaled by its Frobenius norm first, with all products in `dtype`.

    Two rational functions where the device factorises fast and `dtype` is fp32. Otherwise 5, 7 or 8 steps of Polar
    Express with restarts, and the residual step where products are short, unless the accuracy is "loose", and where it
    is "tight". With `even` there is a residual step in any case.
    """
    is_wide = x.shape[-2] < x.shape[-1]
    factor = tall_gram_polar((x.mT if is_wide else x).float(), dtype, even=even, accuracy=accuracy)
    return factor.mT if is_wide else factor


def tall_gram_polar(
    tall: Tensor,
    dtype: torch.dtype,
    rows: Rows = HERE,
    even: Callable[[Tensor], Tensor] | None = None,
    accuracy: Accuracy = "default",
) -> Tensor:
    """`gram_polar` of an fp32 stack of tall or square matrices. `rows` may cover more rows than these.

    `even` takes the factor and returns factors of its rows, [k, m, 1], near 1. The rows are scaled by them before the
    residual step, which brings the columns back.
    """
    products = Products.on(tall.device, dtype)
    is_short = dtype != torch.float32
    if products.spelling.factorises and not is_short:
        X, has_residual = rational_polar(tall, products, rows, accuracy), False
    else:
        X = _by_polynomials(tall, products, rows, accuracy)
        has_residual = accuracy == "tight" or (accuracy == "default" and is_short)
    return _without_residual(X, products, rows, even) if has_residual or even is not None else X.float()


def _by_polynomials(tall: Tensor, products: Products, rows: Rows, accuracy: Accuracy) -> Tensor:
    """The factor before the residual step, in the form of the products."""
    first, *others = CHAINS[accuracy]
    # A power of two near sqrt(n) keeps the first Gram matrix out of fp16's smallest numbers (and, up to 2^7, below its
    # largest); the first polynomial takes it out again.
    size = 2.0 ** min(tall.shape[-1].bit_length() // 2, 7)
    scaled = tall * (size / rows.norm(tall))
    X = products.tall(scaled)
    rest = products.tall(scaled - X) if products.dtype == torch.bfloat16 else None
    del scaled
    polynomials = (first.stretched(size), *others)
    spare, A = torch.empty_like(X), _gram_like(X)
    step = 0
    for length in SEGMENTS[accuracy][products.dtype]:
        A = products.settle(rows.total(products.symmetric(X.mT, X, out=A)))
        share, Q = _chain(polynomials[step : step + length], A, products)
        products.by_symmetric(X, Q, c=X, beta=share, out=spare)
        if rest is not None:
            products.by_symmetric(rest, Q, c=spare, out=spare)
            products.settle(spare.add_(rest, alpha=share))
            rest = None
        X, spare = spare, X
        step += length
    return X


def inverse_sqrt(A: Tensor) -> Tensor:
    """A^(-1/2) of a stack of positive definite matrices [k, n, n] in fp32, by the same chain without a restart.

    A needs a ridge: where its eigenvalues are below the rounding error of its largest they become negative.
    """
    products = Products.on(A.device, torch.float32)
    # The trace bounds the largest eigenvalue as the squared Frobenius norm of X does for X^T X.
    size = A.diagonal(dim1=-2, dim2=-1).sum(dim=-1)[:, None, None]
    share, Q = _chain(EXPRESS, A / size, products)
    Q.diagonal(dim1=-2, dim2=-1).add_(share)
    return Q / size.sqrt()


def _chain(polynomials: Sequence[Quintic], A: Tensor, products: Products) -> tuple[float, Tensor]:
    """q and Q' with q I + Q' = r_1(A) r_2(A_1) ... for the polynomials x r_i(x^2) in turn. A is overwritten."""
    R, spare = torch.empty_like(A), torch.empty_like(A)
    q, Q = 1.0, R
    for i, (a, b, c) in enumerate(polynomials):
        # R is r(A) without the share of the identity: r(A) = a I + R.
        products.symmetric(A, A, c=A, beta=b, alpha=c, out=R)
        if i:
            # (q I + Q)(a I + R) = q a I + (q R + a Q) + Q R
            products.settle(torch.mul(Q, a, out=spare).add_(R, alpha=q))
            products.symmetric(Q, R, c=spare, out=spare)
            Q, spare = spare, Q
        q *= a
        if i + 1 < len(polynomials):
            products.symmetric(A, R, c=A, beta=a, out=spare)
            products.symmetric(spare, R, c=spare, beta=a, out=A)
            R = torch.empty_like(A) if i == 0 else R
    return q, Q


def _without_residual(
    X: Tensor, products: Products, rows: Rows, even: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    """X - X E / 2 in fp32 with E = X^T X - I: the Newton step, which squares the distance from orthogonality.

    With `even`, X (I - E/2 + 3 E^2/8) of the scaled X, which cubes it.

    Off the diagonal E is small, and so are its rounding errors. Its diagonal is a difference of numbers near 1, so it
    is computed from sums of squares in fp32.
    """
    full = X.float()
    if even is not None:
        full = even(full) * full
        X = products.tall(full)
    E = rows.total(products.symmetric(X.mT, X))
    E.diagonal(dim1=-2, dim2=-1).copy_(rows.sum(full.square())[..., 0, :] - 1)
    products.settle(E)
    if even is not None:
        # Evened rows leave a residual of some per cent: one more term of (I + E)^(-1/2) = I - E/2 + 3 E^2/8 - ...
        E = products.symmetric(E, E, c=E, alpha=-0.75)
    return torch.add(full, products.by_symmetric(X, E).float(), alpha=-0.5)


def _gram_like(X: Tensor) -> Tensor:
    return X.new_empty(X.shape[0], X.shape[-1], X.shape[-1])
