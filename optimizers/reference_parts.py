"""What the reference checks and does to rows, apart from the formulas."""

import torch
from torch import Tensor


def as_matrix(x: Tensor) -> Tensor:
    """x in fp64; ValueError unless it is one real matrix."""
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"expected one real matrix [m, n], got {x.dtype} of shape {tuple(x.shape)}")
    return x.detach().double()


def nan_or_zero(u: Tensor) -> Tensor | None:
    """Return NaN for a matrix that is not finite, zero for a zero matrix, and otherwise None."""
    if not u.isfinite().all():
        return torch.full_like(u, torch.nan)
    return None if u.any() else torch.zeros_like(u)


def live_rows(x: Tensor) -> Tensor:
    """Which rows are not exactly zero, [m]."""
    return (x != 0).any(dim=1)


def with_rows_of_norm(x: Tensor, norm: float) -> Tensor:
    """Every row scaled to this norm; zero rows stay zero."""
    norms = x.norm(dim=1, keepdim=True)
    return torch.where(norms == 0, x, x / norms * norm)


def centred(x: Tensor, live: Tensor) -> Tensor:
    """x minus its mean, over the live rows; 0 on the others."""
    return torch.where(live, x - x[live].mean(), 0.0)


def require(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a value that is none of the choices, with a ValueError."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: expected one of {', '.join(choices)}")
