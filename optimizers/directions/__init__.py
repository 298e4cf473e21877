"""The update directions, as pure functions of stacks [..., m, n].

Every function takes the (Nesterov-blended) momentum u of equally shaped weights, m rows = output neurons, and returns
the direction in fp32, without the learning-rate scale. u is not changed and the result shares no memory with it. A zero
matrix gives a zero direction; one with a NaN or an infinity gives NaN, and only that one.

A module per family holds the options, declared once, and the mathematics. `optimizers.reference` has a slow twin of
each, one matrix at a time in fp64: read that first.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .aurora import AuroraOptions, RowBalance, ScopedOptions, aurora, aurora_counted, automatic_row_balance
from .base import (
    LR_SCALES,
    Direction,
    Form,
    LrScale,
    MatrixOptions,
    PolarName,
    Scope,
    balances,
    form,
    lr_scale,
    scaled,
)
from .muon import MuonOptions, muon
from .normuon import NorMuonOptions, Target, UNorMuonOptions, even_rows, normuon, u_normuon, u_normuon_running
from .riemannian import RiemannianAuroraOptions, Variant, riemannian_aurora
from .row_balance import BalanceRule, EpsMode
from .speedrun import contra

DIRECTIONS: dict[str, type[MatrixOptions]] = {
    cls.direction: cls for cls in (AuroraOptions, RiemannianAuroraOptions, MuonOptions, NorMuonOptions, UNorMuonOptions)
}
"""The options of each direction by its name. A new direction is a module and an entry here."""


def from_options(u: Tensor, options: Mapping[str, Any], second_moment: Tensor | None = None) -> Direction:
    """The direction that the options of a matrix group name.

    Args:
        u: [..., m, n].
        options: of the group; options that are missing have their defaults.
        second_moment: [..., m], needed where `keeps_second_moment` is true, and only there.

    Raises:
        ValueError: the second moment is missing, or an option is out of range.
    """
    if second_moment is None and keeps_second_moment(options, *u.shape[-2:]):
        raise ValueError(f"{options['direction']!r} of a stack {tuple(u.shape)} needs its second moment, got None")
    chosen = DIRECTIONS[options["direction"]].of(options)
    found = chosen.find(u, second_moment)
    return found._replace(d=contra(found.d, u, chosen.contra)) if chosen.contra else found


def treats(options: Mapping[str, Any], m: int, n: int) -> bool:
    """Whether the direction of a complete set of options is another than muon for an m x n matrix."""
    return DIRECTIONS[options["direction"]].treats(options, m, n)


def keeps_second_moment(options: Mapping[str, Any], m: int, n: int) -> bool:
    """Whether the direction of an m x n matrix under these options has a running mean square of its rows."""
    return DIRECTIONS[options["direction"]].keeps_second_moment(options, m, n)


__all__ = [
    "DIRECTIONS",
    "LR_SCALES",
    "AuroraOptions",
    "BalanceRule",
    "Direction",
    "EpsMode",
    "Form",
    "LrScale",
    "MatrixOptions",
    "MuonOptions",
    "NorMuonOptions",
    "PolarName",
    "RiemannianAuroraOptions",
    "RowBalance",
    "Scope",
    "ScopedOptions",
    "Target",
    "UNorMuonOptions",
    "Variant",
    "aurora",
    "aurora_counted",
    "automatic_row_balance",
    "balances",
    "even_rows",
    "form",
    "from_options",
    "keeps_second_moment",
    "lr_scale",
    "muon",
    "normuon",
    "riemannian_aurora",
    "scaled",
    "treats",
    "u_normuon",
    "u_normuon_running",
]
