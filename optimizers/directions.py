"""The update directions, as pure functions of stacks [..., m, n].

Every function takes the (Nesterov-blended) momentum u of equally shaped weights, m rows = output neurons,
and returns the direction in fp32, without the learning-rate scale. u is not changed and the result shares no
memory with it. A zero matrix gives a zero direction; one with a NaN or an infinity gives NaN, alone.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from optimizers.polar import polar as polar_factor
from optimizers.polar import prescale, working_dtype
from optimizers.row_balance import BalanceRule, EpsMode, balance

Scope = Literal["tall", "all", "wide"]
RowBalance = Literal["polar"]
LrScale = Literal["aspect", "rms", "spectral"]
Form = Literal["tall", "wide", "square"]


class Direction(NamedTuple):
    """A stack of directions and what is worth counting about them."""

    d: Tensor
    """[..., m, n] fp32."""
    fallbacks: Tensor
    """[...] int64: steps of the odds rule that were replaced by a tyler step (see row_balance)."""


def muon(u: Tensor, *, polar: str = "quintic") -> Tensor:
    """polar(u): the direction of Muon. `polar` is a backend of optimizers.polar."""
    return polar_factor(u, polar)


def aurora(
    u: Tensor,
    *,
    iterations: int = 2,
    beta: float = 0.5,
    balance_rule: BalanceRule = "odds",
    scope: Scope = "tall",
    row_balance: RowBalance = "polar",
    polar: str = "quintic",
    eps_mode: EpsMode = "relative",
) -> Tensor:
    """A direction near u with orthonormal columns and rows of equal norm, for the forms in `scope`.

    Args:
        u: [..., m, n].
        iterations: polar calls K. 1 only normalises the rows of u and can leave those of the result less
            even than Muon's; 2 leaves them within about 1 %.
        beta: power of the tyler rule; not used by "odds".
        balance_rule: "odds" or "tyler", see `optimizers.row_balance.balance`.
        scope: which forms are balanced; the others get `muon`. "tall": m > n. "wide": m < n, by balancing
            the columns. "all": both. A square polar factor has unit rows and columns: always `muon`.
        row_balance: how the leverage scores between the calls are found. "polar": from a polar factor.
        polar: a backend of optimizers.polar.
        eps_mode: "relative": no scale from 1e-20 to 1e20. "absolute": the released code's fixed 1e-7.

    The result does not change under positive scaling of single rows of u, moves with row permutations, and
    turns with rotations of the columns (balanced wide matrices: rows and columns exchanged).

    Raises:
        ValueError: an unknown option value, or iterations < 1.
    """
    return aurora_counted(
        u,
        iterations=iterations,
        beta=beta,
        balance_rule=balance_rule,
        scope=scope,
        row_balance=row_balance,
        polar=polar,
        eps_mode=eps_mode,
    ).d


def aurora_counted(
    u: Tensor,
    *,
    iterations: int = 2,
    beta: float = 0.5,
    balance_rule: BalanceRule = "odds",
    scope: Scope = "tall",
    row_balance: RowBalance = "polar",
    polar: str = "quintic",
    eps_mode: EpsMode = "relative",
) -> Direction:
    """`aurora`, with the number of fallbacks of the balance rule."""
    _require("iterations", iterations, iterations >= 1, "at least 1")
    for name, value, choices in (
        ("balance_rule", balance_rule, ("odds", "tyler")),
        ("scope", scope, ("tall", "all", "wide")),
        ("row_balance", row_balance, ("polar",)),
        ("eps_mode", eps_mode, ("relative", "absolute")),
    ):
        _require(name, value, value in choices, f"one of {', '.join(choices)}")
    shape_form = form(*u.shape[-2:])
    if not balances(scope, shape_form):
        return Direction(muon(u, polar=polar), torch.zeros(u.shape[:-2], dtype=torch.int64, device=u.device))
    # fp64 stays: rounded to fp32, a matrix of deficient rank would have a full one.
    x = u.detach() if u.dtype == torch.float64 else u.detach().float()
    tall = x if shape_form == "tall" else x.mT
    if eps_mode == "relative":
        tall = prescale(tall)

    # The product with D in the backend's own precision: see working_dtype.
    rows = tall.to(working_dtype(polar))

    def factor(D: Tensor) -> Tensor:
        return polar_factor(D * rows, polar)

    def leverage(D: Tensor) -> Tensor:
        return factor(D).square().sum(dim=-1, keepdim=True)

    with torch.no_grad():
        scale = balance(tall, leverage, updates=iterations - 1, rule=balance_rule, beta=beta, eps_mode=eps_mode)
        d = factor(scale.D)
    return Direction(d if shape_form == "tall" else d.mT, scale.fallbacks)


def form(m: int, n: int) -> Form:
    """Tall (m > n), wide (m < n) or square."""
    return "tall" if m > n else "wide" if m < n else "square"


def balances(scope: str, shape_form: str) -> bool:
    """Whether aurora with this scope balances matrices of this form; it leaves the others to muon."""
    return shape_form != "square" and scope in ("all", shape_form)


def lr_scale(kind: str, m: int, n: int) -> float:
    """The factor s(m, n) by which the step of an m x n weight is larger than its learning rate.

    "aspect": sqrt(max(1, m/n)), Muon's and the released Aurora's. "rms": 0.2 sqrt(max(m, n)), an update of
    the size of AdamW's. "spectral": sqrt(m/n).

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in LR_SCALES:
        raise ValueError(f"unknown lr_scale {kind!r}: expected one of {', '.join(LR_SCALES)}")
    return LR_SCALES[kind](m, n)


def scaled(d: Tensor, factor: float, *, polar: str) -> Tensor:
    """factor * d; with "quintic_exact" rounded to bf16, since the released code scales its bf16 result."""
    step = factor * d
    return step.bfloat16().float() if polar == "quintic_exact" else step


def from_options(u: Tensor, options: Mapping[str, Any]) -> Direction:
    """The direction that the options of a matrix group name (see optimizers.options)."""
    if options["direction"] == "muon":
        return Direction(muon(u, polar=options["polar"]), torch.zeros(u.shape[:-2], dtype=torch.int64, device=u.device))
    keys = ("iterations", "beta", "balance_rule", "scope", "row_balance", "polar", "eps_mode")
    return aurora_counted(u, **{key: options[key] for key in keys})


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}: expected {expected}")


LR_SCALES: dict[str, Callable[[int, int], float]] = {
    "aspect": lambda m, n: math.sqrt(max(1.0, m / n)),
    "rms": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "spectral": lambda m, n: math.sqrt(m / n),
}
"""Learning-rate scales by name, of the weight's own m and n."""
