"""What each rank sends and receives in a training step.

The collectives are those that torch's DistributedDataParallel and DeepSpeed 0.19.8 call under the configuration that
`pretrain.engine.deepspeed` generates, and those of the sharded optimizer. tests/distributed/test_traffic.py counts
every collective of real steps and compares.

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
from optimizers.sharded import Layout, Plan
from optimizers.sharded.teams import Team, row_sharded_direction
from pretrain.config import Config
from pretrain.planning.stage_3 import gathered_elements, padded

Operation = Literal["all_reduce", "reduce", "reduce_scatter", "all_gather", "all_to_all"]
ITEM_BYTES = {"fp32": 4, "bf16": 2, "int64": 8}


@dataclass(frozen=True)
class Collective:
    """All calls of one kind in a step, seen from one rank."""

    purpose: str
    operation: Operation
    dtype: str
    elements: int
    """Payload: elements that are summed, or of the gathered whole; of an all-to-all, those that come from others."""
    ranks: int
    """Of the process group."""

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
    around = (ranks - 1) / ranks
    return {"all_reduce": 2 * around, "all_to_all": 1.0}.get(operation, around)


def small_bytes(parameters: int) -> int:
    """All-reduces of at most this many bytes are not planned: four for each parameter tensor, at least 64."""
    return max(64, 4 * parameters)


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
        layout: of ZeRO 1 to 3; None where every rank holds everything.
        plan: who works on which matrices; None without a layout or without matrices.
        ranks: of the run.
        bf16: whether the products are in bf16; under DeepSpeed the weights are then.
        rank: whose collectives; None is the rank that receives most.
        device: where the directions run, which decides how they are computed.
    """
    if ranks == 1:
        return []
    weights = [p for group in groups for p in group["params"]]
    found = [*_gradients(config, weights, layout, ranks, bf16), *_weights(config, model, layout, ranks, bf16)]
    if plan is not None:
        matrices = next(group for group in groups if group["kind"] == "matrix")
        small, wire = small_bytes(len(weights)), config.engine.wire_dtype
        each = (
            [
                Collective("exchange matrices", "all_to_all", wire, plan.received_elements[member], ranks),
                *_team_sums(plan, matrices, member, small, device),
            ]
            for member in (range(ranks) if rank is None else (rank,))
        )
        found += max(each, key=lambda own: sum(collective.received for collective in own))
    return [collective for collective in found if collective.elements]


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
        for dtype, elements in _sums_of(shape, members, options):
            if elements * ITEM_BYTES[dtype] > small:
                sums[dtype] += elements
        found += [Collective("sum in teams", "all_reduce", d, count * n, members) for d, n in sums.items()]
    return found


@functools.lru_cache(maxsize=1024)
def _sums_of(shape: tuple[int, int], members: int, options: tuple[tuple[str, Any], ...]) -> list[tuple[str, int]]:
    """(dtype, elements) of each sum in the direction of one matrix, from a run on the meta device."""
    m, n = shape
    given, team, share = dict(options), _CountedTeam(members), -(-max(m, n) // members)
    part = torch.empty(1, *((share, n) if m >= n else (m, share)), device="meta")
    row_state = torch.empty(1, share, device="meta") if directions.row_slot(given, m, n) else None
    row_sharded_direction(part, shape, given, team, row_state)
    return team.sums
