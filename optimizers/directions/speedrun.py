"""Two additions to a direction from the modded-nanoGPT optimization track, off by default.

Both take stacks [..., m, n] in fp32 and return a new tensor; a zero direction stays zero.
"""

import torch
from torch import Tensor

from ..polar.rows import HERE, Rows

# Power iterations for the largest singular value, and the lower bound of norms before a division.
POWER_STEPS, SMALLEST_NORM = 5, 1e-8


def contra(d: Tensor, u: Tensor, strength: float) -> Tensor:
    """Contra-Muon: d - strength * u / sigma_1(u), rescaled to the Frobenius norm of d.

    All singular values of a polar factor are equal; this makes the small ones of u the larger ones of the step. sigma_1
    comes from 5 power iterations that start at a constant vector. The largest row norm is used as a lower bound, for
    rows that sum to zero.
    """
    # For gradients of realistic size, u^T u would fall below the clamp.
    u = u.float()
    largest = u.abs().amax(dim=(-2, -1), keepdim=True)
    u = u / torch.where(largest > 0, largest, 1.0)
    v = u.new_ones(*u.shape[:-2], u.shape[-1], 1)
    for _ in range(POWER_STEPS):
        v = u.mT @ (u @ v)
        v = v / _norm(v).clamp(min=SMALLEST_NORM)
    longest_row = torch.linalg.vector_norm(u, dim=-1, keepdim=True).amax(dim=-2, keepdim=True)
    sigma = torch.maximum(_norm(u @ v), longest_row).clamp(min=SMALLEST_NORM)
    leaning = d - u * (strength / sigma)
    return leaning * (_norm(d) / _norm(leaning).clamp(min=SMALLEST_NORM))


def uw_floor(step: Tensor, w: Tensor, floor: float) -> Tensor:
    """The step, enlarged where its Frobenius norm is below `floor` times that of the weight w."""
    return enlarged(step, floor * _norm(w))


def enlarged(step: Tensor, norm: Tensor, rows: Rows = HERE) -> Tensor:
    """The step, enlarged where its Frobenius norm is below `norm`, [..., 1, 1]; a part of its rows may be here."""
    return step * (norm / rows.norm(step).clamp(min=SMALLEST_NORM)).clamp(min=1)


def _norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True)
