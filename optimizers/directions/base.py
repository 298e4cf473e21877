"""What all directions share: the options of every matrix group, and the form in which a direction is returned."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ..fields import Declared, OptionError, option
from ..polar import Accuracy, PolarDtype, has_accuracy_choice, has_dtype_choice

Scope = Literal["tall", "all", "wide"]
Form = Literal["tall", "wide", "square"]
LrScale = Literal["aspect", "rms", "spectral"]

SECOND_MOMENT, LOG_ROW_SCALE = ROW_SLOTS = ("second_moment", "log_row_scale")
"""The slots of the state with one number for each row: the running mean square of the rows (NorMuon), and the logarithm
of the row scales D of aurora with `row_balance` "carried". Both are zeros before the first step."""
PolarName = Literal["gram", "cans", "polar_express", "quintic", "quintic_exact", "svd"]


class Direction(NamedTuple):
    """A stack of directions, with what is counted about them."""

    d: Tensor
    """[..., m, n] fp32."""
    fallbacks: Tensor
    """[...] int64: steps of the odds rule that were replaced by a tyler step (see row_balance)."""
    retries: Tensor
    """[...] int64: Cholesky factorisations that failed and were repeated (see leverage)."""
    row_state: Tensor | None = None
    """[..., m] fp32: what the next step needs to know of each row, for directions that keep it (see `row_slot`)."""

    @classmethod
    def uncounted(cls, d: Tensor, row_state: Tensor | None = None) -> Direction:
        """A direction with nothing to count."""
        none = torch.zeros(d.shape[:-2], dtype=torch.int64, device=d.device)
        return cls(d, none, none, row_state)


def _one_dtype(options: Mapping[str, Any]) -> str | None:
    if options["polar_accuracy"] == "tight":
        return None if options["polar_dtype"] in ("auto", "fp32") else "polar_accuracy 'tight' computes in fp32"
    return None if has_dtype_choice(options["polar"]) else f"polar {options['polar']!r} has one dtype only"


def _one_accuracy(options: Mapping[str, Any]) -> str | None:
    graded = has_accuracy_choice(options["polar"]) or options["polar_accuracy"] == "default"
    return None if graded else f"polar {options['polar']!r} has one accuracy only"


def _no_decay(options: Mapping[str, Any]) -> str | None:
    # A switch that is off asks for nothing, so it is never refused.
    return "weight_decay is 0: nothing decays" if options["cautious"] and options["weight_decay"] == 0 else None


def _no_average(options: Mapping[str, Any]) -> str | None:
    return "momentum is 0: nothing is averaged" if options["nesterov"] and options["momentum"] == 0 else None


@dataclass(frozen=True)
class MatrixOptions(Declared):
    """The options of every direction; the base of each direction's own."""

    direction: ClassVar[str]
    """The name of the direction."""

    lr: float | Tensor = option(
        0.02,
        "Peak learning rate of the matrices; the schedule and `lr_scale` multiply it. It is the spectral norm of a "
        "step before the scale: 0.01 to 0.05 is usual, 0.1 diverges.",
        group="main",
        acts="step",
    )
    momentum: float = option(
        0.95,
        "Share of the running average of the gradient that each step keeps; 0.95 averages over about 20 steps.",
        group="main",
        acts="step",
        high=1.0,
    )
    nesterov: bool = option(
        True,
        "Look one gradient ahead: take the direction of g + momentum * (average - g) instead of the average.",
        acts="step",
        idle=_no_average,
    )
    weight_decay: float = option(
        0.0,
        "Decoupled weight decay of the matrices per step, times the scheduled learning rate without `lr_scale`.",
        group="main",
        acts="step",
    )
    lr_scale: LrScale = option(
        "aspect",
        'Factor on the lr of an m x n weight (m outputs). "aspect": sqrt(max(1, m/n)). "rms": 0.2 sqrt(max(m, n)), a '
        "step about as large as AdamW's, which needs AdamW's small lr. \"spectral\": sqrt(m/n).",
        group="main",
        acts="step",
    )
    polar: PolarName = option(
        "gram",
        'How polar factors are computed. "gram": from the small Gram matrix, the fastest. '
        '"polar_express": the same on the matrix itself. "cans": to the precision of fp32, three times slower. '
        '"quintic": the 12 steps of the released code, in bf16. "quintic_exact": those in the released order of '
        'operations, slow on a CPU without bf16 instructions. "svd": exact in fp64, for tests and small models.',
        group="parity",
    )
    polar_dtype: PolarDtype = option(
        "auto",
        'Precision of the products of "gram" and "polar_express". "auto": fp16 on a GPU, bf16 on a CPU with AMX, '
        "otherwise fp32. At condition numbers up to 2,000 bf16 turns directions by 1 to 4 %, fp16 by less than 1 %, "
        "fp32 by less than 0.1 %.",
        idle=_one_dtype,
        numerics=True,
    )
    polar_accuracy: Accuracy = option(
        "default",
        'How far "gram" goes. "loose": five steps instead of seven, as in most implementations of Muon, or on a CPU '
        "three Cholesky factors instead of four and fewer products with the whole matrix; singular "
        'values above 2^-8 of the Frobenius norm come within 0.3 % of 1 in fp32, 4 % in fp16. "default": those above '
        '2^-10, within 0.01 % in fp32. "tight": to the rounding of fp32, in which it computes on every device.',
        idle=_one_accuracy,
        numerics=True,
    )
    contra: float = option(
        0.0,
        "Contra-Muon: subtract this share of the normalised momentum from the direction. The 3,175-step speedrun "
        "recipe uses 0.2; 0 is off.",
        acts="after",
        high=1.0,
    )
    uw_floor: float = option(
        0.0,
        "Enlarge a step whose Frobenius norm, before the learning rate, is below this share of its weight's. The "
        "speedrun recipe uses 0.35; 0 is off.",
        acts="step",
    )
    cautious: bool = option(
        False,
        "Decay only the entries of a matrix whose step does not point away from zero.",
        acts="step",
        idle=_no_decay,
    )

    @staticmethod
    def treats(options: Mapping[str, Any], m: int, n: int) -> bool:
        """Whether these options give an m x n matrix another direction than muon's."""
        return False

    @staticmethod
    def row_slot(options: Mapping[str, Any], m: int, n: int) -> str | None:
        """The slot of the state with one number for each row that these options keep for an m x n matrix, one of
        `ROW_SLOTS`; None if they keep nothing."""
        return None

    def find(self, u: Tensor, row_state: Tensor | None) -> Direction:
        """The direction of a stack [..., m, n]; `row_state` [..., m] is there where a slot is kept."""
        raise NotImplementedError


