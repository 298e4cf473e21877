"""A row scaling D that is kept from step to step, so that a step of Aurora takes one polar factor.

The momentum changes little in a step, and with it the D for which polar(D u) has even rows. So a step takes the
direction with the D that it finds, and moves D by the odds rule (see `row_balance`) for the next one, from the row
norms of that direction:

    d = polar(D u);   D_i <- D_i (odds(t) / odds(l_i))^(POWER / 2),   odds(l) = l / (1 - l),   l_i = |d_i|^2

t is the mean of l over the rows that are not zero: n/m if u has full rank. The state is log D, whose zeros are D = 1:
the first step takes the direction of muon. Everything acts row by row, so it also runs on a stack [..., m, n].
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..polar.rows import HERE, Rows
from .row_balance import NO_FREEDOM

Polar = Callable[[Tensor, Callable[[Tensor], Tensor] | None], Tensor]

POWER = 1.0
"""How much of the odds step is taken. (Chosen by measurement: docs/decisions, 2026-11-26, carried balance.)"""

# D stays within this factor of its mean on both sides. Beyond it a polar backend loses the smaller rows (it counts
# singular values from 2^-10 of the Frobenius norm), and a row that had next to no gradient for a while needs more steps
# to come back.
LOG_LARGEST = 10 * math.log(2)
# Scores that the rule distinguishes. A row that takes nearly all of a dimension has a score near 1, of which bf16 holds
# the distance from 1 to two digits at best.
SMALLEST, LARGEST = 2.0**-20, 1 - 2.0**-7


LOG_POLISHED = 0.2
"""Largest logarithm of a factor by which `polished` scales a row. What makes the columns orthonormal again then leaves
singular values within 4 % of 1. In a settled run the factors are far smaller."""


class Step(NamedTuple):
    """An odds step of log D."""

    log: Tensor
    """[..., m, 1]: half of log(odds(t) / odds(l_i)); 0 where nothing moves."""
    moves: Tensor
    """[..., m, 1] bool: not zero rows, and none of a matrix that is zero, not finite, or has t > 0.999, which leaves no
    freedom to balance with."""


def row_scale(log_scale: Tensor) -> Tensor:
    """D [..., m, 1] from log D [..., m]."""
    return log_scale.exp().unsqueeze(-1)


def step_of(u: Tensor, d: Tensor, rows: Rows = HERE) -> Step:
    """The odds step that d = polar(D u) asks for.

    Args:
        u: [..., m, n], tall. Only which of its rows are zero is read.
        d: [..., m, n].
        rows: reductions over all rows; u and d may hold only some of them.
    """
    # Two passes without a tensor as large as u, which u != 0 would be.
    live = (u.amax(dim=-1, keepdim=True) != 0) | (u.amin(dim=-1, keepdim=True) != 0)
    scores = torch.where(live, torch.linalg.vector_norm(d, dim=-1, keepdim=True).square(), 0.0)
    mean = rows.sum(scores) / rows.sum(live).clamp(min=1)
    # Comparisons with NaN are false.
    moves = live & (mean > 0) & (mean <= NO_FREEDOM)
    return Step(torch.where(moves, (_log_odds(mean) - _log_odds(scores)) / 2, 0.0), moves)


def moved(log_scale: Tensor, step: Step, rows: Rows = HERE, *, power: float = POWER) -> Tensor:
    """log D for the next step, [..., m] fp32; `log_scale` is not changed.

    Polar factors do not see the mean of log D over the rows that move; it would drift, so it is subtracted.
    """
    before = log_scale.unsqueeze(-1)
    wanted = torch.where(step.moves, before + power * step.log, 0.0)
    centred = wanted - rows.sum(wanted) / rows.sum(step.moves).clamp(min=1)
    after = torch.where(step.moves, centred.clamp(-LOG_LARGEST, LOG_LARGEST), before)
    return after.squeeze(-1).to(log_scale.dtype)


def direction(
    u: Tensor, log_scale: Tensor, polar: Polar, *, polished: bool = False, rows: Rows = HERE
) -> tuple[Tensor, Tensor]:
    """The direction and log D for the next step.

    Args:
        u: [..., m, n], tall, at a scale where its rows neither overflow nor underflow.
        log_scale: log D, [..., m].
        polar: takes x and `even` of `optimizers.polar.polar`.
        polished: let the odds step act on this direction, too. Its rows are scaled by that step (at most by
            exp(LOG_POLISHED)), and its columns made orthonormal again: see `even` of `optimizers.polar.polar`.
        rows: reductions over all rows; u may hold only some of them.
    """
    found: list[Step] = []

    def even(d: Tensor) -> Tensor:
        found.append(step_of(u.reshape(d.shape), d, rows))
        return found[0].log.clamp(-LOG_POLISHED, LOG_POLISHED).exp()

    d = polar(row_scale(log_scale) * u, even if polished else None)
    if not polished:
        found.append(step_of(u, d, rows))
    elif not found:
        return d, log_scale.clone()  # all are zero or not finite
    step = Step(*(part.reshape(*u.shape[:-1], 1) for part in found[0]))
    return d, moved(log_scale, step, rows)


def _log_odds(scores: Tensor) -> Tensor:
    inside = scores.clamp(SMALLEST, LARGEST)
    return (inside / (1 - inside)).log()
