"""The holder of matrices that are cut between ranks: flat shards, with an owner or a team for each matrix.

The step itself is `optimizers.matrices.matrix_step`. Here its pieces are the runs of this rank's flat shard, and its
stacks are what the plan assigns to this rank. The values of the next round travel while the present one is computed, so
a step needs the buffers of two rounds besides the shard.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import directions
from ..blocks import Block
from ..directions import Direction
from ..matrices import Matrices, Piece, Place, State
from ..polar.rows import HERE, Rows
from .exchange import Exchange, Gathering, Round, Scattering, WireDtype, make_rounds
from .layout import LayoutError
from .owners import Plan, Unit
from .teams import Team, row_sharded_direction

# Larger than the stated error of any backend, smaller than the error that a fault causes.
TOLERANCE, UNEVEN = 0.1, 0.25


@dataclass(frozen=True)
class Applied:
    """What a step did to one matrix: properties of (w before - w after) / (lr scale), without the decay."""

    unit: Unit
    largest: float
    """Largest singular value: 1 for an orthogonal direction, 0 for none."""
    filled: float
    """Squared Frobenius norm over the short side: 1 where every singular value is 1, less for low rank."""
    spread: float
    """Standard deviation over mean of the norms of the rows that are not zero."""


def doubts(measured: Iterable[Applied], options: Mapping[str, Any]) -> list[str]:
    """What a step with these options cannot have done: one message for each matrix. A matrix without a step is skipped.

    If the momentum has low rank, a direction with singular values of 1 also has some of 0, so only the largest is
    checked. Even rows are promised only for full rank, and not at the first steps with row scales that are carried.
    """
    plain = not options["contra"] and not options["uw_floor"]
    orthogonal = plain and options["direction"] in ("muon", "aurora", "riemannian_aurora")
    even = plain and options["direction"] in ("aurora", "riemannian_aurora", "u_normuon")
    even = even and options.get("iterations", 2) > 1 and not options.get("running_norms", False)
    even = even and not directions.carries(options)
    found = []
    for applied in measured:
        unit = applied.unit
        if applied.filled == 0:
            continue
        if orthogonal and abs(applied.largest - 1) > TOLERANCE:
            found.append(f"{unit.name}: the largest singular value of its step is {applied.largest:.3g}, expected 1")
        full = applied.filled > 1 - TOLERANCE or not orthogonal
        if even and full and directions.treats(options, *unit.shape) and applied.spread > UNEVEN:
            found.append(f"{unit.name}: the row norms of its step differ by {applied.spread:.0%}, expected about 1 %")
    return found


@dataclass(frozen=True)
class RoundTurn:
    """A round of the plan, as a step of this rank sees it."""

    round: Round
    pieces: Sequence[Piece]
    """The runs that it holds."""
    shape: tuple[int, int]
    """Of each whole matrix; (0, 0) where this rank works on none."""
    places: list[Place]


@dataclass(frozen=True)
class ShardedTurn(RoundTurn):
    """A round, as a step of this rank's flat shard sees it."""

    flat: Tensor
    """The shard."""


