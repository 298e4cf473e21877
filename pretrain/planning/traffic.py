"""What each rank sends and receives in a training step.

The collectives are those that torch's DistributedDataParallel and fully_shard call, DeepSpeed 0.19.8 under the
configuration that `pretrain.engine.deepspeed` generates, and those of the sharded optimizer.
tests/distributed/test_traffic.py counts every collective of real steps and compares.

Counted: the reduction of gradients, the gathering of weights, the exchange of matrices, and the sums inside a team
that shares one. Not counted: all-reduces of at most `small_bytes` each (flags, norms, the loss, DDP's table of unused
parameters), a few dozen a step, and what does not belong to every step: checks at the start, telemetry, validation,
checkpoints, retries of a factorisation.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from optimizers import directions
from optimizers.flops import read_options
from optimizers.matrices import placed_blocks
from optimizers.polar.precision import counted_as
from optimizers.sharded import Layout, Plan, chunked_rows
from optimizers.sharded.rows import row_visits
from optimizers.sharded.teams import Team, row_sharded_direction
from pretrain.config import Config
from pretrain.planning.stage_3 import gathered_elements, padded

Operation = Literal["all_reduce", "reduce", "reduce_scatter", "all_gather", "all_to_all", "broadcast"]
ITEM_BYTES = {"fp32": 4, "bf16": 2, "int64": 8}


@dataclass(frozen=True)
class Collective:
    """All calls of one kind in a step, seen from one rank."""

    purpose: str
    operation: Operation
    dtype: str
    elements: int
    """Payload: elements that are summed or broadcast, or of the gathered whole; of an all-to-all, those that come from
    others."""
    ranks: int
    """Of the process group."""
    are_neighbours: bool = False
    """Whether the ranks follow one another, so that they can be those of one node."""

    @property
    def payload(self) -> int:
        """Bytes of the payload."""
        return self.elements * ITEM_BYTES[self.dtype]

    @property
    def received(self) -> float:
        """Bytes that arrive at the rank over the wire; see `wire_share`."""
        return self.payload * wire_share(self.operation, self.ranks)


def wire_share(operation: Operation, ranks: int) -> float:
    """Bytes that a rank receives over bytes of the payload, with the ring algorithms of NCCL and gloo.

    A ring passes each of `ranks` chunks on `ranks - 1` times to sum it, and as often to spread it: an all-reduce does
    both, a reduce-scatter and an all-gather one of them. A reduction to one rank is a chain of `ranks - 1` links; over
    many reductions with different destinations that is the same average as for a reduce-scatter.
    """
    around = (ranks - 1) / ranks  # on average, where each is the source or destination of as many elements
    return {"all_reduce": 2 * around, "all_to_all": 1.0}.get(operation, around)


def small_bytes(parameters: int) -> int:
    """All-reduces of at most this many bytes are not planned: four for each parameter tensor and eight, at least 64."""
    return max(64, 4 * parameters + 8)


def collectives(
    config: Config,
    model: nn.Module,
    groups: Sequence[Mapping[str, Any]],
    layout: Layout | None,
    plan: Plan | None,
    ranks: int,
    bf16: bool,
    *,
    rank: int | None = None,
    device: str = "cpu",
) -> list[Collective]:
    """The collectives of a training step.

    Args:
        config: the run's.
        model: with whole parameters, on any device.
        groups: of the optimizer, with whole `params`.
        layout: of ZeRO 1 to 3 or FSDP2; None where every rank holds everything.
        plan: who works on which matrices; None without a layout or without matrices.
        ranks: of the run.
        bf16: whether the products are in bf16; under DeepSpeed and FSDP2 the weights are then.
        rank: whose collectives, of those over which the layout is cut; None is the rank that receives most.
        device: where the directions run, which decides how they are computed.
    """
    if ranks == 1:
        return []
    weights = [p for group in groups for p in group["params"]]
    if config.engine.kind == "fsdp2":
        assert layout is not None, "fully_shard always shards"
        found = _fsdp2(config, model, layout, ranks, bf16)
    else:
        found = [*_gradients(config, weights, layout, ranks, bf16), *_weights(config, model, layout, ranks, bf16)]
    if config.engine.divides_matrices(ranks):
        found += _directions(groups, ranks)
    if plan is not None:
        matrices = next(group for group in groups if group["kind"] == "matrix")
        small, wire = small_bytes(len(weights)), config.engine.wire_dtype
        shards, near = plan.layout.world_size, config.engine.kind == "fsdp2"
        rows = _visiting_rows(plan, matrices) if near else [0] * shards
        each = (
            [
                Collective("exchange matrices", "all_to_all", wire, received, shards, near),
                Collective("exchange rows", "all_to_all", "fp32", visiting, shards, near),
                *_team_sums(plan, matrices, member, small, device),
            ]
            for member, (received, visiting) in enumerate(zip(plan.received_elements, rows, strict=True))
            if rank in (None, member)
        )
        found += max(each, key=lambda own: sum(collective.received for collective in own))
    return [collective for collective in found if collective.elements and collective.ranks > 1]


def _directions(groups: Sequence[Mapping[str, Any]], ranks: int) -> list[Collective]:
    """What the owners of matrices send to all others that have them whole: steps, and the state of single rows."""
    matrices = [
        (block, group)
        for group in groups
        if group["kind"] == "matrix"
        for block in placed_blocks(group["params"], group)
    ]
    steps = sum(rows * columns for rows, columns in (block.shape for block, _ in matrices))
    rows = sum(block.shape[0] for block, group in matrices if directions.row_slot(group, *block.shape))
    return [Collective("send directions", "broadcast", "fp32", steps + rows, ranks)]


def _fsdp2(config: Config, model: nn.Module, layout: Layout, ranks: int, bf16: bool) -> list[Collective]:
    """What fully_shard calls. Each rank's rows are filled up to those of the first."""
    engine, rounds, shards = config.engine, config.accumulation(ranks), layout.world_size
    own = dict(zip(layout.shapes, layout.shard_sizes, strict=True))
    blocks = sum(own[name] for name in block_parameters(model))
    rest = sum(own.values()) - blocks
    gathered = rounds * shards * ((2 if engine.reshard_after_forward else 1) * blocks + 2 * rest)
    dtype, purpose = engine.communication_dtype, "reduce gradients"
    return [
        Collective("gather weights", "all_gather", "bf16" if bf16 else "fp32", gathered, shards, True),
        Collective(purpose, "reduce_scatter", dtype, shards * (blocks + rest), shards, True),
        Collective(purpose, "all_reduce", dtype, blocks + rest, ranks // shards),
    ]


def block_parameters(model: nn.Module) -> list[str]:
    """The names of the parameters of the blocks, each of which is sharded and gathered by itself under FSDP2."""
    blocks = next(path for path, part in model.named_modules() if isinstance(part, nn.ModuleList))
    return [name for name, _ in model.named_parameters() if name.startswith(f"{blocks}.")]


def _visiting_rows(plan: Plan, group: Mapping[str, Any]) -> list[int]:
    """Values that belong to single rows, fp32, that each rank receives in a step of matrices sharded by rows."""
    keep = [index for index, unit in enumerate(plan.units) if directions.row_slot(group, *unit.shape)]
    shapes = {name: plan.layout.shapes[name][0] for name in dict.fromkeys(unit.name for unit in plan.units)}
    rows = {name: chunked_rows(count, plan.layout.world_size) for name, count in shapes.items()}
    return row_visits(plan, keep, rows)[0].received_elements


def _gradients(
    config: Config, weights: Sequence[Tensor], layout: Layout | None, ranks: int, bf16: bool
) -> list[Collective]:
    engine, rounds = config.engine, config.accumulation(ranks)
    purpose, elements = "reduce gradients", sum(p.numel() for p in weights)
    if engine.kind == "plain":
        low = sum(p.numel() for p in weights if p.dtype == torch.bfloat16)
        split = {"fp32": elements - low, "bf16": low}
        return [Collective(purpose, "all_reduce", dtype, part, ranks) for dtype, part in split.items()]
    dtype, stage = engine.communication_dtype, engine.zero_stage
    if stage == 3:
        filled = sum(padded(p.shape, ranks) for p in weights)
        return [Collective(purpose, "reduce_scatter", dtype, rounds * filled, ranks)]
    if layout is not None and sums_everywhere(config, bf16):
        return [Collective(purpose, "all_reduce", dtype, sum(layout.shard_sizes) * ranks, ranks)]
    if stage == 0:
        return [Collective(purpose, "all_reduce", dtype, elements, ranks)]
    # Stage 1 reduces once a step, stage 2 in every micro-batch.
    return [Collective(purpose, "reduce", dtype, elements * (rounds if stage == 2 else 1), ranks)]


def sums_everywhere(config: Config, bf16: bool) -> bool:
    """Whether DeepSpeed puts its BF16_Optimizer around ours: every rank then holds all gradients, summed in fp32."""
    return bf16 and config.engine.zero_stage == 1 and config.engine.accumulation_dtype == "fp32"


def _weights(config: Config, model: nn.Module, layout: Layout | None, ranks: int, bf16: bool) -> list[Collective]:
    if layout is None:
        return []
    elements = sum(layout.shard_sizes) * ranks
    if config.engine.zero_stage == 3:
        elements = config.accumulation(ranks) * gathered_elements(config, model, ranks)
    return [Collective("gather weights", "all_gather", "bf16" if bf16 else "fp32", elements, ranks)]


class _CountedTeam(Team):
    """A team that notes what its members would sum, and sums nothing."""

    def __init__(self, size: int) -> None:
        super().__init__(None, size)
        self.sums: list[tuple[str, int]] = []

    def total(self, x: Tensor) -> Tensor:
        """Note a sum."""
        self.sums.append(("fp32" if x.is_floating_point() else "int64", x.numel()))
        return x

    def largest(self, x: Tensor) -> Tensor:
        """Note a maximum."""
        self.sums.append(("fp32", x.numel()))
        return x


def _team_sums(plan: Plan, group: Mapping[str, Any], rank: int, small: int, device: str) -> list[Collective]:
    """What a rank sums with its partners in the teams that it belongs to."""
    found = []
    shared = [index for index in plan.owned(rank) if len(plan.teams[index]) > 1]
    alike = Counter((plan.units[index].shape, len(plan.teams[index])) for index in shared)
    options = tuple(sorted(read_options(group, device).items()))
    for (shape, members), count in alike.items():
        sums: Counter[str] = Counter()
        for dtype, elements in _sums_of(shape, members, options, torch.device(device).type):
            if elements * ITEM_BYTES[dtype] > small:
                sums[dtype] += elements
        found += [Collective("sum in teams", "all_reduce", d, count * n, members) for d, n in sums.items()]
    return found


@functools.lru_cache(maxsize=1024)
def _sums_of(
    shape: tuple[int, int], members: int, options: tuple[tuple[str, Any], ...], device: str
) -> list[tuple[str, int]]:
    """(dtype, elements) of each sum in the direction of one matrix on a device, from a run on the meta device."""
    m, n = shape
    given, team, share = dict(options), _CountedTeam(members), -(-max(m, n) // members)
    part = torch.empty(1, *((share, n) if m >= n else (m, share)), device="meta")
    row_state = torch.empty(1, share, device="meta") if directions.row_slot(given, m, n) else None
    with counted_as(device):
        row_sharded_direction(part, shape, given, team, row_state)
    return team.sums
