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

from .aurora import (
    AuroraOptions,
    RowBalance,
    ScopedOptions,
    aurora,
    aurora_carried,
    aurora_counted,
    automatic_row_balance,
    carries,
)
from .base import (
    LR_SCALES,
    ROW_SLOTS,
    Direction,
    Form,
    LrScale,
    MatrixOptions,
    PolarName,
    Scope,
    balances,
    form,
    lr_scale,
    scaled_,
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


def from_options(u: Tensor, options: Mapping[str, Any], row_state: Tensor | None = None) -> Direction:
    """The direction that the options of a matrix group name.

    Args:
        u: [..., m, n].
        options: of the group; options that are missing have their defaults.
        row_state: [..., m], needed where `row_slot` names a slot, and only there.

    Raises:
        ValueError: the state of the rows is missing, or an option is out of range.
    """
    slot = row_slot(options, *u.shape[-2:])
    if row_state is None and slot is not None:
        raise ValueError(
            f"{options['direction']!r} of a stack {tuple(u.shape)} needs its {slot.replace('_', ' ')}, got None"
        )
    chosen = DIRECTIONS[options["direction"]].of(options)
    found = chosen.find(u, row_state)
    return found._replace(d=contra(found.d, u, chosen.contra)) if chosen.contra else found


def treats(options: Mapping[str, Any], m: int, n: int) -> bool:
    """Whether the direction of a complete set of options is another than muon for an m x n matrix."""
    return DIRECTIONS[options["direction"]].treats(options, m, n)


def row_slot(options: Mapping[str, Any], m: int, n: int) -> str | None:
    """The slot with one number for each row that these options keep for an m x n matrix; None if they keep none."""
    return DIRECTIONS[options["direction"]].row_slot(options, m, n)


__all__ = [
    "DIRECTIONS",
    "LR_SCALES",
    "ROW_SLOTS",
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
    "aurora_carried",
    "aurora_counted",
    "automatic_row_balance",
    "balances",
    "carries",
    "even_rows",
    "form",
    "from_options",
    "lr_scale",
    "muon",
    "normuon",
    "riemannian_aurora",
    "row_slot",
    "scaled_",
    "treats",
    "u_normuon",
    "u_normuon_running",
]
