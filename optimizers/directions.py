"""The update directions, as pure functions of stacks [..., m, n].

Every function takes the (Nesterov-blended) momentum u of equally shaped weights, m rows = output neurons,
and returns the direction in fp32, without the learning-rate scale. u is not changed and the result shares no
memory with it. A zero matrix gives a zero direction; one with a NaN or an infinity gives NaN, alone.
`optimizers.reference` has a slow twin of each, one matrix at a time in fp64: read that first.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from optimizers import leverage
from optimizers.polar import polar as polar_factor
from optimizers.polar import prescale, working_dtype
from optimizers.precision import PolarDtype
from optimizers.riemannian import Variant, ascend
from optimizers.row_balance import BalanceRule, EpsMode, balance
from optimizers.rows import HERE, Rows
from optimizers.speedrun import contra

Scope = Literal["tall", "all", "wide"]
RowBalance = Literal["auto", "polar", "leverage", "gram"]
LrScale = Literal["aspect", "rms", "spectral"]
Form = Literal["tall", "wide", "square"]
Target = Literal["graft", "unit"]

# Guards the division by the root of a second moment.
MOMENT_EPS = 1e-10


class Direction(NamedTuple):
    """A stack of directions and what is worth counting about them."""

    d: Tensor
    """[..., m, n] fp32."""
    fallbacks: Tensor
    """[...] int64: steps of the odds rule that were replaced by a tyler step (see row_balance)."""
    retries: Tensor
    """[...] int64: leverage scores for which Cholesky's factorisation failed at first (see leverage)."""
    second_moment: Tensor | None = None
    """[..., m] fp32: the running mean square of the rows, for the directions that keep one."""


def muon(u: Tensor, *, polar: str = "gram", polar_dtype: PolarDtype = "auto") -> Tensor:
    """polar(u): the direction of Muon. `polar` is a backend of optimizers.polar, `polar_dtype` that of its products."""
    return polar_factor(u, polar, dtype=polar_dtype)


def normuon(
    u: Tensor,
    v: Tensor,
    *,
    beta2: float = 0.95,
    target: Target = "graft",
    polar: str = "gram",
    polar_dtype: PolarDtype = "auto",
) -> tuple[Tensor, Tensor]:
    """NorMuon (Li et al., arXiv 2510.05491): the rows of polar(u) divided by their running root mean square.

    Args:
        u: [..., m, n].
        v: [..., m] fp32, the running mean square of each row; zeros at the start. It is not changed.
        beta2: share of v that a step keeps.
        target: "graft": the result has the Frobenius norm of polar(u); "unit": every row has norm 1, which on a
            tall matrix is a step sqrt(m/n) times larger.
        polar: a backend of optimizers.polar, in `polar_dtype`.

    Returns:
        The direction and the new v. A polar factor with m <= n has unit rows: there the direction is muon's, and v
        stays.

    Raises:
        ValueError: an unknown target.
    """
    _require("target", target, target in ("graft", "unit"), "graft or unit")
    factor = muon(u, polar=polar, polar_dtype=polar_dtype)
    if factor.shape[-2] <= factor.shape[-1]:
        return factor, v.clone()
    return _over_running_norms(factor, v, beta2, target)


def _over_running_norms(
    factor: Tensor, v: Tensor, beta2: float, target: Target, rows: Rows = HERE
) -> tuple[Tensor, Tensor]:
    """What normuon makes of the rows of a tall polar factor."""
    v = torch.lerp(v, factor.square().mean(dim=-1), 1 - beta2)
    scaled_rows = factor / (v.sqrt().unsqueeze(-1) + MOMENT_EPS)
    if target == "unit":
        return _with_row_norms(scaled_rows, 1.0), v
    wanted, present = rows.norm(factor), rows.norm(scaled_rows)
    return scaled_rows * torch.where(present > 0, wanted / present, 0.0), v


