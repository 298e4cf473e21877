"""NorMuon and U-NorMuon: the polar factor of the momentum, with its rows scaled.

A polar factor with m <= n has rows of norm 1. There both are muon, and the second moment does not change.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..fields import option, takes_options
from ..polar.rows import HERE, Rows
from .base import SECOND_MOMENT, Direction, MatrixOptions, with_row_norms
from .muon import orthogonal

Target = Literal["graft", "unit"]

# Guards the division by the root of a second moment.
MOMENT_EPS = 1e-10


def _beta2_idle(options: Mapping[str, Any]) -> str | None:
    if options["direction"] == "normuon" and options["normuon_target"] == "unit":
        return "normuon_target 'unit' gives every row norm 1, whatever it was before"
    if options["direction"] == "u_normuon" and not options["running_norms"]:
        return "without running_norms nothing is averaged"
    return None


@dataclass(frozen=True)
class _AveragingOptions(MatrixOptions):
    """The options of directions that average row norms."""

    beta2: float = option(
        0.95,
        "Share of the running row norms that each step of normuon, or of u_normuon with `running_norms`, keeps.",
        high=1.0,
        idle=_beta2_idle,
    )

    @staticmethod
    def treats(options: Mapping[str, Any], m: int, n: int) -> bool:
        """Tall ones."""
        return m > n


@dataclass(frozen=True)
class NorMuonOptions(_AveragingOptions):
    """The options of NorMuon."""

    direction: ClassVar[str] = "normuon"

    normuon_target: Target = option(
        "graft",
        'Size of a normuon direction. "graft": that of muon\'s. "unit": every row has norm 1, which on a tall m x n '
        "matrix is a step sqrt(m/n) times larger.",
    )

    @staticmethod
    def row_slot(options: Mapping[str, Any], m: int, n: int) -> str | None:
        """Tall ones."""
        return SECOND_MOMENT if m > n else None

    def find(self, u: Tensor, row_state: Tensor | None) -> Direction:
        """`normuon`."""
        factor = orthogonal(u, self)
        m, n = factor.shape[-2:]
        if row_state is None or m <= n:
            return Direction.uncounted(factor)
        d, v = over_running_norms(factor, row_state, self.beta2, self.normuon_target)
        return Direction.uncounted(d, v)


@dataclass(frozen=True)
class UNorMuonOptions(_AveragingOptions):
    """The options of U-NorMuon."""

    direction: ClassVar[str] = "u_normuon"

    running_norms: bool = option(False, "Let u_normuon divide by the running row norms instead of the present ones.")

    @staticmethod
    def row_slot(options: Mapping[str, Any], m: int, n: int) -> str | None:
        """Tall ones, with `running_norms`."""
        return SECOND_MOMENT if options["running_norms"] and m > n else None

    def find(self, u: Tensor, row_state: Tensor | None) -> Direction:
        """`u_normuon`, or `u_normuon_running` if there is a second moment."""
        factor = orthogonal(u, self)
        m, n = factor.shape[-2:]
        if row_state is not None and m > n:
            d, v = to_even_running_norms(factor, row_state, self.beta2, m)
            return Direction.uncounted(d, v)
        return Direction.uncounted(factor if m <= n else with_row_norms(factor, math.sqrt(n / m)))


@takes_options(NorMuonOptions, names={"normuon_target": "target"})
def normuon(u: Tensor, v: Tensor, options: NorMuonOptions) -> tuple[Tensor, Tensor]:
    """NorMuon (Li et al., arXiv 2510.05491): the rows of polar(u) divided by their running root mean square.

    Args:
        u: [..., m, n].
        v: [..., m] fp32, the running mean square of each row; zeros at the start. It is not changed.

    Returns:
        The direction in fp32 and the new v. Where m <= n the direction is muon's, and v is the same.

    Raises:
        OptionError: an option out of range.
    """
    found = options.find(u, v)
    return found.d, v.clone() if found.row_state is None else found.row_state


@takes_options(UNorMuonOptions, without=("beta2", "running_norms"))
def u_normuon(u: Tensor, options: UNorMuonOptions) -> Tensor:
    """U-NorMuon: polar(u) with every row that is not zero scaled to sqrt(min(1, n/m)), the norm of rows on average.

    Args:
        u: [..., m, n]. Where m <= n the direction is muon's.
    """
    return options.find(u, None).d


@takes_options(UNorMuonOptions, without=("running_norms",))
def u_normuon_running(u: Tensor, v: Tensor, options: UNorMuonOptions) -> tuple[Tensor, Tensor]:
    """U-NorMuon with the running mean square v of the rows instead of this step's: row norms are even on average.

    Args:
        u: [..., m, n].
        v: [..., m] fp32, as in `normuon`; but a row's average begins at its first mean square, so it has no bias to
            correct.

    Returns:
        The direction in fp32 and the new v. Where m <= n the direction is muon's, and v is the same.
    """
    found = options.find(u, v)
    return found.d, v.clone() if found.row_state is None else found.row_state


def over_running_norms(
    factor: Tensor, v: Tensor, beta2: float, target: Target, rows: Rows = HERE
) -> tuple[Tensor, Tensor]:
    """What normuon makes of the rows of a tall polar factor, and the new v. `rows` may know of more rows than these."""
    v = torch.lerp(v, factor.square().mean(dim=-1), 1 - beta2)
    scaled_rows = factor / (v.sqrt().unsqueeze(-1) + MOMENT_EPS)
    if target == "unit":
        return with_row_norms(scaled_rows, 1.0), v
    wanted, present = rows.norm(factor), rows.norm(scaled_rows)
    return scaled_rows * torch.where(present > 0, wanted / present, 0.0), v


def to_even_running_norms(factor: Tensor, v: Tensor, beta2: float, m: int) -> tuple[Tensor, Tensor]:
    """What u_normuon_running makes of the rows of a tall polar factor that has m rows in all, and the new v."""
    now = factor.square().mean(dim=-1)
    v = torch.where(v > 0, torch.lerp(v, now, 1 - beta2), now)
    return factor * (math.sqrt(1 / m) / (v.sqrt().unsqueeze(-1) + MOMENT_EPS)), v


def even_rows(
    factor: Tensor, options: Mapping[str, Any], shape: tuple[int, int], second_moment: Tensor | None, rows: Rows
) -> tuple[Tensor, Tensor | None]:
    """What "normuon" and "u_normuon" make of some rows of a tall polar factor.

    Args:
        factor: [..., rows here, n].
        options: those of the matrix group.
        shape: (m, n) of the whole factor.
        second_moment: [..., rows here], if one is kept.
        rows: reductions over all rows.

    Returns:
        The direction and the new second moment.
    """
    m, n = shape
    if second_moment is None:
        return with_row_norms(factor, math.sqrt(n / m)), None
    if options["direction"] == "normuon":
        return over_running_norms(factor, second_moment, options["beta2"], options["normuon_target"], rows)
    return to_even_running_norms(factor, second_moment, options["beta2"], m)
