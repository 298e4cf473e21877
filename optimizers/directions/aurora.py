"""Aurora: a direction near the momentum with orthonormal columns and rows of equal norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..fields import OptionError, option, takes_options
from ..polar import has_dtype_choice, prescale, product_dtype, working_dtype
from . import carried, leverage
from .base import LOG_ROW_SCALE, Direction, MatrixOptions, Scope, balances, form, nearly_square
from .muon import orthogonal
from .row_balance import BalanceRule, EpsMode, balance

RowBalance = Literal["auto", "polar", "leverage", "gram", "carried", "polished"]

CARRIED = ("carried", "polished")
"""The values of `row_balance` that keep the row scales from step to step."""


def carries(options: Mapping[str, Any]) -> bool:
    """Whether these options keep the row scales from step to step."""
    return options["direction"] == AuroraOptions.direction and options.get("row_balance") in CARRIED


def _one_iteration(options: Mapping[str, Any]) -> str | None:
    if carries(options):
        return _once_a_step(options)
    return "with iterations = 1 the row scaling is never updated" if options["iterations"] == 1 else None


def _never_balanced(options: Mapping[str, Any]) -> str | None:
    return None if carries(options) else _one_iteration(options)


def _once_a_step(options: Mapping[str, Any]) -> str | None:
    if not carries(options):
        return None
    return f"row_balance {options['row_balance']!r} takes one polar call and one odds step"


def _tall_only(options: Mapping[str, Any]) -> str | None:
    if carries(options) and options["scope"] != "tall":
        how = options["row_balance"]
        return f"row_balance {how!r} keeps one number for each row of a weight, so it balances tall matrices only"
    return None


def _beta_idle(options: Mapping[str, Any]) -> str | None:
    if carries(options):
        return _once_a_step(options)
    if options["iterations"] != 1 and options["balance_rule"] == "odds":
        return "the balance rule 'odds' has no step size; only 'tyler' has one"
    return _one_iteration(options)


@dataclass(frozen=True)
class ScopedOptions(MatrixOptions):
    """The options of the directions that balance rows: both auroras."""

    scope: Scope = option(
        "tall",
        'Which shapes the auroras balance: "tall" (gate and up projections), "wide" (down projections) or "all". The '
        "others, and square ones always, get the direction of muon. For aurora, a side that is less than 3 % longer "
        "than the other counts as equal.",
        group="main",
        idle=_tall_only,
    )

    @staticmethod
    def treats(options: Mapping[str, Any], m: int, n: int) -> bool:
        """Those in its scope."""
        return balances(options["scope"], form(m, n))


@dataclass(frozen=True)
class AuroraOptions(ScopedOptions):
    """The options of Aurora."""

    direction: ClassVar[str] = "aurora"

    iterations: int = option(
        2,
        "Polar calls of an aurora direction. All but the last serve the row norms only; `row_balance` says what those "
        "cost. 2 leaves row norms within about 1 %, 3 within 0.1 %. 1 only normalises the rows of the momentum, which "
        "can leave those of the direction less even than muon's, and warns.",
        group="main",
        low=1,
        unit="calls",
        idle=_once_a_step,
    )
    tolerance: float | None = option(
        None,
        "Stop balancing a matrix once all its rows are within this share of their norm, after `iterations` calls at "
        "the latest: 0.01 is 1 %. By default balancing always takes `iterations` calls.",
        above=True,
        high=1.0,
        unit="share of the row norm",
        idle=_one_iteration,
    )
    balance_rule: BalanceRule = option(
        "odds",
        'How row scales move between the polar calls. "odds" sets each row exactly, at any shape. "tyler" is the '
        "released rule, slow on nearly square matrices.",
        group="parity",
        idle=_one_iteration,
    )
    beta: float = option(
        0.5,
        'Power of a "tyler" step: 0.5 is undamped, smaller is slower and steadier, larger overshoots.',
        group="parity",
        above=True,
        high=1.0,
        closed=True,
        idle=_beta_idle,
    )
    row_balance: RowBalance = option(
        "auto",
        'Where the row norms between the polar calls come from. "polar": a polar factor, as expensive as muon. '
        '"leverage": a Cholesky factor, a third to a half of that. "gram": matrix products alone, in fp32. "auto": '
        '"leverage" on a CPU; on a GPU "polar" if its products are fp16, otherwise "gram". "carried" has one polar '
        "call and nothing between: the row scales are state, one number for each row of a tall matrix, and each step "
        "moves them for the next. That costs no more than muon and leaves row norms within about 7 %. "
        '"polished" lets that move act on the direction as well, and makes its columns orthonormal again: within '
        'about 1 %, at the cost of muon where `polar` is "gram" in bf16 or fp16, and 1.5 times that in fp32.',
        idle=_never_balanced,
    )
    eps_mode: EpsMode = option(
        "relative",
        'What guards the division by a row norm. "relative": 1e-7 of the largest, so that the direction has no scale '
        'from 1e-20 to 1e20. "absolute": the fixed 1e-7 of the released code.',
        group="parity",
        preset_only=True,
        idle=_once_a_step,
    )

    @staticmethod
    def treats(options: Mapping[str, Any], m: int, n: int) -> bool:
        """Those in its scope, unless they are nearly square.

        With 1 % more rows than columns the squared row norms of any orthonormal direction have a mean of 0.99 and a
        maximum of 1, so there is next to nothing to even out. To find it takes 1 - l_i of scores l_i near 1, and the
        polar factor of a badly conditioned D u: in fp32 the direction comes out 5 to 30 % off. The released code
        balances them nevertheless.
        """
        if carries(options):
            return m > n and not nearly_square(m, n)
        too_square = nearly_square(m, n) and options["eps_mode"] != "absolute"
        return not too_square and balances(options["scope"], form(m, n))

    @staticmethod
    def row_slot(options: Mapping[str, Any], m: int, n: int) -> str | None:
        """The row scales, if they are carried: of those that are balanced."""
        return LOG_ROW_SCALE if carries(options) and AuroraOptions.treats(options, m, n) else None

    def find(self, u: Tensor, row_state: Tensor | None) -> Direction:
        """`aurora`, with its fallbacks and retries."""
        m, n = u.shape[-2:]
        if u.numel() == 0 or not self.treats(vars(self) | {"direction": self.direction}, m, n):
            return Direction.uncounted(orthogonal(u, self))
        if self.row_balance in CARRIED:
            return self._carried(u, row_state)
        # fp64 stays: rounded to fp32, a matrix of deficient rank would have full rank.
        x = u.detach() if u.dtype == torch.float64 else u.detach().float()
        tall = (x if m > n else x.mT).reshape(-1, max(m, n), min(m, n))
        if self.eps_mode == "relative":
            tall = prescale(tall)
        # The product with D in the backend's own precision: see working_dtype.
        rows = tall.to(working_dtype(self.polar))
        retries = torch.zeros(len(tall), dtype=torch.int64, device=u.device)

        def scores(D: Tensor) -> Tensor:
            found, retried = _leverage(D * rows, self)
            retries.add_(retried)
            return found

        with torch.no_grad():
            scale = balance(
                tall,
                scores,
                updates=self.iterations - 1,
                rule=self.balance_rule,
                beta=self.beta,
                eps_mode=self.eps_mode,
                tolerance=self.tolerance,
            )
            d = orthogonal(scale.D * rows, self)
        if m < n:
            d = d.mT
        lead = u.shape[:-2]
        return Direction(d.reshape(u.shape), scale.fallbacks.reshape(lead), retries.reshape(lead))

    def _carried(self, u: Tensor, log_scale: Tensor | None) -> Direction:
        """`aurora_carried` of matrices that it balances."""
        if log_scale is None:
            raise ValueError(
                f"row_balance {self.row_balance!r} needs the row scales of the step before: call aurora_carried"
            )

        def factor(x: Tensor, even: Callable[[Tensor], Tensor] | None) -> Tensor:
            return orthogonal(x.to(working_dtype(self.polar)), self, even)

        with torch.no_grad():
            x = prescale(u.detach() if u.dtype == torch.float64 else u.detach().float())
            polished = self.row_balance == "polished"
            return Direction.uncounted(*carried.direction(x, log_scale, factor, polished=polished))


@takes_options(AuroraOptions)
def aurora(u: Tensor, options: AuroraOptions) -> Tensor:
    """A direction near u with orthonormal columns and rows of equal norm, for the shapes in `scope`.

    Args:
        u: [..., m, n].

    Returns:
        [..., m, n] in fp32. It does not change under positive scaling of single rows of u, moves with row permutations,
        and turns with rotations of the columns. For wide matrices, rows and columns are exchanged. Shapes outside
        `scope`, square ones and nearly square ones get `muon`.

    Raises:
        OptionError: an option out of range.
        ValueError: row_balance is "carried" or "polished": see `aurora_carried`.
    """
    return options.find(u, None).d


@takes_options(AuroraOptions)
def aurora_counted(u: Tensor, options: AuroraOptions) -> Direction:
    """`aurora`, with the counts of its fallbacks and retries."""
    return options.find(u, None)


@takes_options(AuroraOptions, without=("scope", "iterations", "tolerance", "balance_rule", "beta", "eps_mode"))
def aurora_carried(u: Tensor, log_scale: Tensor, options: AuroraOptions) -> tuple[Tensor, Tensor]:
    """Aurora with row scales D that are kept from step to step: one polar call (see optimizers.directions.carried).

    Args:
        u: [..., m, n].
        log_scale: [..., m] fp32, log D; zeros at the start. It is not changed.

    Returns:
        The direction polar(D u) in fp32 and the new log D. Its columns are orthonormal; its rows are as even as u is
        like that of the step before. Unlike `aurora`, it changes if single rows of u are scaled. Where m <= n, or m is
        less than 3 % larger, the direction is muon's, and log D is the same.

    Raises:
        OptionError: an option out of range, or another `row_balance` than "carried" (the default here) and "polished".
    """
    how = "carried" if options.row_balance == "auto" else options.row_balance
    if how not in CARRIED:
        raise OptionError(f"row_balance is {how!r}: expected one of {', '.join(CARRIED)}")
    found = replace(options, row_balance=how).find(u, log_scale)
    return found.d, log_scale.clone() if found.row_state is None else found.row_state


def _leverage(x: Tensor, options: AuroraOptions) -> tuple[Tensor, Tensor]:
    """The leverage scores of a tall stack [k, m, n], and the retries that they took."""

    def from_polar(stack: Tensor) -> tuple[Tensor, Tensor]:
        return leverage.from_polar(orthogonal(stack, options))

    how = automatic_row_balance(vars(options), x.device) if options.row_balance == "auto" else options.row_balance
    if how == "polar":
        return from_polar(x)
    if how == "gram":
        return leverage.from_gram(x.float())
    # "svd" gives the same bits in any stack, so that runs on other numbers of ranks can be compared with it.
    return leverage.from_cholesky(x.float(), from_polar, each_alone=options.polar == "svd")


def automatic_row_balance(options: Mapping[str, Any], device: torch.device | str) -> RowBalance:
    """Resolve "auto" for the other options of a group.

    A Cholesky factorisation is a sequence of small dependent steps, and "gram" multiplies in fp32: on a GPU both are
    slower than a second polar factor in fp16 (5.0 and 12.4 ms instead of 2.7, an H200, 8192 x 2048). One in bf16 would
    be coarse.
    """
    if torch.device(device).type != "cuda":
        return "leverage"
    if not has_dtype_choice(options["polar"]):
        return "gram"
    dtype = product_dtype(options["polar"], options["polar_dtype"], device, options["polar_accuracy"])
    return "polar" if dtype == torch.float16 else "gram"