class ShardedMatrices:
    """One process's side of the matrix group of an optimizer: a holder for `optimizers.matrices`.

    Args:
        plan: the owners, with the layout.
        rank: of this process.
        group: the process group over which the layout is cut; None is the default one.
        wire_dtype: in which momenta and steps travel.
        device: where the shards live.
        replicas: the ranks of each group like `group`, among all processes of the run: with these it makes its teams.
            None: only its own, which may hang if teams overlap and it does not have all processes.

    Attributes:
        exchange: counts the bytes received.
        device: where the shards live.

    Raises:
        LayoutError: the ranks disagree about layout or plan, or their number is not that of the layout.
    """

    is_whole = False
    in_flight = 1

    def __init__(
        self,
        plan: Plan,
        rank: int,
        group: dist.ProcessGroup | None,
        wire_dtype: WireDtype,
        device: torch.device,
        replicas: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self._replicas = replicas
        self.plan, self.rank, self.group, self.device = plan, rank, group, device
        self.world_size = plan.layout.world_size
        self._check_agreement()
        self.exchange = Exchange(plan, rank, group, wire_dtype, device)
        self.rounds = make_rounds(plan, rank)
        self.teams = self._make_teams()
        self.shard = self._find_shard()
        self._check_assembly()

    def _find_shard(self) -> int:
        """The index of the shard with the matrices."""
        names = {unit.name for unit in self.plan.units}
        shards = {f.shard for own in self.plan.layout.fragments for f in own if f.name in names}
        if len(shards) > 1:
            raise LayoutError(f"the matrices are in the groups {sorted(shards)}: expected one group of all matrices")
        return min(shards, default=0)

    def _check_agreement(self) -> None:
        if self.world_size == 1:
            return
        present = dist.get_world_size(self.group)
        if present != self.world_size:
            raise LayoutError(f"the layout is for {self.world_size} ranks, but the process group has {present}")
        digests: list[Any] = [None] * self.world_size
        dist.all_gather_object(digests, self.plan.digest(), group=self.group)
        if len(set(digests)) > 1:
            raise LayoutError("the ranks made different plans: they do not train the same model with the same config")

    def _check_assembly(self) -> None:
        """Sends every element its own number: each part has to arrive complete and in order."""
        wrong = []
        for turn in self.rounds:
            runs = [_numbers(self.plan.units[run.unit], run.low, run.high, self.device) for run in turn.runs]
            found = self.exchange.gather(turn, runs, torch.float32).wait()
            for part, values in zip(turn.parts, found, strict=True):
                unit, area = self.plan.units[part.unit], part.area
                whole = _numbers(unit, 0, unit.elements, self.device).view(unit.shape)
                if not torch.equal(values, whole[area.row : area.row_stop, area.column : area.column_stop]):
                    wrong.append(unit.name)
        self.exchange.received_bytes = 0
        everyone: list[Any] = [wrong] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(everyone, wrong, group=self.group)
        if names := [name for some in everyone for name in some]:
            raise LayoutError(f"{len(names)} matrices do not arrive complete at their owner: {', '.join(names[:5])}")

    def _make_teams(self) -> dict[tuple[int, ...], Team]:
        """A process group for every team of two or more; making one is a collective of all processes.

        torch can make groups of their members alone, but names them by how many groups a process has, in which members
        of several teams differ: they would wait for each other for ever.
        """
        teams = {}
        for ranks in dict.fromkeys(team for team in self.plan.teams if len(team) > 1):
            own = dist.get_process_group_ranks(self.group or dist.group.WORLD)
            alone = self._replicas is None and len(own) < dist.get_world_size()
            for replica in self._replicas or [own]:
                group = dist.new_group([replica[rank] for rank in ranks], use_local_synchronization=alone)
                if list(replica) == list(own):
                    teams[ranks] = Team(group, len(ranks))
        return teams

    def prepare(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """A shard has the gradients of all its parameters."""

    def shares(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Sequence[tuple[Matrices, list[Tensor]]]:
        """All of them."""
        return [(self, list(params))] if params else []

    def agree(self, finite: Tensor) -> Tensor:
        """Whether the flag is true on every rank."""
        if self.world_size == 1:
            return finite
        flag = finite.to(self.device, torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.group)
        return flag.bool()

    def total(self, counts: Tensor) -> Tensor:
        """The sum over all ranks."""
        if self.world_size > 1:
            dist.all_reduce(counts, group=self.group)
        return counts

    def state_shapes(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, torch.Size]:
        """The state of the shard: `momentum` of its size, and a slot with a number per row of this rank's parts."""
        shapes = {"momentum": torch.Size([self.plan.layout.shard_sizes[self.shard]]), "step": torch.Size()}
        rows = sum(stop - start for _, start, stop in self.owned_rows(group))
        if (slot := self.row_slot(group)) is not None:
            shapes[slot] = torch.Size([rows])
        return shapes

    def row_slot(self, options: Mapping[str, Any]) -> str | None:
        """The slot of the group with one number for each row, if any of its matrices has one."""
        slots = (directions.row_slot(options, *unit.shape) for unit in self.plan.units)
        return next(filter(None, slots), None)

    def owned_rows(self, options: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
        """(parameter, row, row stop) of what the slot of the rows holds, in its order.

        If one block of a parameter has it, all its rows have it, as where parameters are whole.
        """
        units = self.plan.units
        names = {unit.name for unit in units if directions.row_slot(options, *unit.shape)}
        for turn in self.rounds:
            for part in turn.parts:
                unit = units[part.unit]
                # Each member of a team has all rows of a wide matrix, which is cut by columns: the first keeps them.
                first = self.rank == self.plan.teams[part.unit][0] or unit.rows >= unit.columns
                if unit.name in names and first:
                    yield unit.name, unit.row + part.area.row, unit.row + part.area.row_stop

    def turns(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Sequence[RoundTurn]:
        """The rounds of the plan. All ranks have equally many, also those that hold nothing."""
        (flat,) = params
        return [self._turn(turn, flat) for turn in self.rounds]

    def _turn(self, turn: Round, flat: Tensor) -> ShardedTurn:
        pieces = [Block(flat, run.offset, run.offset + run.high - run.low) for run in turn.runs]
        units = [self.plan.units[part.unit] for part in turn.parts]
        places = [Place(unit.name, part.area.shifted(unit.row)) for unit, part in zip(units, turn.parts, strict=True)]
        return ShardedTurn(turn, pieces, units[0].shape if units else (0, 0), places, flat)

    def gather(self, turn: RoundTurn, values: Iterable[Tensor]) -> Gathering:
        """Start to bring the runs to the owners."""
        return self.exchange.gather(turn.round, values)

    def scatter(self, turn: RoundTurn, stack: Tensor) -> Scattering:
        """Start to bring the steps back to the runs."""
        return self.exchange.scatter(turn.round, stack)

    def fetch_rows(self, turns: Sequence[RoundTurn], group: Mapping[str, Any], state: State) -> None:
        """The owners keep them."""

    def store_rows(self, turns: Sequence[RoundTurn], group: Mapping[str, Any], state: State) -> None:
        """The owners keep them."""

    def row_states(self, turn: Any, slot: str, group: Mapping[str, Any], state: State) -> list[Tensor]:
        """Views of the slot: it has the rows of this rank's parts, in the order of `owned_rows`."""
        values, at = state[turn.flat][slot], 0
        views = {}
        for name, start, stop in self.owned_rows(group):
            views[name, start] = values[at : at + stop - start]
            at += stop - start
        return [views[place.name, place.area.row] for place in turn.places]

    def weight_norms(self, turns: Sequence[RoundTurn]) -> list[Tensor]:
        """From the sums of squares of all ranks."""
        squares = torch.zeros(len(self.plan.units), dtype=torch.float32, device=self.device)
        for turn in turns:
            for run, piece in zip(turn.round.runs, turn.pieces, strict=True):
                squares[run.unit] += piece.of(piece.param).float().square().sum()
        norms = self.total(squares).sqrt()
        units = [torch.tensor([part.unit for part in turn.round.parts], dtype=torch.int64) for turn in turns]
        return [norms[some.to(norms.device)][:, None, None] for some in units]

    def direction(self, turn: RoundTurn, u: Tensor, group: Mapping[str, Any], row_state: Tensor | None) -> Direction:
        """By `directions.from_options`, or by a team where this rank works on a part of a matrix."""
        team = self._team(turn)
        if team is None:
            return directions.from_options(u, group, row_state)
        found = row_sharded_direction(u, turn.shape, group, team, row_state)
        if self.rank == self.plan.teams[turn.round.parts[0].unit][0]:
            return found
        # Each member of a team has seen what the team counts.
        none = torch.zeros_like(found.fallbacks)
        return found._replace(fallbacks=none, retries=none)

    def rows(self, turn: RoundTurn) -> Rows:
        """Those of the team, if this rank has a part of the rows only."""
        return self._team(turn) or HERE

    def _team(self, turn: RoundTurn) -> Team | None:
        return self.teams.get(self.plan.teams[turn.round.parts[0].unit])

    def applied(self, before: Tensor, after: Tensor, options: Mapping[str, Any]) -> list[Applied]:
        """What a step did to the matrices whose first rank this is, measured from the weights.

        Args:
            before: the shard before the step.
            after: the shard after it.
            options: of the group, with the learning rate of that step; above 0.
        """
        lr, decay = float(options["lr"]), 1 - float(options["lr"]) * options["weight_decay"]
        step = (before * decay - after) / lr
        if options["cautious"]:
            step = torch.where(step * before >= 0, step, (before - after) / lr)
        measured = []
        for turn in self.rounds:
            d = self.exchange.gather(turn, [run.of(step) for run in turn.runs], torch.float32).wait()
            for part, matrix in zip(turn.parts, d, strict=True):
                unit, team = self.plan.units[part.unit], self.plan.teams[part.unit]
                measured.append(_measure(unit, matrix, options, self.teams.get(team)))
        return measured


def _numbers(unit: Unit, low: int, high: int, device: torch.device) -> Tensor:
    """A number for each element, exact in fp32, that differs from those of all elements near it."""
    return ((torch.arange(low, high, device=device) + 7919 * unit.row) % 1_000_003).float()


def _measure(unit: Unit, part: Tensor, options: Mapping[str, Any], team: Team | None) -> Applied:
    """The properties of a direction [rows, columns], or of a direction of which this is a member's part."""
    d = part / directions.lr_scale(options["lr_scale"], *unit.shape)
    tall = d if unit.rows >= unit.columns else d.mT
    gram = tall.mT @ tall
    rows = d.square().sum(dim=1)
    if team is not None:
        gram = team.total(gram)
        rows = rows if unit.rows >= unit.columns else team.total(rows)
    values = torch.linalg.eigvalsh(gram.double()).clamp(min=0)
    norms = rows.sqrt()
    sums = torch.stack([norms.sum(), norms.square().sum(), (norms > 0).sum().to(norms.dtype)]).double()
    if team is not None and unit.rows >= unit.columns:
        sums = team.total(sums)
    total, squares, count = sums.tolist()
    mean = total / max(count, 1.0)
    spread = max(0.0, squares / count - mean**2) ** 0.5 / mean if mean > 0 else 0.0
    return Applied(unit, values[-1].sqrt().item(), values.sum().item() / min(unit.shape), spread)
