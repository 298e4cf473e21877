"""Which ranks compute the direction of which matrix, and what that moves.

The unit is the matrix that gets a direction of its own: a weight, or a block of rows of a fused one. Its owner receives
the fragments of its momentum, computes, and sends the step back. Where single matrices are too much for one rank, a
*team* shares one: each member takes a part of its long side (see `teams`). A plan depends on the layout, the
options and nothing else, so all ranks compute the same plan without communicating.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..blocks import Rectangle
from ..flops import direction_flops
from .layout import Layout, LayoutError, ShardFragment
from .teams import part_flops, unshareable

IMBALANCE = 1.1
"""Up to this load of the slowest rank over the mean an owner is chosen for what it already holds of a matrix."""
TEAM_SIZES = (2, 3, 4, 8, 16)
"""Sizes of teams that share a matrix. All members repeat the work on its short side, so larger teams gain nothing."""


@dataclass(frozen=True)
class Unit:
    """One matrix: rows [row, row + rows) of a parameter, with what its direction costs."""

    name: str
    row: int
    rows: int
    columns: int
    cost: int
    """Floating point operations of its direction."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows, self.columns

    @property
    def elements(self) -> int:
        """How many there are."""
        return self.rows * self.columns

    def run(self, fragment: ShardFragment) -> tuple[int, int]:
        """What the fragment holds of this unit, as elements [low, high) of the flattened unit; none if low >= high."""
        if fragment.name != self.name:
            return 0, 0
        first = self.row * self.columns
        return max(0, fragment.start - first), min(self.elements, fragment.stop - first)

    def part(self, member: int, members: int) -> Rectangle:
        """What one member of a team works on: its share of the long side, rows of a square one."""
        long = max(self.shape)
        low, high = long * member // members, long * (member + 1) // members
        if self.rows >= self.columns:
            return Rectangle(low, high, 0, self.columns)
        return Rectangle(0, self.rows, low, high)