def u_normuon(u: Tensor, *, polar: str = "gram", polar_dtype: PolarDtype = "auto") -> Tensor:
    """U-NorMuon: every row of polar(u) that is not zero brought to the norm sqrt(min(1, n/m)) that it has on average.

    A polar factor with m <= n has unit rows: there it is muon.
    """
    factor = muon(u, polar=polar, polar_dtype=polar_dtype)
    m, n = factor.shape[-2:]
    return factor if m <= n else _with_row_norms(factor, math.sqrt(n / m))


def u_normuon_running(
    u: Tensor, v: Tensor, *, beta2: float = 0.95, polar: str = "gram", polar_dtype: PolarDtype = "auto"
) -> tuple[Tensor, Tensor]:
    """U-NorMuon by the running mean square v of the rows instead of this step's: row norms are even on average.

    v [..., m] is as in `normuon`, but that a row's begins at its first mean square, so that it has no bias to correct.
    """
    factor = muon(u, polar=polar, polar_dtype=polar_dtype)
    m, n = factor.shape[-2:]
    return (factor, v.clone()) if m <= n else _to_even_running_norms(factor, v, beta2, m)


def _to_even_running_norms(factor: Tensor, v: Tensor, beta2: float, m: int) -> tuple[Tensor, Tensor]:
    """What u_normuon_running makes of the rows of a tall polar factor that has m of them."""
    now = factor.square().mean(dim=-1)
    v = torch.where(v > 0, torch.lerp(v, now, 1 - beta2), now)
    return factor * (math.sqrt(1 / m) / (v.sqrt().unsqueeze(-1) + MOMENT_EPS)), v


def even_rows(
    factor: Tensor, options: Mapping[str, Any], shape: tuple[int, int], second_moment: Tensor | None, rows: Rows
) -> tuple[Tensor, Tensor | None]:
    """What "normuon" and "u_normuon" make of the rows of a tall polar factor, of which a part may be here.

    Args:
        factor: [..., rows here, n].
        options: those of the matrix group.
        shape: (m, n) of the whole.
        second_moment: [..., rows here], if there is one.
        rows: reductions over all rows.

    Returns:
        The direction and the new second moment.
    """
    m, n = shape
    if second_moment is None:
        return _with_row_norms(factor, math.sqrt(n / m)), None
    if options["direction"] == "normuon":
        return _over_running_norms(factor, second_moment, options["beta2"], options["normuon_target"], rows)
    return _to_even_running_norms(factor, second_moment, options["beta2"], m)