def form(m: int, n: int) -> Form:
    """Tall (m > n), wide (m < n) or square."""
    return "tall" if m > n else "wide" if m < n else "square"


NEARLY_SQUARE = 1.03
"""Matrices with fewer than 3 % more rows than columns, or columns than rows, count as square for aurora."""


def nearly_square(m: int, n: int) -> bool:
    """Whether one side of an m x n matrix is less than 3 % longer than the other."""
    return max(m, n) < NEARLY_SQUARE * min(m, n)


def balances(scope: str, shape_form: str) -> bool:
    """Whether a scope includes matrices of this form; aurora leaves the others to muon."""
    return shape_form != "square" and scope in ("all", shape_form)


def lr_scale(kind: str, m: int, n: int) -> float:
    """The factor s(m, n) by which the step of an m x n weight is larger than its learning rate.

    "aspect": sqrt(max(1, m/n)), that of Muon and of the released Aurora. "rms": 0.2 sqrt(max(m, n)), an update about
    as large as AdamW's. "spectral": sqrt(m/n).

    Raises:
        OptionError: an unknown kind.
    """
    if kind not in LR_SCALES:
        raise OptionError(f"unknown lr_scale {kind!r}: expected one of {', '.join(LR_SCALES)}")
    return LR_SCALES[kind](m, n)


def scaled_(d: Tensor, factor: float, *, polar: str) -> Tensor:
    """factor * d in place; rounded to bf16 with "quintic_exact", since the released code scales its bf16 result."""
    d.mul_(factor)
    return d.bfloat16().float() if polar == "quintic_exact" else d


def with_row_norms(x: Tensor, norm: float) -> Tensor:
    """x with every row that is not zero scaled to this norm."""
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.where(norms > 0, norm / norms, 0.0)


# An empty matrix, n = 0, has a scale too, though nothing to multiply with it.
LR_SCALES: dict[str, Callable[[int, int], float]] = {
    "aspect": lambda m, n: math.sqrt(max(1.0, m / max(1, n))),
    "rms": lambda m, n: 0.2 * math.sqrt(max(m, n)),
    "spectral": lambda m, n: math.sqrt(m / max(1, n)),
}
"""Learning-rate scales by name, as functions of the weight's own m and n."""