def rectangles(low: int, high: int, columns: int, inside: Rectangle) -> Iterator[Rectangle]:
    """Elements [low, high) of a flattened matrix that lie inside a rectangle: up to three rectangles, in order.

    A run of elements is the end of a row, whole rows, and the beginning of one.
    """
    first, last = -(-low // columns), high // columns  # whole rows
    rows = (
        [(low // columns, low % columns, high - low // columns * columns)]  # within one row
        if last < first
        else [(first - 1, low % columns, columns)] * (low % columns > 0)
        + [(first, 0, columns)] * (last > first)
        + [(last, 0, high % columns)] * (high % columns > 0)
    )
    for row, begin, end in rows:
        stop = last if begin == 0 and end == columns else row + 1
        found = Rectangle(
            max(row, inside.row), min(stop, inside.row_stop), max(begin, inside.column), min(end, inside.column_stop)
        )
        if found.row < found.row_stop and found.column < found.column_stop:
            yield found


@dataclass(frozen=True)
class Plan:
    """The team of every unit: mostly one rank, its owner."""

    layout: Layout
    units: tuple[Unit, ...]
    teams: tuple[tuple[int, ...], ...]
    """Ranks by unit."""
    costs: tuple[int, ...]
    """Floating point operations of each member, by unit."""

    @cached_property
    def loads(self) -> list[int]:
        """Floating point operations by rank; what a team does more than once counts more than once."""
        return _loads(self.teams, self.costs, self.layout.world_size)

    @property
    def imbalance(self) -> float:
        """Load of the slowest rank over an equal share of what one process would do: 1 is ideal."""
        total = sum(unit.cost for unit in self.units)
        return max(self.loads) * self.layout.world_size / total if total else 1.0

    @cached_property
    def received_elements(self) -> list[int]:
        """Elements that each rank receives in a step: momenta of its own parts, and steps of what it holds of others.

        What a rank holds of its own parts does not travel. The sums inside a team are not in it.
        """
        received = [0] * self.layout.world_size
        for unit, team in zip(self.units, self.teams, strict=True):
            parts = [unit.part(member, len(team)) for member in range(len(team))]
            for rank, fragment in self.fragments[unit.name]:
                low, high = unit.run(fragment)
                for member, part in zip(team, parts, strict=True):
                    if member != rank and low < high:
                        moved = sum(r.elements for r in rectangles(low, high, unit.columns, part))
                        received[member] += moved
                        received[rank] += moved
        return received

    @cached_property
    def fragments(self) -> dict[str, list[tuple[int, ShardFragment]]]:
        """(rank, fragment) of every parameter, by rank."""
        found: dict[str, list[tuple[int, ShardFragment]]] = {name: [] for name in self.layout.shapes}
        for rank, own in enumerate(self.layout.fragments):
            for fragment in own:
                found[fragment.name].append((rank, fragment))
        return found

    @cached_property
    def _owned(self) -> list[list[int]]:
        found: list[list[int]] = [[] for _ in range(self.layout.world_size)]
        for index, team in enumerate(self.teams):
            for rank in team:
                found[rank].append(index)
        return found

    def owned(self, rank: int) -> list[int]:
        """Indices of the units that a rank works on."""
        return list(self._owned[rank])

    def digest(self) -> str:
        """sha256 of layout and teams, to be compared between ranks."""
        table = [(u.name, u.row, u.rows, team) for u, team in zip(self.units, self.teams, strict=True)]
        return hashlib.sha256((self.layout.digest() + json.dumps(table)).encode()).hexdigest()

    def table(self) -> list[str]:
        """The ownership, a line a rank."""
        total = sum(self.loads) or 1
        lines = []
        for rank, load in enumerate(self.loads):
            names = [self._label(index, rank) for index in self.owned(rank)]
            shown = ", ".join(names[:3]) + (f", ... ({len(names)} in all)" if len(names) > 3 else "")
            lines.append(f"rank {rank}: {load / total:6.1%} of {total:.3e} operations: {shown or 'nothing'}")
        return lines

    def _label(self, index: int, rank: int) -> str:
        unit, team = self.units[index], self.teams[index]
        block = f"[{unit.row}:{unit.row + unit.rows}]" if unit.rows < self.layout.shapes[unit.name][0] else ""
        return f"{unit.name}{block}" + (f" (part {team.index(rank) + 1} of {len(team)})" if len(team) > 1 else "")


def units_of(
    shapes: Mapping[str, Sequence[int]],
    options: Mapping[str, Any],
    row_blocks: Sequence[Sequence[int] | None] | None = None,
    *,
    device: torch.device | str = "cpu",
) -> list[Unit]:
    """The units of a matrix group.

    Args:
        shapes: parameter name -> (rows, columns), in the group's order.
        options: of the group (see optimizers.options).
        row_blocks: the group's: the rows of each parameter's blocks, None for a whole one.
        device: where directions will run, for their cost.
    """
    units = []
    for (name, (rows, columns)), split in zip(shapes.items(), row_blocks or [None] * len(shapes), strict=True):
        row = 0
        for height in split or (rows,):
            cost = direction_flops(height, columns, options, device=device)
            units.append(Unit(name, row, height, columns, cost))
            row += height
    return units


def plan_group(layout: Layout, group: Mapping[str, Any], *, device: torch.device | str = "cpu") -> Plan:
    """The plan of a matrix group.

    Args:
        layout: of the whole optimizer.
        group: with `param_names`, its options, and `row_blocks` if any parameter is split.
        device: where the directions will run.

    Raises:
        LayoutError: a parameter of the group is not stored as outputs x inputs.
    """
    for name, view in zip(group["param_names"], group.get("views") or (), strict=False):
        if view is not None:
            raise LayoutError(
                f"{name} has the view {view!r}: only matrices that are stored as outputs x inputs can be cut between "
                "ranks. Give it to AdamW by an override"
            )
    shapes = {name: layout.shapes[name] for name in group["param_names"]}
    units = units_of(shapes, group, group.get("row_blocks"), device=device)
    part_costs = {}
    if unshareable(group) is None:
        sizes = [size for size in TEAM_SIZES if size <= layout.world_size]
        part_costs = {size: [part_flops(*u.shape, group, size, device=device) for u in units] for size in sizes}
    return make_plan(layout, units, part_costs)


def make_plan(
    layout: Layout,
    units: Sequence[Unit],
    part_cost: Mapping[int, Sequence[int]] | None = None,
    imbalance: float = IMBALANCE,
) -> Plan:
    """Owners by locality within a limit on the imbalance, else by longest processing time first; teams if need be.

    Units go in the order of their cost. Each goes to the rank that holds most of it among those that it does not
    overload; if it would overload all of them, to the least loaded. The limit is `imbalance` times the mean, or what
    longest-processing-time alone reaches if that is more.

    Args:
        layout: where the momentum lies.
        units: the matrices to be assigned.
        part_cost: team size -> operations of one member, by unit; a size that is missing is not used.
        imbalance: see `IMBALANCE`.
    """
    whole = [unit.cost for unit in units]
    mean = sum(whole) / layout.world_size
    held = _held(layout, units)
    sizes, slowest = _team_sizes(layout, units, held, part_cost or {}, imbalance * mean)
    costs = _costs(whole, sizes, part_cost or {})
    limit = max(imbalance * mean, slowest)
    teams = _assign(units, costs, sizes, layout, held, limit)
    if max(_loads(teams, costs, layout.world_size), default=0) > limit:
        teams = _assign(units, costs, sizes, layout, held, limit=0)
    return Plan(layout, tuple(units), tuple(teams), tuple(costs))


def _team_sizes(
    layout: Layout,
    units: Sequence[Unit],
    held: Sequence[Mapping[int, int]],
    part_cost: Mapping[int, Sequence[int]],
    enough: float,
) -> tuple[list[int], int]:
    """Team size by unit and the load of the slowest rank then.

    Starting from one rank a unit, the shape that costs its members most gets the next larger team, as long as the
    slowest rank may become faster; the best that was seen is taken.
    """
    whole = [unit.cost for unit in units]
    sizes = [1] * len(units)
    best: tuple[int, list[int]] | None = None
    while True:
        costs = _costs(whole, sizes, part_cost)
        slowest = max(_loads(_assign(units, costs, sizes, layout, held, limit=0), costs, layout.world_size), default=0)
        if best is None or slowest < best[0]:
            best = slowest, list(sizes)
        if slowest <= enough or not units:
            break
        shape = units[max(range(len(units)), key=costs.__getitem__)].shape
        alike = [index for index, unit in enumerate(units) if unit.shape == shape]
        larger = [size for size in sorted(part_cost) if sizes[alike[0]] < size <= layout.world_size]
        if not larger:
            break
        for index in alike:
            sizes[index] = larger[0]
    return best[1], best[0]


def _costs(whole: Sequence[int], sizes: Sequence[int], part_cost: Mapping[int, Sequence[int]]) -> list[int]:
    return [part_cost[size][i] if size > 1 else whole[i] for i, size in enumerate(sizes)]


def _assign(
    units: Sequence[Unit],
    costs: Sequence[int],
    sizes: Sequence[int],
    layout: Layout,
    held: Sequence[Mapping[int, int]],
    limit: float,
) -> list[tuple[int, ...]]:
    teams: list[tuple[int, ...]] = [()] * len(units)
    loads = [0] * layout.world_size
    for index in sorted(range(len(units)), key=lambda i: (-costs[i], i)):
        own = held[index]
        fits = [rank for rank, load in enumerate(loads) if load + costs[index] <= limit]
        by_locality = sorted(fits, key=lambda rank: (-own.get(rank, 0), loads[rank], rank))
        by_load = sorted(range(len(loads)), key=lambda rank: (loads[rank], -own.get(rank, 0), rank))
        chosen = by_locality if len(fits) >= sizes[index] else by_load
        teams[index] = tuple(sorted(chosen[: sizes[index]]))
        for rank in teams[index]:
            loads[rank] += costs[index]
    return teams


def _loads(teams: Sequence[Sequence[int]], costs: Sequence[int], world_size: int) -> list[int]:
    loads = [0] * world_size
    for team, cost in zip(teams, costs, strict=True):
        for rank in team:
            loads[rank] += cost
    return loads


def _held(layout: Layout, units: Sequence[Unit]) -> list[dict[int, int]]:
    """Elements of each unit by the ranks that hold any."""
    named: dict[str, list[int]] = {}
    for index, unit in enumerate(units):
        named.setdefault(unit.name, []).append(index)
    held: list[dict[int, int]] = [{} for _ in units]
    for rank, own in enumerate(layout.fragments):
        for fragment in own:
            for index in named.get(fragment.name, ()):
                low, high = units[index].run(fragment)
                if low < high:
                    held[index][rank] = held[index].get(rank, 0) + high - low
    return held
