"""The holder of matrices that every process has whole: data parallelism without sharding, such as torch's DDP.

All processes have the same weights, gradients and state. They all move the momenta and update the weights, which is
elementwise; the direction of a matrix is found by its owner alone, which sends it to the others. Owners and rounds are
those of flat shards. Without this holder every process finds every direction.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import directions
from ..blocks import Block
from ..flops import direction_flops
from ..matrices import Here, Matrices, State, WholeMatrices, WholeTurn, placed_blocks
from .exchange import WIRE_DTYPES, WireDtype, schedule
from .layout import LayoutError, chunked_layout
from .owners import Plan, Unit, make_plan
from .rows import plan_facts, remembered


@dataclass(frozen=True)
class DividedTurn(WholeTurn):
    """A round: equally shaped matrices of all owners, each a piece of its own. Its places are those of this rank's."""

    owners: list[int]
    """The rank that finds the direction of each piece, in ascending order."""

    def of(self, rank: int) -> list[Block]:
        """The blocks of an owner."""
        return [block for block, owner in zip(self.pieces, self.owners, strict=True) if owner == rank]


class DividedMatrices(WholeMatrices):
    """The holder of an optimizer whose parameters are the same on all processes of a group.

    `Aurora(model)` makes one if the model is a DistributedDataParallel. Where it was made of the model inside, bind one
    before the first step: `optimizer.bind(DividedMatrices())`. Every process then has to call `step` equally often, and
    with gradients of the same parameters.

    Args:
        process_group: whose processes share the work; None is the default one.
        wire_dtype: in which directions travel. "fp32" steps as one process would; "bf16" moves half as much.
        model: inside its `join` every process finds all directions, since the others may have run out of data.

    Attributes:
        received_bytes: of all directions and rows so far that came from other processes.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup | None = None,
        wire_dtype: WireDtype = "fp32",
        model: DistributedDataParallel | None = None,
    ) -> None:
        self.group, self.dtype = process_group, WIRE_DTYPES[wire_dtype]
        self.rank, self.world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
        self.received_bytes = 0
        self._model = None if model is None else weakref.ref(model)
        self._plans: dict[Any, Plan] = {}

    @property
    def _is_joined(self) -> bool:
        """Whether processes that run out of data may stop calling `step`."""
        model = None if self._model is None else self._model()
        return model is not None and model._join_config.enable

    def shares(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Sequence[tuple[Matrices, list[Tensor]]]:
        """All of them; each process finds every direction of those that lie on several devices, and inside `join`."""
        alone = self._is_joined or len({p.device for p in params}) > 1
        return [(WholeMatrices() if alone else self, list(params))] if params else []

    def agree(self, finite: Tensor) -> Tensor:
        """Whether the flag is true on all processes."""
        if self._is_joined:
            return finite
        flag = finite.to(torch.int32)
        dist.all_reduce(flag, dist.ReduceOp.MIN, group=self.group)
        return flag.bool()

    def total(self, counts: Tensor) -> Tensor:
        """The sum over all processes."""
        dist.all_reduce(counts, group=self.group)
        return counts

    def turns(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> list[WholeTurn]:
        """The rounds of the plan for these parameters."""
        places = placed_blocks(params, group)
        if not places:
            return []
        known = list(places)
        owners = [team[0] for team in self.plan(known, group).teams]
        found: list[WholeTurn] = []
        for units in schedule(self.plan(known, group)):
            units.sort(key=owners.__getitem__)
            own = [places[known[unit]] for unit in units if owners[unit] == self.rank]
            found.append(DividedTurn([known[unit] for unit in units], own, [owners[unit] for unit in units]))
        return found

    def plan(self, blocks: Sequence[Block], group: Mapping[str, Any]) -> Plan:
        """The owner of each block. Making a plan is a collective call of all processes; it is remembered.

        Raises:
            LayoutError: the processes do not have the same matrices, options or weights.
        """
        key = tuple((id(block.param), block.start, block.index) for block in blocks), plan_facts(group)
        return remembered(self._plans, key, lambda: self._make_plan(blocks, group))

    def _make_plan(self, blocks: Sequence[Block], group: Mapping[str, Any]) -> Plan:
        shapes = {str(index): block.shape for index, block in enumerate(blocks)}
        plan = divided_plan(shapes, group, self.world_size, blocks[0].param.device)
        weights = [float(block.of(block.param).double().sum()) for block in blocks]
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, (plan.digest() + repr(plan_facts(group)), repr(weights)), group=self.group)
        if len({facts for facts, _ in everyone}) > 1:
            raise LayoutError("the processes do not step the same matrices with the same options")
        if len({sums for _, sums in everyone}) > 1:
            raise LayoutError(
                "the processes have different weights, so that a direction found by one is none of the others': start "
                "from the same weights, as DistributedDataParallel does, or bind WholeMatrices()"
            )
        return plan

    def gather(self, turn: Any, values: Iterable[Tensor]) -> Here:
        """Stacks this rank's own. The momenta of the others move as well."""

        def stack() -> Tensor:
            device = turn.pieces[0].param.device
            u = torch.empty(len(turn.places), *turn.shape, dtype=torch.float32, device=device)
            own = iter(u)
            for block, owner, value in zip(turn.pieces, turn.owners, values, strict=True):
                if owner == self.rank:
                    next(own).copy_(block.matrix(value))
            return u

        return Here(stack)

    def scatter(self, turn: Any, stack: Tensor) -> Here:
        """Sends this rank's steps to the others and receives theirs, an owner at a time."""
        return Here(lambda: self._received(turn, stack))

    def _received(self, turn: DividedTurn, stack: Tensor) -> Iterator[Tensor]:
        """The steps of all pieces. Those of the next owner travel while one's are used."""
        owners = sorted(set(turn.owners))
        coming = [self._broadcast(turn, stack, owner) for owner in owners[:1]]
        for index, owner in enumerate(owners):
            values, work = coming.pop()
            coming = [self._broadcast(turn, stack, following) for following in owners[index + 1 : index + 2]]
            work.wait()
            for block, matrix in zip(turn.of(owner), values, strict=True):
                yield block.piece(matrix.float())

    def _broadcast(self, turn: DividedTurn, stack: Tensor, owner: int) -> tuple[Tensor, dist.Work]:
        if owner == self.rank:
            values = stack.to(self.dtype).contiguous()
        else:
            values = torch.empty(len(turn.of(owner)), *turn.shape, dtype=self.dtype, device=stack.device)
        return values, self._start(values, owner)

    def _start(self, values: Tensor, owner: int) -> dist.Work:
        """Start to bring an owner's values to all others."""
        if owner != self.rank:
            self.received_bytes += values.numel() * values.element_size()
        work = dist.broadcast(values, group=self.group, group_src=owner, async_op=True)
        assert work is not None, "this rank belongs to the group"
        return work

    def row_states(self, turn: Any, slot: str, group: Mapping[str, Any], state: State) -> list[Tensor]:
        """The rows of each of this rank's blocks."""
        return [block.rows_of(state[block.param][slot]) for block in turn.of(self.rank)]

    def store_rows(self, turns: Sequence[Any], group: Mapping[str, Any], state: State) -> None:
        """Each owner has moved those of its own blocks: the others take them over."""
        kept = [(turn, slot) for turn in turns if (slot := directions.row_slot(group, *turn.shape))]
        for owner in range(self.world_size):
            rows = [block.rows_of(state[block.param][slot]) for turn, slot in kept for block in turn.of(owner)]
            if rows:
                values = torch.cat([row.reshape(-1) for row in rows])
                self._start(values, owner).wait()
                for row, new in zip(rows, values.split([row.numel() for row in rows]), strict=True):
                    row.copy_(new.view_as(row))

    def weight_norms(self, turns: Sequence[Any]) -> list[Tensor]:
        """Of this rank's own."""
        own = (WholeTurn(turn.of(self.rank), turn.places) for turn in turns)
        return [WholeMatrices.weight_norms(self, [turn])[0] if turn.pieces else torch.empty(0) for turn in own]


def divided_plan(
    shapes: Mapping[str, tuple[int, int]],
    group: Mapping[str, Any],
    ranks: int,
    device: torch.device | str = "cpu",
) -> Plan:
    """The owners of matrices that all ranks have whole.

    Args:
        shapes: rows and columns of each matrix, by a name.
        group: the options of their directions.
        ranks: that share the work.
        device: where the directions run, for their cost.
    """
    units = [Unit(name, 0, m, n, direction_flops(m, n, group, device=device)) for name, (m, n) in shapes.items()]
    # Every rank is as near to each matrix: equal parts of all of them give nobody a reason to own one.
    return make_plan(chunked_layout([shapes], ranks), units)


def divided(model: nn.Module) -> DividedMatrices | None:
    """The holder for a DistributedDataParallel over several processes; None for any other model."""
    if not isinstance(model, DistributedDataParallel) or dist.get_world_size(model.process_group) == 1:
        return None
    return DividedMatrices(model.process_group, model=model)
