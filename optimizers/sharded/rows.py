"""The holder of matrices that are DTensors sharded by rows: those of fully_shard (FSDP2), also on a 2-D mesh (HSDP).

The layout is read from the DTensors: each parameter is a tensor of its own on every rank, with some of its rows or
none. Plan, owners and exchange are those of flat shards. All state is placed as the parameters are, also what has a
value for each row: it visits the owners during a step, so that a checkpoint of the DTensors is one of the optimizer.

Under HSDP every replica does the whole work, as DistributedDataParallel would.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import binding, directions, options
from ..blocks import Rectangle, columns, row_blocks, views
from ..dtensors import is_dtensor, local, mesh_of, refuse_placements, replicas_of, shard_dimension
from ..matrices import Matrices, Place, State, WholeMatrices, param_names
from .exchange import Exchange, Round, WireDtype, make_rounds
from .layout import Layout, LayoutError, Shape, ShardFragment
from .matrices import RoundTurn, ShardedMatrices
from .owners import Plan, Unit, make_plan, plan_group

REMEMBERED = 8
"""How many sets of parameters with gradients keep their rounds; making them takes the longer the larger the model."""


@dataclass(frozen=True)
class LocalRun:
    """Elements [start, stop) of the flattened local part of a DTensor: a piece of a step."""

    param: Tensor
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """The run in a tensor that is placed as the parameter is; a view if its local part is contiguous."""
        return local(tensor).reshape(-1)[self.start : self.stop]


@dataclass(frozen=True)
class RowVisits:
    """How values that belong to single rows reach the ranks that find the directions of these rows, and return."""

    exchange: Exchange
    rounds: list[Round]
    units: tuple[int, ...]
    """By unit of the exchange's plan: the unit of the matrices' plan whose rows it has."""


class DTensorMatrices(WholeMatrices):
    """The holder of an optimizer of DTensors. Parameters that are plain tensors are stepped by every rank.

    `Aurora` binds one by itself at its first step. Bind one before it for another wire dtype:
    `optimizer.bind(DTensorMatrices(wire_dtype="bf16"))`.

    Args:
        wire_dtype: in which momenta and steps travel between the ranks. "fp32" steps as one process would; "bf16" moves
            half as much.
    """

    def __init__(self, wire_dtype: WireDtype = "fp32") -> None:
        self.wire_dtype: WireDtype = wire_dtype
        self._groups: list[dist.ProcessGroup] = []
        self._held: set[int] = set()
        # By the ids of the matrices, and by what else a plan depends on.
        self._shards: dict[tuple[tuple[int, ...], Any], RowShards] = {}
        self._has_compared = False

    def __reduce__(self) -> Any:
        """A copy begins anew: process groups cannot be copied."""
        return type(self), (self.wire_dtype,)

    def prepare(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Give a zero gradient to DTensors without one that have one on another rank.

        Warns once of parameters that are plain tensors if their gradients are not the same on all ranks.

        Raises:
            OptionError: the DTensors are on several meshes.
        """
        mesh = mesh_of(groups)
        self._groups = [] if mesh is None else [mesh.get_group(i) for i in range(mesh.ndim) if mesh.size(i) > 1]
        held = [p for group in groups for p in group["params"] if is_dtensor(p)]
        self._held = set(map(id, held))
        params = [p for p in held if p.requires_grad]
        if not self._groups or not params:
            return
        missing, mark = [int(p.grad is None) for p in params], self._mark(groups)
        lacking = torch.tensor([*missing, mark, -mark], dtype=torch.int32, device=local(params[0]).device)
        self._reduce(lacking)
        if not any(missing) and not mark:
            return  # a rank that lacks nothing need not wait for the device to learn that
        *nowhere, least, negated = lacking.tolist()
        for p, is_nowhere in zip(params, nowhere, strict=True):
            if p.grad is None and not is_nowhere:
                p.grad = torch.zeros_like(p)
        if mark and least != -negated:
            self._warn_of_plain(groups)

    def _mark(self, groups: Sequence[Mapping[str, Any]]) -> int:
        """A number that tells gradients of plain tensors apart; 0 without any, and after the first that are not 0."""
        if self._has_compared:
            return 0
        plain = [p.grad for group in groups for p in group["params"] if p.grad is not None and not is_dtensor(p)]
        total = sum(float(local(g).double().abs().sum()) for g in plain if g.layout == torch.strided)
        self._has_compared = isfinite(total) and total > 0
        return 1 + hash(total) % 2**30 if self._has_compared else 0

    def _warn_of_plain(self, groups: Sequence[Mapping[str, Any]]) -> None:
        named = [pair for group in groups for pair in zip(param_names(group), group["params"], strict=True)]
        plain = [name for name, p in named if p.grad is not None and not is_dtensor(p)]
        warnings.warn(
            f"{len(plain)} parameters are not sharded, {', '.join(plain[:3])} for example, and their gradients differ "
            "between the ranks. Every rank steps its own, so they drift apart, unless they are meant to differ. "
            "fully_shard the root module as well, or average these gradients",
            UserWarning,
            stacklevel=5,
        )

    def shares(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Sequence[tuple[Matrices, list[Tensor]]]:
        """Whole parameters, and those that are sharded."""
        whole = [p for p in params if not is_dtensor(p)]
        # Nothing can be cut off an empty matrix.
        cut: list[Tensor] = [p for p in params if is_dtensor(p) and p.numel()]
        found: list[tuple[Matrices, list[Tensor]]] = [(self, whole)] if whole else []
        if cut:
            found.append((self.sharded(group), cut))
        return found

    def sharded(self, group: Mapping[str, Any]) -> RowShards:
        """The holder of the matrices of a group that are DTensors. Making it is a collective call of all ranks."""
        matrices = [p for p in group["params"] if is_dtensor(p) and p.numel() and binding.is_matrix(p, group)]
        ids = tuple(map(id, matrices))
        key = ids, plan_facts(group)
        if key not in self._shards:
            # What has been replaced since, or was planned for options that a loaded state has changed.
            stale = [
                own for own in self._shards if not self._held.issuperset(own[0]) or not set(ids).isdisjoint(own[0])
            ]
            for own in stale:
                del self._shards[own]
            self._shards[key] = RowShards(matrices, group, self.wire_dtype)
        return self._shards[key]

    def agree(self, finite: Tensor) -> Tensor:
        """Whether the flag is true on all ranks of the mesh."""
        flag = finite.to(torch.int32)
        self._reduce(flag)
        return flag.bool()

    def _reduce(self, values: Tensor) -> None:
        """The least of each value over all ranks of the mesh, in place."""
        for group in self._groups:
            dist.all_reduce(values, dist.ReduceOp.MIN, group=group)


class RowShards(ShardedMatrices):
    """The matrices of one group that are DTensors.

    Args:
        matrices: DTensors with at least one element, all sharded over the same dimension of one mesh.
        group: that they are in, with complete options.
        wire_dtype: in which momenta and steps travel.

    Raises:
        LayoutError: the ranks disagree, the DTensors are sharded over different dimensions of the mesh, or a local part
            is not contiguous.
        OptionError: one is not sharded by rows.
    """

    is_whole = True

    def __init__(self, matrices: Sequence[Tensor], group: Mapping[str, Any], wire_dtype: WireDtype) -> None:
        facts = zip(param_names(group), group["params"], row_blocks(group), views(group), strict=True)
        wanted = set(matrices)
        chosen = [fact for fact in facts if fact[1] in wanted]
        for name, p, _, view in chosen:
            refuse_placements(name, p, is_matrix=True, view=view)
        self.params = {name: p for name, p, _, _ in chosen}
        self.names = {p: name for name, p in self.params.items()}
        self.stacked = {name: p.shape[1] for name, p, _, view in chosen if view == "stack"}
        process_group, rank, held = read_rows(self.params)
        rows = {name: [count * self.stacked.get(name, 1) for count in counts] for name, counts in held.items()}
        shapes, entries = {}, []
        for name, p, entry, view in chosen:
            # The rows of stacks and of convolutions lie one after the other, as those of a matrix do.
            shapes[name] = tuple(p.shape) if view == "in_out" else (sum(rows[name]), columns(p.shape, view))
            entries.append((entry or (p.shape[1],)) * p.shape[0] if view == "stack" else entry)
        own = {
            "param_names": list(self.params),
            "row_blocks": entries,
            "views": ["in_out" if view == "in_out" else None for _, _, _, view in chosen],
        }
        device = local(matrices[0]).device
        plan, replicas = plan_group(row_layout(shapes, rows), {**group, **own}, device=device), replicas_of(matrices[0])
        if replicas is None:  # teams need all processes
            plan = make_plan(plan.layout, plan.units)
        super().__init__(plan, rank, process_group, wire_dtype, device, replicas)
        self._rows_held = rows
        self._rounds_of: dict[frozenset[str], list[Round]] = {}
        self._visits: dict[frozenset[int], RowVisits] = {}
        self._visiting: dict[int, Tensor] = {}

    def _find_shard(self) -> int:
        """Every parameter is one of its own."""
        return 0

    def state_shapes(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, torch.Size]:
        """As where parameters are whole: each slot is a DTensor of this shape."""
        return WholeMatrices().state_shapes(p, group)

    def planned_bytes(self, group: Mapping[str, Any]) -> list[int]:
        """What each rank receives in a step in which every matrix has a gradient, without the sums inside teams."""
        units = self.plan.units
        keep = [index for index, unit in enumerate(units) if directions.row_slot(group, *unit.shape)]
        rows = self._visits_for(keep).exchange.plan.received_elements
        size = self.exchange.dtype.itemsize
        both = zip(self.plan.received_elements, rows, strict=True)
        return [size * moved + torch.float32.itemsize * visiting for moved, visiting in both]

    def turns(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> list[RoundTurn]:
        """The rounds of the plan for these parameters. All ranks have equally many, also those that hold nothing."""
        names = frozenset(self.names[p] for p in params)
        rounds = self.rounds
        if len(names) < len(self.params):
            rounds = remembered(self._rounds_of, names, lambda: make_rounds(self.plan, self.rank, names=names))
        return [self._round_turn(turn) for turn in rounds]

    def _round_turn(self, turn: Round) -> RoundTurn:
        units = self.plan.units
        pieces = [
            LocalRun(self.params[units[run.unit].name], run.offset, run.offset + run.high - run.low)
            for run in turn.runs
        ]
        own = [units[part.unit] for part in turn.parts]
        places = [self._place(unit, part.area) for unit, part in zip(own, turn.parts, strict=True)]
        return RoundTurn(turn, pieces, own[0].shape if own else (0, 0), places)

    def _place(self, unit: Unit, area: Rectangle) -> Place:
        if unit.name not in self.stacked:
            return Place(unit.name, area.shifted(unit.row))
        index, row = divmod(unit.row, self.stacked[unit.name])
        return Place(f"{unit.name}[{index}]", area.shifted(row))

    def fetch_rows(self, turns: Sequence[RoundTurn], group: Mapping[str, Any], state: State) -> None:
        """Bring what is kept for each row to the owners, in fp32."""
        visits, found = self._visits_of(turns, group), {}
        for turn in visits.rounds:
            values = visits.exchange.gather(turn, self._row_runs(visits, turn, group, state)).wait()
            for part, rows in zip(turn.parts, values, strict=True):
                found[visits.units[part.unit]] = rows[:, 0]
        self._visiting = found

    def store_rows(self, turns: Sequence[RoundTurn], group: Mapping[str, Any], state: State) -> None:
        """Bring it back."""
        visits = self._visits_of(turns, group)
        for turn in visits.rounds:
            kept = [self._visiting[visits.units[part.unit]][:, None] for part in turn.parts]
            stack = torch.stack(kept) if kept else torch.empty(0, 0, 0, device=self.device)
            returned = visits.exchange.scatter(turn, stack).wait()
            for run, values in zip(self._row_runs(visits, turn, group, state), returned, strict=True):
                run.copy_(values)
        self._visiting = {}

    def row_states(self, turn: Any, slot: str, group: Mapping[str, Any], state: State) -> list[Tensor]:
        """Those that are visiting."""
        return [self._visiting[part.unit] for part in turn.round.parts]

    def _row_runs(self, visits: RowVisits, turn: Round, group: Mapping[str, Any], state: State) -> list[Tensor]:
        """Views of what this rank holds of the rows of a round."""
        units = visits.exchange.plan.units
        slot = self.row_slot(group)
        if slot is None:
            return []
        kept = (local(state[self.params[units[run.unit].name]][slot]) for run in turn.runs)
        return [run.of(values.view(-1)) for run, values in zip(turn.runs, kept, strict=True)]

    def _visits_of(self, turns: Sequence[RoundTurn], group: Mapping[str, Any]) -> RowVisits:
        """The exchange of the rows for which directions of these turns keep a number."""
        units = self.plan.units
        keep = [
            index for turn in turns for index in turn.round.units if directions.row_slot(group, *units[index].shape)
        ]
        return self._visits_for(keep)

    def _visits_for(self, keep: Sequence[int]) -> RowVisits:
        """The exchange of the rows of some units."""
        return remembered(self._visits, frozenset(keep), lambda: self._make_visits(sorted(keep)))

    def _make_visits(self, keep: Sequence[int]) -> RowVisits:
        plan, origins = row_visits(self.plan, keep, self._rows_held)
        exchange = Exchange(plan, self.rank, self.group, "fp32", self.device)
        return RowVisits(exchange, make_rounds(plan, self.rank), origins)


def row_visits(plan: Plan, keep: Sequence[int], rows: Mapping[str, Sequence[int]]) -> tuple[Plan, tuple[int, ...]]:
    """The plan by which values that belong to single rows reach the ranks that work on these rows.

    Every member of a team has some rows of a tall matrix, and all rows of a wide one.

    Args:
        plan: of the matrices.
        keep: the units whose rows have a value each.
        rows: of each matrix, by rank.

    Returns:
        The plan, and by unit of it the unit of the matrices' plan whose rows it has.
    """
    units: list[Unit] = []
    owners: list[tuple[int, ...]] = []
    origins: list[int] = []
    for index in keep:
        unit, team = plan.units[index], plan.teams[index]
        for place, member in enumerate(team):
            area = unit.part(place, len(team))
            units.append(Unit(unit.name, unit.row + area.row, area.row_stop - area.row, 1, 0))
            owners.append((member,))
            origins.append(index)
    layout = row_layout({name: (sum(counts),) for name, counts in rows.items()}, rows)
    return Plan(layout, tuple(units), tuple(owners), (0,) * len(units)), tuple(origins)


def chunked_rows(count: int, ranks: int) -> list[int]:
    """The rows that each rank has of a parameter with `count`: what fully_shard gives it, by torch.chunk."""
    size = -(-count // ranks)
    return [max(0, min(size, count - rank * size)) for rank in range(ranks)]


def plan_facts(group: Mapping[str, Any]) -> Any:
    """What the plan of a group depends on besides its matrices: their blocks, and the options of their directions."""
    chosen = [(key, group.get(key)) for key, known in options.MATRIX.items() if known.acts != "step"]
    return group["direction"], *chosen, *row_blocks(group), *views(group)


def row_layout(shapes: Mapping[str, Shape], rows: Mapping[str, Sequence[int]]) -> Layout:
    """The layout of parameters that are sharded by rows: one tensor each, in the order of `shapes`.

    Args:
        shapes: of the whole parameters.
        rows: of each, by rank. Those of a rank follow those of the ranks before it.
    """
    fragments: list[list[ShardFragment]] = [[] for _ in next(iter(rows.values()))]
    sizes = []
    for shard, (name, shape) in enumerate(shapes.items()):
        width, start = prod(shape[1:]), 0
        for rank, count in enumerate(rows[name]):
            if count:
                fragments[rank].append(ShardFragment(name, start, count * width, shard, 0))
            start += count * width
        sizes.append(max(rows[name]) * width)
    return Layout(dict(shapes), tuple(map(tuple, fragments)), tuple(sizes))


def read_rows(params: Mapping[str, Tensor]) -> tuple[dist.ProcessGroup | None, int, dict[str, list[int]]]:
    """The group of ranks over which the parameters are sharded, this one's place in it, and the rows of each parameter
    by rank. Collective.

    Raises:
        LayoutError: they are sharded over different dimensions of their mesh, or a local part is not contiguous.
    """
    dimensions: dict[int | None, str] = {}
    own = {}
    mesh = None
    for name, p in params.items():
        assert is_dtensor(p), "callers choose DTensors"
        part, mesh = local(p), p.device_mesh
        dimensions.setdefault(shard_dimension(p), name)
        own[name] = part.shape[0]
        if not part.is_contiguous():
            raise LayoutError(f"the local part of {name} is not contiguous (strides {part.stride()})")
    if len(dimensions) > 1:
        found = ", ".join(f"{name} over {dimension}" for dimension, name in dimensions.items())
        raise LayoutError(f"the matrices of a group are sharded over different dimensions of the mesh: {found}")
    (dimension,) = dimensions
    if mesh is None or dimension is None:
        return None, 0, {name: [count] for name, count in own.items()}
    group, size = mesh.get_group(dimension), mesh.size(dimension)
    everyone: list[Any] = [own] * size
    if size > 1:
        dist.all_gather_object(everyone, own, group=group)
    return group, mesh.get_local_rank(dimension), {name: [rank[name] for rank in everyone] for name in own}


def remembered(known: dict[Any, Any], key: Any, make: Callable[[], Any]) -> Any:
    """What is known of a key, or is made for it. The first that was made is forgotten if there are too many."""
    if key not in known:
        if len(known) >= REMEMBERED:
            known.pop(next(iter(known)))
        known[key] = make()
    return known[key]
