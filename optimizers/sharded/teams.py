"""Directions of a matrix whose long side is cut between the ranks of a team.

Each member has a part of the long side of one matrix and computes that part of the direction. All that it needs from
the others are n x n Gram matrices (n is the short side) and sums of single numbers: one all-reduce of a Gram matrix for
each balancing step, and one for each restart of the iteration of a polar factor. Every member repeats the n x n work,
so a team does more work in total than one rank would; it pays off if one matrix is more than a rank's share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import directions
from ..directions import Direction, carried, leverage
from ..directions.row_balance import balance
from ..flops import counter, read_options
from ..polar import largest_entry, prescale_by, product_dtype
from ..polar.gram import tall_gram_polar
from ..polar.precision import as_stated, counted_as
from ..polar.rows import Rows


class Team(Rows):
    """Reductions over the rows of all members, which all have to call them."""

    def __init__(self, group: dist.ProcessGroup | None, size: int) -> None:
        self.group, self.size = group, size

    def max(self, x: Tensor) -> Tensor:
        """The maximum over the rows of all members, [..., 1, n]."""
        return self.largest(x.amax(dim=-2, keepdim=True))

    def total(self, x: Tensor) -> Tensor:
        """The sum over the members; floating point numbers are added in fp32 or better."""
        if self.size == 1 or x.is_meta:
            return x
        wide = x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x.long()
        wide = wide.clone() if wide is x else wide
        dist.all_reduce(wide, group=self.group)
        return wide.to(x.dtype) if x.is_floating_point() else wide

    def largest(self, x: Tensor) -> Tensor:
        """The maximum over the members."""
        if self.size == 1 or x.is_meta:
            return x
        largest = x.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest

    def norm(self, x: Tensor) -> Tensor:
        """The Frobenius norm of the whole, [..., 1, 1]."""
        return self.total(super().norm(x).square()).sqrt()


def unshareable(options: Mapping[str, Any]) -> str | None:
    """Why a team cannot compute the direction of these options; None if it can."""
    if options["polar"] != "gram":
        return f"polar {options['polar']!r} works on the matrix itself, not on its Gram matrix"
    if options["direction"] == "riemannian_aurora":
        return "riemannian_aurora solves for all rows jointly"
    if options["direction"] == "aurora" and (options["row_balance"] == "polar" or options["eps_mode"] == "absolute"):
        return "row_balance 'polar' and eps_mode 'absolute' repeat the released arithmetic on a whole matrix"
    if options["contra"]:
        return "contra needs the largest singular value of the whole matrix"
    return None


def row_sharded_direction(
    u: Tensor,
    shape: tuple[int, int],
    options: Mapping[str, Any],
    team: Team,
    row_state: Tensor | None = None,
) -> Direction:
    """This member's part of the direction of one matrix of this shape: see `directions.from_options`.

    Args:
        u: [1, rows, columns] fp32, finite: a part of the rows of a tall or square matrix, of the columns of a wide one.
        shape: of the whole matrix.
        options: complete; `unshareable` must be None for them.
        team: the members.
        row_state: [1, rows] of this part, where the direction keeps a number for each row.
    """
    m, n = shape
    part = u if m >= n else u.mT
    with torch.no_grad(), as_stated(u.device):
        largest = team.largest(largest_entry(part))
        tall = prescale_by(part, largest)
        accuracy = options["polar_accuracy"]
        dtype = product_dtype("gram", options["polar_dtype"], u.device, accuracy)

        def factor(x: Tensor, even: Callable[[Tensor], Tensor] | None = None) -> Tensor:
            return torch.where(largest > 0, tall_gram_polar(x, dtype, team, even, accuracy), 0.0)

        none = torch.zeros(len(u), dtype=torch.int64, device=u.device)
        if row_state is not None and directions.carries(options):
            polished = options["row_balance"] == "polished"
            return Direction.uncounted(*carried.direction(tall, row_state, factor, polished=polished, rows=team))
        if options["direction"] == "aurora" and directions.treats(options, m, n):
            d, fallbacks, retries = _balanced(tall, options, team, factor)
            return Direction(d if m >= n else d.mT, fallbacks, retries)
        d = factor(tall)
        if directions.treats(options, m, n):
            d, row_state = directions.even_rows(d, options, shape, row_state, team)
            return Direction(d, none, none, row_state)
        return Direction(d if m >= n else d.mT, none, none)


def _balanced(tall: Tensor, options: Mapping[str, Any], team: Team, factor: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The direction of aurora, with its fallbacks and retries."""
    retries = torch.zeros(len(tall), dtype=torch.int64, device=tall.device)
    how = options["row_balance"]
    if how == "auto":
        how = directions.automatic_row_balance(options, tall.device)

    def from_polar(x: Tensor) -> tuple[Tensor, Tensor]:
        return leverage.from_polar(factor(x))

    def scores(D: Tensor) -> Tensor:
        x = D * tall
        if how == "polar":
            return from_polar(x)[0]
        found, retried = leverage.from_gram(x, team) if how == "gram" else leverage.from_cholesky(x, from_polar, team)
        retries.add_(retried)
        return found

    scale = balance(
        tall,
        scores,
        updates=options["iterations"] - 1,
        rule=options["balance_rule"],
        beta=options["beta"],
        tolerance=options["tolerance"],
        rows=team,
    )
    return factor(scale.D * tall), scale.fallbacks, retries


def part_flops(m: int, n: int, options: Mapping[str, Any], members: int, *, device: torch.device | str = "cpu") -> int:
    """Operations of the slowest member of a team: see `optimizers.flops.direction_flops`."""
    kind = torch.device(device).type
    return _counted(m, n, members, kind, tuple(sorted(read_options(options, device).items())))


@functools.lru_cache(maxsize=1024)
def _counted(m: int, n: int, members: int, device: str, options: tuple[tuple[str, Any], ...]) -> int:
    given = dict(options)
    share = -(-max(m, n) // members)
    part = torch.empty(1, *((share, n) if m >= n else (m, share)), device="meta")
    row_state = torch.empty(1, share, device="meta") if directions.row_slot(given, m, n) else None
    with counter() as count, counted_as(device):
        row_sharded_direction(part, (m, n), given, Team(None, members), row_state)
    return int(count.get_total_flops())
