"""Riemannian Aurora: climb towards u inside the set of matrices with orthonormal columns and rows of equal norm.

Aurora's row scaling finds *a* member of that set near u. This variant starts from the polar factor U of u and takes a
few steps of projected gradient ascent on <u, U>. The tangent space at U holds the changes that keep U^T U and the row
norms. The multipliers of the second condition, one per row, solve a linear system whose m x m matrix is never formed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..fields import option, takes_options
from ..polar import prescale
from .aurora import ScopedOptions
from .base import Direction, balances, form
from .muon import orthogonal

Variant = Literal["exact", "released"]

STEP_SIZE = 0.1
RETRACTIONS = 2
MOST_CG_STEPS, CG_TOLERANCE, SMALLEST_CURVATURE = 20, 1e-8, 1e-30
# The released system is shifted until its diagonal dominates by this margin.
RELEASED_MARGIN = 1e-3


@dataclass(frozen=True)
class RiemannianAuroraOptions(ScopedOptions):
    """The options of Riemannian Aurora."""

    direction: ClassVar[str] = "riemannian_aurora"

    riemannian: Variant = option(
        "exact",
        'Form of the ascent of riemannian_aurora. "released": that of the released code, which vanishes for gradients '
        "of real size.",
        group="parity",
    )
    outer_steps: int = option(3, "Ascent steps of riemannian_aurora, each with two polar calls.", low=1, unit="steps")

    def find(self, u: Tensor, row_state: Tensor | None) -> Direction:
        """`riemannian_aurora`."""
        m, n = u.shape[-2:]
        if not balances(self.scope, form(m, n)) or u.numel() == 0:
            return Direction.uncounted(orthogonal(u, self))
        x = u.detach().float()
        tall = (x if m > n else x.mT).reshape(-1, max(m, n), min(m, n))

        def factor(stack: Tensor) -> Tensor:
            return orthogonal(stack, self)

        start = prescale(tall) if self.riemannian == "exact" else tall
        d = ascend(start, factor, variant=self.riemannian, steps=self.outer_steps)
        return Direction.uncounted((d if m > n else d.mT).reshape(u.shape))


@takes_options(RiemannianAuroraOptions)
def riemannian_aurora(u: Tensor, options: RiemannianAuroraOptions) -> Tensor:
    """Climbs from polar(u) towards the direction nearest to u among those with orthonormal columns and even rows.

    Args:
        u: [..., m, n].

    Returns:
        [..., m, n] in fp32. Shapes outside `scope` get `muon`; square ones always do.

    Raises:
        OptionError: an option out of range.
    """
    return options.find(u, None).d


def ascend(u: Tensor, polar: Callable[[Tensor], Tensor], *, variant: Variant, steps: int) -> Tensor:
    """`steps` ascent steps from polar(u), each followed by two retractions: rows to sqrt(n/m), then polar.

    Args:
        u: [k, m, n] fp32, tall.
        polar: the polar factor of a stack in fp32.
        variant: "exact": u is brought to the Frobenius norm sqrt(n) first, and the multipliers solve with
            M = diag(row sums of P.P) - P.P, P = U U^T: a graph Laplacian, positive semi-definite, with the constants
            in its kernel.
            "released": no normalisation, so the ascent vanishes for small u, and M = r I - P.P with r = n/m raised
            until the diagonal dominates.
        steps: the number of ascent steps.

    Returns:
        [k, m, n] fp32, a polar factor. A step with a NaN or an infinity ends the ascent of its matrix; rows that are
        zero stay zero.
    """
    m, n = u.shape[-2:]
    if variant == "exact":
        norm = torch.linalg.vector_norm(u, dim=(-2, -1), keepdim=True)
        u = u * torch.where(norm > 0, n**0.5 / norm, 0.0)
    U = polar(u)
    climbing = torch.ones(len(u), 1, 1, dtype=torch.bool, device=u.device)
    for _ in range(steps):
        Z = _tangent(u, U, variant)
        climbing = climbing & Z.isfinite().all(dim=(-2, -1), keepdim=True)
        Y = U + STEP_SIZE * torch.where(climbing, Z, 0.0)
        for _ in range(RETRACTIONS):
            norms = torch.linalg.vector_norm(Y, dim=-1, keepdim=True)
            Y = polar(Y * torch.where(norms > 0, (n / m) ** 0.5 / norms, 0.0))
        U = torch.where(climbing, Y, U)
    return U


def _tangent(u: Tensor, U: Tensor, variant: Variant) -> Tensor:
    """The gradient u without its components outside the tangent space at U."""
    product = U.mT @ u
    S = (product + product.mT) / 2
    US = U @ S
    multipliers = _multipliers(U, ((u - US) * U).sum(dim=-1, keepdim=True), variant)
    return u - US + U @ (U.mT @ (multipliers * U)) - multipliers * U


def _multipliers(U: Tensor, q: Tensor, variant: Variant) -> Tensor:
    """lambda [k, m, 1] with M lambda = q, both centred, by conjugate gradients; 0 if that fails."""
    live = (U != 0).any(dim=-1, keepdim=True)

    def overlap(v: Tensor) -> Tensor:
        """(P.P) v, with P = U U^T."""
        return ((U @ (U.mT @ (v * U))) * U).sum(dim=-1, keepdim=True)

    if variant == "released":
        r = U.shape[-1] / U.shape[-2]
        largest = U.square().sum(dim=-1, keepdim=True).square().amax(dim=-2, keepdim=True)
        diagonal = r + (largest - r + RELEASED_MARGIN).clamp(min=0)
    else:
        # If U^T U = I, the row sums of P.P are |U_i|^2. Computed as sums, they keep the constants in the kernel even
        # for a U that is orthonormal only to a few digits.
        diagonal = overlap(torch.ones_like(q))

    def apply(v: Tensor) -> Tensor:
        return diagonal * v - overlap(v)

    q = _centred(q, live)
    x, residual, p = torch.zeros_like(q), q, q
    square = _dot(residual, residual)
    enough = CG_TOLERANCE**2 * square
    for _ in range(MOST_CG_STEPS):
        Mp = apply(p)
        curvature = _dot(p, Mp)
        # Matrices that have converged do not change any more, and nothing of theirs is divided by zero.
        going = (square > enough) & (curvature >= SMALLEST_CURVATURE)
        alpha = torch.where(going, square / torch.where(going, curvature, 1.0), 0.0)
        x, residual = x + alpha * p, residual - alpha * Mp
        before, square = square, torch.where(going, _dot(residual, residual), 0.0)
        p = residual + torch.where(going, square / torch.where(going, before, 1.0), 0.0) * p
    x = _centred(x, live)
    return torch.where(x.isfinite().all(dim=-2, keepdim=True), x, 0.0)


def _centred(v: Tensor, live: Tensor) -> Tensor:
    """v minus its mean over the rows that are not zero; 0 on the other rows."""
    mean = torch.where(live, v, 0.0).sum(dim=-2, keepdim=True) / live.sum(dim=-2, keepdim=True).clamp(min=1)
    return torch.where(live, v - mean, 0.0)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(dim=-2, keepdim=True)
