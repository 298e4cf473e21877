"""The row scaling D for which polar(D u) has even row norms.

For a tall u [m, n] Aurora wants a direction with orthonormal columns and every row of norm sqrt(n/m).
polar(D u) has orthonormal columns for any D; its squared row norms l_i are the leverage scores of D u.
This module changes D until they are even, and takes l from a function. It acts row by row, so it also runs on a stack
[..., m, n].
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..polar.rows import HERE, Rows

BalanceRule = Literal["odds", "tyler"]
EpsMode = Literal["relative", "absolute"]

# Smallest row norm that is still divided by: a share of the largest (relative), or as it is (absolute).
ROW_NORM_EPS = 1e-7
# Leverage lies in (0, 1); the odds rule needs it away from the ends.
LEVERAGE_MARGIN = 1e-6
# The released code's lower bound of l, which only keeps the division finite.
SMALLEST_LEVERAGE = 1e-14
# Mean leverage above which the rows have no freedom left to be balanced.
NO_FREEDOM = 0.999
# Spreads that differ by less than the resolution of bf16 differ by rounding, not because a step went wrong.
SPREAD_RESOLUTION = 2.0**-8


class RowScale(NamedTuple):
    """The scaling, and how it was found."""

    D: Tensor
    """[..., m, 1] in the dtype of u, zero on rows of u that are zero."""
    fallbacks: Tensor
    """[...] int64: how many steps of the odds rule were undone and replaced by a tyler step."""


def balance(
    u: Tensor,
    leverage: Callable[[Tensor], Tensor],
    *,
    updates: int,
    rule: BalanceRule = "odds",
    beta: float = 0.5,
    eps_mode: EpsMode = "relative",
    tolerance: float | None = None,
    rows: Rows = HERE,
) -> RowScale:
    """Start at D_i = 1/|u_i| and update D `updates` times from the leverage scores of D u.

    Args:
        u: [..., m, n] fp32 or fp64, tall (m > n), at a scale where its row norms neither overflow nor underflow.
        leverage: takes D [..., m, 1] and returns the leverage scores of D u, [..., m, 1] in fp32.
        updates: one less than the polar calls K of a direction. With 0 the rows are only normalised.
        rule: "tyler", D_i <- D_i (t/l_i)^beta, the fixed-point iteration of Tyler's M-estimator; or "odds",
            D_i <- D_i sqrt(t/(1-t) (1-l_i)/l_i), which sets each row exactly while the others are held, as
            l_i/(1-l_i) is linear in D_i^2 (Sherman-Morrison). t is the mean of l over the rows that are
            not zero. Both have the same fixed point.
        beta: the power of the tyler rule; 0.5 is the undamped step. Not used by "odds".
        eps_mode: "relative" floors row norms at 1e-7 of the largest. "absolute" floors them at 1e-7 and
            takes t = n/m, as the released code does (t scales all of D alike, which polar does not see).
        tolerance: keep D once every row norm of polar(D u) is within this share of sqrt(t); None: never.
        rows: reductions over all rows; u may hold only some of them ("absolute" needs all).

    Rows that are exactly zero keep D = 0. If t > 0.999, D does not change ("absolute" has no such rule): there is no
    freedom to balance with.

    If a step of the odds rule raises the spread of the row norms (their deviation over their mean) by more than 2^-8,
    it is undone, a tyler step is taken instead, and that is counted. This shows at the next evaluation of `leverage`,
    so the last step is not checked; with one update the rule is never checked. (With exact scores, a search of a
    million random matrices found no such step; rounding causes them from condition 1e4 on.)
    """
    live = (u != 0).any(dim=-1, keepdim=True)
    live_rows = rows.sum(live).clamp(min=1)
    D = _initial_scale(u, live, eps_mode, rows)
    fallbacks = torch.zeros(u.shape[:-2], dtype=torch.int64, device=u.device)
    before: tuple[Tensor, Tensor, Tensor] | None = None
    settled = torch.zeros_like(live_rows, dtype=torch.bool)
    for _ in range(updates):
        scores = torch.where(live, leverage(D), 0.0)
        spread = _spread(scores, live, live_rows, rows)
        mean = rows.sum(scores) / live_rows
        if tolerance is not None:
            settled = settled | _is_even(scores, mean, live, tolerance, rows)
            # Looking is free on a CPU. It would stall the queue of an accelerator, where D just stays as it is.
            if D.device.type == "cpu" and bool(settled.all()):
                break
        raised = torch.zeros_like(settled)
        if rule == "odds" and before is not None:
            raised = (spread > before[2] + SPREAD_RESOLUTION) & ~settled
            D, scores, spread = (
                torch.where(raised, old, new) for old, new in zip(before, (D, scores, spread), strict=True)
            )
            fallbacks += raised[..., 0, 0]
        before = (D, scores, spread)
        mean = rows.sum(scores) / live_rows
        free = live & (mean <= NO_FREEDOM)
        floored = scores.clamp(min=SMALLEST_LEVERAGE)
        ratio = mean / floored
        if eps_mode == "absolute":
            mean, free = torch.full_like(mean, u.shape[-1] / u.shape[-2]), live
            # With a number for t, torch multiplies by a reciprocal, which rounds otherwise than a division.
            ratio = (u.shape[-1] / u.shape[-2]) / floored
        stepped = D * ratio.pow(beta if rule == "tyler" else 0.5)
        if rule == "odds":
            stepped = torch.where(raised, stepped, D * _odds_factor(mean, scores))
        D = torch.where(free & ~settled, stepped, D)
    return RowScale(D, fallbacks)


def _initial_scale(u: Tensor, live: Tensor, eps_mode: EpsMode, rows: Rows) -> Tensor:
    norms = torch.linalg.vector_norm(u, dim=-1, keepdim=True)
    if eps_mode == "absolute":
        floored = norms.clamp(min=ROW_NORM_EPS)
    else:
        floored = torch.maximum(norms, ROW_NORM_EPS * rows.max(norms))
    return torch.where(live, 1.0 / floored, 0.0)


def _odds_factor(mean: Tensor, scores: Tensor) -> Tensor:
    """The square root of the wanted odds over the present ones."""
    inside = scores.clamp(LEVERAGE_MARGIN, 1 - LEVERAGE_MARGIN)
    # The clamp avoids a division by zero above NO_FREEDOM, where the caller does not use the result.
    wanted = mean.clamp(LEVERAGE_MARGIN, NO_FREEDOM)
    return ((wanted / (1 - wanted)) * ((1 - inside) / inside)).sqrt()


def _is_even(scores: Tensor, mean: Tensor, live: Tensor, tolerance: float, rows: Rows) -> Tensor:
    """Whether all rows that are not zero have a norm within `tolerance` of the root of the mean score."""
    off = ((scores / mean.clamp(min=SMALLEST_LEVERAGE)).sqrt() - 1).abs()
    return rows.max(torch.where(live, off, 0.0)) <= tolerance


def _spread(scores: Tensor, live: Tensor, live_rows: Tensor, rows: Rows) -> Tensor:
    """Standard deviation over mean of the norms of the rows that are not zero, [..., 1, 1]."""
    norms = scores.sqrt()
    mean = rows.sum(norms) / live_rows
    variance = rows.sum(torch.where(live, (norms - mean).square(), 0.0)) / live_rows
    return variance.sqrt() / mean
