"""Measures of single neurons, as pure functions of one matrix.

A neuron of an MLP is a row of gate_proj, a row of up_proj and a column of down_proj. Two quantities show whether it is
still learning, each relative to the mean over the layer's neurons: its *leverage*, a property of the gradients, and the
squared norm of its row in the *direction* that the optimizer applied. For Muon they are the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

DEAD = 0.1
"""A neuron is dead if its leverage is below this share of the mean, and starved if its squared direction norm is."""

PERCENTILES = (1, 5, 50, 95, 99)

# Rounding an m x n matrix of Frobenius norm F to fp32 adds noise whose singular values reach about
# 2^-24 F / sqrt(min(m, n)); singular values count towards the rank only if they exceed it by this factor.
_ABOVE_ROUNDING = 4 * 2.0**-24


def leverage(b: Tensor) -> Tensor | None:
    """Return the leverage scores of the rows of a tall matrix, divided by their mean.

    They are the squared row norms of polar(b) (of the partial isometry if b is rank-deficient), which is the diagonal
    of b (b^T b)^+ b^T. They are computed in fp64 from b = Q R, as the squared row norms of Q, or, if b is
    rank-deficient, of Q U with R = U S V^T. The result is accurate to rounding at any condition number, unlike one from
    a Cholesky factor of b^T b, whose ridge is visible at condition numbers from 1e5.

    Args:
        b: [m, n], m > n, of any real floating dtype.

    Returns:
        [m] fp64 with mean 1, or None if leverage is undefined: b is zero, not finite, or of rank below n/2.

    Raises:
        ValueError: b is not tall (all rows of a square or wide polar factor have norm 1).
    """
    m, n = b.shape
    if m <= n:
        raise ValueError(f"leverage scores of a {m} x {n} matrix are all equal: expected more rows than columns")
    largest = b.detach().abs().max().double()
    if not (largest > 0 and largest.isfinite()):
        return None
    Q, R = torch.linalg.qr(b.detach().double() / largest)
    cut = _ABOVE_ROUNDING * torch.linalg.vector_norm(R) / n**0.5
    # 1/|R^-1|_F is a lower bound of the smallest singular value, and far cheaper to compute than all of them.
    inverse = torch.linalg.solve_triangular(R, torch.eye(n, dtype=R.dtype, device=R.device), upper=True)
    if 1 / torch.linalg.vector_norm(inverse) > cut:
        return relative(squared_rows(Q))
    U, sigma, _ = torch.linalg.svd(R)
    above = sigma > cut
    return None if 2 * int(above.sum()) < n else relative(squared_rows(Q @ U[:, above]))


def squared_rows(x: Tensor) -> Tensor:
    """Return the squared norms of the rows of x [m, n]: [m] fp64."""
    return x.detach().double().square().sum(dim=1)


def relative(values: Tensor) -> Tensor | None:
    """Divide non-negative values by their mean; None if they are all zero or not all finite."""
    mean = values.double().mean()
    return values.double() / mean if mean > 0 and mean.isfinite() else None


def share_below(values: Tensor | None, threshold: float) -> float | None:
    """Return the share of relative values below a threshold."""
    return None if values is None else float((values < threshold).double().mean())


def variation(values: Tensor | None) -> float | None:
    """Return the coefficient of variation: standard deviation over mean."""
    return None if values is None else float(values.std(correction=0) / values.mean())


def percentiles(values: Tensor | None) -> dict[str, float | None]:
    """Return the `PERCENTILES` of the values under the names `p01`, `p05`, ...; all None if there are no values."""
    names = [f"p{percent:02d}" for percent in PERCENTILES]
    if values is None:
        return dict.fromkeys(names)
    points = torch.tensor(PERCENTILES, dtype=torch.float64, device=values.device) / 100
    return dict(zip(names, torch.quantile(values.double(), points).tolist(), strict=True))