def aurora(
    u: Tensor,
    *,
    iterations: int = 2,
    beta: float = 0.5,
    balance_rule: BalanceRule = "odds",
    scope: Scope = "tall",
    row_balance: RowBalance = "auto",
    polar: str = "gram",
    polar_dtype: PolarDtype = "auto",
    eps_mode: EpsMode = "relative",
    tolerance: float | None = None,
) -> Tensor:
    """A direction near u with orthonormal columns and rows of equal norm, for the forms in `scope`.

    Args:
        u: [..., m, n].
        iterations: polar calls K, all but the last for the row norms alone. 1 only normalises the rows of u and can
            leave those of the result less even than Muon's; 2 leaves them within about 1 %, 3 within 0.1 %.
        beta: power of the tyler rule; not used by "odds".
        balance_rule: "odds" or "tyler", see `optimizers.row_balance.balance`.
        scope: which forms are balanced; the others get `muon`. "tall": m > n. "wide": m < n, by balancing
            the columns. "all": both. A square polar factor has unit rows and columns: always `muon`.
        row_balance: how the leverage scores between the calls are found (see `optimizers.leverage`). "polar": from a
            polar factor, the reference. "leverage": by a Cholesky factor. "gram": by products alone. "auto":
            "leverage" on a CPU, "gram" elsewhere.
        polar: a backend of optimizers.polar, in `polar_dtype`.
        eps_mode: "relative": no scale from 1e-20 to 1e20. "absolute": the released code's fixed 1e-7.
        tolerance: stop balancing once all row norms are within this share of their target (0.01: 1 %), after
            `iterations` at the latest; None: never before.

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
        polar_dtype=polar_dtype,
        eps_mode=eps_mode,
        tolerance=tolerance,
    ).d


def aurora_counted(
    u: Tensor,
    *,
    iterations: int = 2,
    beta: float = 0.5,
    balance_rule: BalanceRule = "odds",
    scope: Scope = "tall",
    row_balance: RowBalance = "auto",
    polar: str = "gram",
    polar_dtype: PolarDtype = "auto",
    eps_mode: EpsMode = "relative",
    tolerance: float | None = None,
) -> Direction:
    """`aurora`, with the counts of its fallbacks and retries."""
    _require("iterations", iterations, iterations >= 1, "at least 1")
    for name, value, choices in (
        ("balance_rule", balance_rule, ("odds", "tyler")),
        ("row_balance", row_balance, ("auto", "polar", "leverage", "gram")),
        ("eps_mode", eps_mode, ("relative", "absolute")),
    ):
        _require(name, value, value in choices, f"one of {', '.join(choices)}")
    _require_scope(scope)
    _require("tolerance", tolerance, tolerance is None or tolerance > 0, "a positive number or None")
    if not balances(scope, form(*u.shape[-2:])) or u.numel() == 0:
        return _uncounted(muon(u, polar=polar, polar_dtype=polar_dtype))
    # fp64 stays: rounded to fp32, a matrix of deficient rank would have a full one.
    x = u.detach() if u.dtype == torch.float64 else u.detach().float()
    tall = (x if x.shape[-2] > x.shape[-1] else x.mT).reshape(-1, *sorted(x.shape[-2:], reverse=True))
    if eps_mode == "relative":
        tall = prescale(tall)
    # The product with D in the backend's own precision: see working_dtype.
    rows = tall.to(working_dtype(polar))
    retries = torch.zeros(len(tall), dtype=torch.int64, device=u.device)

    def scores(D: Tensor) -> Tensor:
        found, retried = _leverage(D * rows, row_balance, polar, polar_dtype)
        retries.add_(retried)
        return found

    with torch.no_grad():
        scale = balance(
            tall,
            scores,
            updates=iterations - 1,
            rule=balance_rule,
            beta=beta,
            eps_mode=eps_mode,
            tolerance=tolerance,
        )
        d = polar_factor(scale.D * rows, polar, dtype=polar_dtype)
    if x.shape[-2] < x.shape[-1]:
        d = d.mT
    lead = u.shape[:-2]
    return Direction(d.reshape(u.shape), scale.fallbacks.reshape(lead), retries.reshape(lead))


def _leverage(x: Tensor, how: RowBalance, polar: str, polar_dtype: PolarDtype) -> tuple[Tensor, Tensor]:
    """The leverage scores of a tall stack [k, m, n] and the retries that they took."""

    def from_polar(stack: Tensor) -> tuple[Tensor, Tensor]:
        return leverage.from_polar(stack, polar, polar_dtype)

    if how == "auto":
        how = automatic_row_balance(x.device)
    if how == "polar":
        return from_polar(x)
    return leverage.from_gram(x.float()) if how == "gram" else leverage.from_cholesky(x.float(), from_polar)


def automatic_row_balance(device: torch.device) -> RowBalance:
    """What "auto" stands for: a Cholesky factorisation is a row of small dependent steps, which a GPU is slow at."""
    return "gram" if device.type == "cuda" else "leverage"


def riemannian_aurora(
    u: Tensor,
    *,
    riemannian: Variant = "exact",
    outer_steps: int = 3,
    scope: Scope = "tall",
    polar: str = "gram",
    polar_dtype: PolarDtype = "auto",
) -> Tensor:
    """Climbs from polar(u) towards the direction nearest to u among those with orthonormal columns and even rows.

    Args:
        u: [..., m, n].
        riemannian: "exact" or "released", see `optimizers.riemannian.ascend`.
        outer_steps: ascent steps, each with two retractions.
        scope: which forms are treated; the others get `muon`, square ones always.
        polar: a backend of optimizers.polar, in `polar_dtype`.

    Raises:
        ValueError: an unknown option value, or outer_steps < 1.
    """
    _require("riemannian", riemannian, riemannian in ("exact", "released"), "exact or released")
    _require("outer_steps", outer_steps, outer_steps >= 1, "at least 1")
    _require_scope(scope)
    if not balances(scope, form(*u.shape[-2:])) or u.numel() == 0:
        return muon(u, polar=polar, polar_dtype=polar_dtype)
    x = u.detach().float()
    tall = (x if x.shape[-2] > x.shape[-1] else x.mT).reshape(-1, *sorted(x.shape[-2:], reverse=True))

    def factor(stack: Tensor) -> Tensor:
        return polar_factor(stack, polar, dtype=polar_dtype)

    d = ascend(prescale(tall) if riemannian == "exact" else tall, factor, variant=riemannian, steps=outer_steps)
    return (d if x.shape[-2] > x.shape[-1] else d.mT).reshape(u.shape)


def form(m: int, n: int) -> Form:
    """Tall (m > n), wide (m < n) or square."""
    return "tall" if m > n else "wide" if m < n else "square"


def balances(scope: str, shape_form: str) -> bool:
    """Whether a scope takes in matrices of this form; aurora leaves the others to muon."""
    return shape_form != "square" and scope in ("all", shape_form)


def treats(options: Mapping[str, Any], m: int, n: int) -> bool:
    """Whether the direction of a complete set of options is another than muon for an m x n matrix."""
    if options["direction"] in ("aurora", "riemannian_aurora"):
        return balances(options["scope"], form(m, n))
    return options["direction"] != "muon" and m > n


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


def from_options(u: Tensor, options: Mapping[str, Any], second_moment: Tensor | None = None) -> Direction:
    """The direction that the options of a matrix group name (see optimizers.options).

    `second_moment` [..., m] is needed where `keeps_second_moment` is true, and only there.

    Raises:
        ValueError: it is missing.
    """

    def given(*keys: str) -> dict[str, Any]:
        return {key: options[key] for key in ("polar", "polar_dtype", *keys)}

    direction = options["direction"]
    if second_moment is None and keeps_second_moment(options, *u.shape[-2:]):
        raise ValueError(f"{direction!r} of a stack {tuple(u.shape)} needs its second moment, got None")
    if direction == "aurora":
        balancing = ("iterations", "beta", "balance_rule", "scope", "row_balance", "eps_mode", "tolerance")
        counted = aurora_counted(u, **given(*balancing))
    elif direction == "riemannian_aurora":
        counted = _uncounted(riemannian_aurora(u, **given("riemannian", "outer_steps", "scope")))
    elif second_moment is not None:
        if direction == "normuon":
            d, v = normuon(u, second_moment, target=options["normuon_target"], **given("beta2"))
        else:
            d, v = u_normuon_running(u, second_moment, **given("beta2"))
        counted = _uncounted(d)._replace(second_moment=v)
    else:
        counted = _uncounted((u_normuon if direction == "u_normuon" else muon)(u, **given()))
    if options["contra"]:
        counted = counted._replace(d=contra(counted.d, u, options["contra"]))
    return counted


def keeps_second_moment(options: Mapping[str, Any], m: int, n: int) -> bool:
    """Whether the direction of an m x n matrix under these options has a running mean square of its rows."""
    running = options["direction"] == "normuon" or (options["direction"] == "u_normuon" and options["running_norms"])
    return running and m > n


def _uncounted(d: Tensor) -> Direction:
    none = torch.zeros(d.shape[:-2], dtype=torch.int64, device=d.device)
    return Direction(d, none, none)


def _with_row_norms(x: Tensor, norm: float) -> Tensor:
    """Every row that is not zero brought to this norm."""
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.where(norms > 0, norm / norms, 0.0)


def _require_scope(scope: str) -> None:
    _require("scope", scope, scope in ("tall", "all", "wide"), "one of tall, all, wide")


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}: expected {expected}")


LR_SCALES: dict[str, Callable[[int, int], float]] = {
    "aspect": lambda m, n: math.sqrt(max(1.0, m / n)),
    "rms": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "spectral": lambda m, n: math.sqrt(m / n),
}
"""Learning-rate scales by name, of the weight's own m and n."""
