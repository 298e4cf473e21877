"""The step of a matrix group whose parameters are cut between ranks.

Elementwise parts act on the flat shard; directions need whole matrices. For each round of the plan: blend the momentum
of this rank's runs, bring them to the owners, find the directions there, bring the steps back, update the runs. The
next round travels while the present one is computed. Beside the shard a step needs two rounds' buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from optimizers import directions
from optimizers.rows import HERE
from optimizers.sharded.exchange import Exchange, Part, Round, Run, WireDtype, make_rounds
from optimizers.sharded.layout import LayoutError
from optimizers.sharded.plan import Plan, Rectangle, Unit
from optimizers.sharded.row_sharded import Team, row_sharded_direction
from optimizers.speedrun import enlarged
from optimizers.update import blend, commit_, updated

# Larger than any backend's stated error, smaller than any fault's.
TOLERANCE, UNEVEN = 0.1, 0.25


@dataclass(frozen=True)
class Applied:
    """What a step did to one matrix: properties of (w before - w after) / (lr scale), decay taken out."""

    unit: Unit
    largest: float
    """Largest singular value: 1 for an orthogonal direction, 0 for none."""
    filled: float
    """Squared Frobenius norm over the short side: 1 where every singular value is 1, less for low rank."""
    spread: float
    """Deviation of the norms of the rows that are not zero over their mean."""


def doubts(measured: Iterable[Applied], options: Mapping[str, Any]) -> list[str]:
    """What a step of these options cannot have done: one message for each matrix. No step at all is no doubt.

    A direction with singular values of 1 may have some of 0, where the momentum has low rank: the largest tells. Even
    rows are promised where the rank is full.
    """
    plain = not options["contra"] and not options["uw_floor"]
    orthogonal = plain and options["direction"] in ("muon", "aurora", "riemannian_aurora")
    even = plain and options["direction"] in ("aurora", "riemannian_aurora", "u_normuon")
    even = even and options.get("iterations", 2) > 1 and not options.get("running_norms", False)
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


class ShardedMatrices:
    """One process's side of the matrix group of an optimizer.

    Args:
        plan: owners, with the layout.
        rank: this process's.
        group: the process group over which the layout is cut; None is the default one.
        wire_dtype: in which momenta and steps travel.
        device: where the shards live.
        connect: whether to check the plan with the other ranks; without, nothing can be stepped (a dry run).

    Attributes:
        exchange: counts the bytes received.
        direction_observer: as `Aurora.direction_observer`, called with a unit and the rectangle of it that this rank
            works on in place of a block.

    Raises:
        LayoutError: the ranks disagree about layout or plan, or are not as many as it says.
    """

    direction_observer: Callable[[Unit, Rectangle, Tensor], None] | None = None

    def __init__(
        self,
        plan: Plan,
        rank: int,
        group: dist.ProcessGroup | None,
        wire_dtype: WireDtype,
        device: torch.device,
        *,
        connect: bool = True,
    ) -> None:
        self.plan, self.rank, self.group, self.device = plan, rank, group, device
        self.world_size = plan.layout.world_size
        if connect:
            self._check_agreement()
        self.exchange = Exchange(plan, rank, group, wire_dtype, device)
        self.rounds = make_rounds(plan, rank)
        self.teams = self._make_teams() if connect else {}
        names = {unit.name for unit in plan.units}
        shards = {f.shard for own in plan.layout.fragments for f in own if f.name in names}
        if len(shards) > 1:
            raise LayoutError(f"the matrices are in the groups {sorted(shards)}: expected one group of all matrices")
        (self.shard,) = shards or {0}
        if connect:
            self._check_assembly()

    def _check_agreement(self) -> None:
        if self.world_size == 1:
            return
        present = dist.get_world_size(self.group)
        if present != self.world_size:
            raise LayoutError(f"the layout is of {self.world_size} ranks, the process group has {present}")
        digests: list[Any] = [None] * self.world_size
        dist.all_gather_object(digests, self.plan.digest(), group=self.group)
        if len(set(digests)) > 1:
            raise LayoutError("the ranks made different plans: they do not train one model with one config")

    def _check_assembly(self) -> None:
        """Sends every element its own number: each part has to arrive whole, in order, at one rank."""
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
            raise LayoutError(f"{len(names)} matrices do not arrive whole at their owner: {', '.join(names[:5])}")

    def _make_teams(self) -> dict[tuple[int, ...], Team]:
        """A process group for every team of several; making one is a collective of all ranks."""
        teams = {}
        for ranks in dict.fromkeys(team for team in self.plan.teams if len(team) > 1):
            everyone = ranks if self.group is None else [dist.get_global_rank(self.group, rank) for rank in ranks]
            teams[ranks] = Team(dist.new_group(list(everyone)), len(ranks))
        return teams

    def agree(self, finite: Tensor) -> Tensor:
        """Whether the flag is up on every rank."""
        if self.world_size == 1:
            return finite
        flag = finite.to(self.device, torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.group)
        return flag.bool()

    def state_shapes(self, options: Mapping[str, Any]) -> dict[str, torch.Size]:
        """The state of the shard: `momentum` of its size; `second_moment` of the rows of this rank's parts."""
        shapes = {"momentum": torch.Size([self.plan.layout.shard_sizes[self.shard]]), "step": torch.Size()}
        rows = sum(stop - start for _, start, stop in self.owned_rows(options))
        if self.keeps_second_moment(options):
            shapes["second_moment"] = torch.Size([rows])
        return shapes

    def keeps_second_moment(self, options: Mapping[str, Any]) -> bool:
        """Whether any matrix of the group has one."""
        return any(directions.keeps_second_moment(options, *unit.shape) for unit in self.plan.units)

    def owned_rows(self, options: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
        """(parameter, row, row stop) of what `second_moment` holds, in its order.

        A parameter of which one block keeps a second moment has one of all its rows, as in the dense optimizer.
        """
        units = self.plan.units
        names = {unit.name for unit in units if directions.keeps_second_moment(options, *unit.shape)}
        for turn in self.rounds:
            for part in turn.parts:
                unit = units[part.unit]
                # Of a wide matrix that is shared out by columns every member has all rows: the first keeps them.
                first = self.rank == self.plan.teams[part.unit][0] or unit.rows >= unit.columns
                if unit.name in names and first:
                    yield unit.name, unit.row + part.area.row, unit.row + part.area.row_stop

    def step(self, flat: Tensor, state: dict[str, Tensor], options: Mapping[str, Any], finite: Tensor) -> Tensor:
        """Steps the shard `flat`, whose gradient is in `flat.grad`.

        Args:
            flat: this rank's shard of the matrix group, fp32.
            state: its state, by `state_shapes`.
            options: of the group, complete.
            finite: the flag, agreed on by all ranks; False leaves everything as it is.

        Returns:
            Fallbacks and retries of all ranks' directions, int64 [2].
        """
        assert flat.grad is not None, "callers choose shards that have a gradient"
        norms = self._weight_norms(flat) if options["uw_floor"] else None
        moments = self._second_moments(state, options)
        counts = torch.zeros(2, dtype=torch.int64, device=self.device)
        pending = None

        def blended(turn: Round) -> list[Tensor]:
            return [_blend(run, flat.grad, state["momentum"], options, finite) for run in turn.runs]  # type: ignore[arg-type]

        gathering = self.exchange.gather(self.rounds[0], blended(self.rounds[0])) if self.rounds else None
        for index, turn in enumerate(self.rounds):
            assert gathering is not None
            u = gathering.wait()
            following = self.rounds[index + 1 : index + 2]
            gathering = self.exchange.gather(following[0], blended(following[0])) if following else None
            found, steps = self._steps(turn, u, moments, options, norms, finite)
            counts += found
            returning = self.exchange.scatter(turn, steps)
            if pending is not None:
                _apply(pending.turn.runs, pending.wait(), flat, options, finite)
            pending = returning
        if pending is not None:
            _apply(pending.turn.runs, pending.wait(), flat, options, finite)
        if self.world_size > 1:
            dist.all_reduce(counts, group=self.group)
        return counts

    def _second_moments(self, state: dict[str, Tensor], options: Mapping[str, Any]) -> dict[int, Tensor]:
        """Views of `second_moment`, by unit."""
        views: dict[int, Tensor] = {}
        if "second_moment" not in state:
            return views
        at, owned = 0, list(self.owned_rows(options))
        parts = {(self.plan.units[p.unit].name, self.plan.units[p.unit].row + p.area.row): p for p in self._parts()}
        for name, start, stop in owned:
            views[parts[name, start].unit] = state["second_moment"][at : at + stop - start]
            at += stop - start
        return views

    def _parts(self) -> Iterator[Part]:
        for turn in self.rounds:
            yield from turn.parts

    def _steps(
        self,
        turn: Round,
        u: Tensor,
        moments: Mapping[int, Tensor],
        options: Mapping[str, Any],
        norms: Tensor | None,
        finite: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Fallbacks and retries, and the steps before the learning rate, of this rank's parts of a round."""
        if not turn.parts:
            return torch.zeros(2, dtype=torch.int64, device=self.device), u
        units = [part.unit for part in turn.parts]
        shape = self.plan.units[units[0]].shape
        team = self.teams.get(self.plan.teams[units[0]])
        second = None
        if directions.keeps_second_moment(options, *shape):
            second = torch.stack([moments[index] for index in units])
        if team is None:
            found = directions.from_options(u, options, second)
        else:
            found = row_sharded_direction(u, shape, options, team, second)
        if self.direction_observer is not None:
            for part, d in zip(turn.parts, found.d, strict=True):
                self.direction_observer(self.plan.units[part.unit], part.area, d)
        if found.second_moment is not None:
            for index, values in zip(units, found.second_moment, strict=True):
                commit_(moments[index], values, finite)
        counted = torch.stack([found.fallbacks.sum(), found.retries.sum()])
        # What a team counts each of its members has seen.
        counted = counted if team is None or self.rank == self.plan.teams[units[0]][0] else torch.zeros_like(counted)
        steps = directions.scaled(found.d, directions.lr_scale(options["lr_scale"], *shape), polar=options["polar"])
        if norms is not None:
            steps = enlarged(steps, options["uw_floor"] * norms[units][:, None, None], team or HERE)
        return counted, steps

    def _weight_norms(self, flat: Tensor) -> Tensor:
        """The Frobenius norm of every unit's weight."""
        squares = torch.zeros(len(self.plan.units), dtype=torch.float32, device=self.device)
        for turn in self.rounds:
            for run in turn.runs:
                squares[run.unit] += run.of(flat).float().square().sum()
        if self.world_size > 1:
            dist.all_reduce(squares, group=self.group)
        return squares.sqrt()

    def applied(self, before: Tensor, after: Tensor, options: Mapping[str, Any]) -> list[Applied]:
        """What a step did to the matrices that this rank is the first to work on, from the weights themselves.

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
    """A number for each element, exact in fp32, that no other element near it in any direction has."""
    return ((torch.arange(low, high, device=device) + 7919 * unit.row) % 1_000_003).float()


def _blend(run: Run, grad: Tensor, momentum: Tensor, options: Mapping[str, Any], finite: Tensor) -> Tensor:
    """Moves the momentum of a run; returns the input of the direction, zeros where the step is void."""
    moved, blended = blend(run.of(grad), run.of(momentum), options["momentum"], options["nesterov"])
    commit_(run.of(momentum), moved, finite)
    return torch.where(finite, blended, 0.0)


def _apply(
    runs: Sequence[Run], steps: Sequence[Tensor], flat: Tensor, options: Mapping[str, Any], finite: Tensor
) -> None:
    """Updates the runs by their steps."""
    decay = {key: options[key] for key in ("lr", "weight_decay", "cautious")}
    for run, step in zip(runs, steps, strict=True):
        weight = run.of(flat)
        commit_(weight, updated(weight, step, **decay), finite)


def _measure(unit: Unit, part: Tensor, options: Mapping[str, Any], team: Team | None) -> Applied:
    """The properties of a direction [rows, columns], or of a member's part of one."""
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
