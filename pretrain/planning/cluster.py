"""The plan of a run on a cluster, for `aurora plan`: memory, traffic and time before anything is submitted.

Everything follows from the config, the model on the meta device and the layout that ZeRO will make. No process is
started and no weight is stored, so a laptop can plan a thousand ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from optimizers import has_fast_bf16
from optimizers.flops import step_flops
from optimizers.matrices import placed_blocks
from optimizers.options import complete
from optimizers.sharded import Layout, LayoutError, Plan, chunked_rows, plan_group, row_layout, zero_layout
from optimizers.sharded.divided import divided_plan
from optimizers.sharded.owners import rectangles
from pretrain.config import Config, ConfigError
from pretrain.engine.precision import resolve_precision
from pretrain.model.build import build_model
from pretrain.model.cost import flops_per_token
from pretrain.planning.devices import Device
from pretrain.planning.memory import FP32, Memory, memory
from pretrain.planning.summary import block_shapes
from pretrain.planning.traffic import Collective, collectives


@dataclass(frozen=True)
class Cluster:
    """What a run would have."""

    ranks: int
    """Devices, one process each."""
    device: Device
    per_node: int = 8
    """Devices of a node."""
    mfu: float = 0.4
    """Assumed share of the device's peak that the computing of a step reaches, communication apart."""
    within: float | None = None
    """Bytes per second that a device receives from its node; None takes the device's."""
    between: float | None = None
    """Bytes per second that a device receives from other nodes; None takes the device's."""

    @property
    def nodes(self) -> int:
        """How many nodes the ranks fill."""
        return -(-self.ranks // self.per_node)

    @property
    def links(self) -> tuple[float | None, float | None]:
        """Link speeds within a node and between nodes, in bytes per second; None where not known."""
        return self.within or self.device.within, self.between or self.device.between

    def seconds(self, collective: Collective) -> float | None:
        """Time of a collective at the full speed of the links, without latency; None if a speed is not known.

        Collectives of all ranks run as rings through every adapter of a node, so across nodes they are as fast as the
        slower of a device's link and all adapters together. What single ranks send each other counts as sent between
        nodes as soon as there are several.
        """
        within, between = self.links
        if self.nodes == 1 or (collective.are_neighbours and self.per_node % collective.ranks == 0):
            return None if within is None else collective.received / within
        if between is None:
            return None
        if collective.operation == "all_to_all" or collective.ranks < self.ranks:
            return collective.received / between
        return None if within is None else collective.received / min(within, self.per_node * between)


@dataclass(frozen=True)
class RunPlan:
    """What a run amounts to."""

    config: Config
    model: nn.Module
    cluster: Cluster
    matrices: Plan | None
    """Owners of matrices that are cut between ranks; None where every rank has them whole."""
    divided: Plan | None
    """Owners of matrices that every rank has whole; None where all of them compute all directions, or they are cut."""
    by_polar: float | None
    """The imbalance if rows were balanced by polar calls."""
    memory: Memory
    """Of the rank that needs most."""
    model_flops: float
    """Of a forward and backward pass over the global batch, all ranks together."""
    optimizer_flops: int
    """Of a step's directions on the slowest rank."""
    collectives: list[Collective]
    """Of the rank that receives most."""
    checkpoint_bytes: int

    @property
    def compute_seconds(self) -> float | None:
        """A step's computing on the slowest rank, at the assumed share of the peak; None without a known peak."""
        cluster = self.cluster
        if cluster.device.peak is None:
            return None
        return (self.model_flops / cluster.ranks + self.optimizer_flops) / (cluster.mfu * cluster.device.peak)

    @cached_property
    def network_seconds(self) -> float | None:
        """A step's collectives, one after another; None if a link speed is not known."""
        found = [self.cluster.seconds(collective) for collective in self.collectives]
        return None if None in found else sum(seconds for seconds in found if seconds is not None)

    @property
    def step_seconds(self) -> float | None:
        """Computing and network one after the other: no overlap is assumed."""
        if self.compute_seconds is None or self.network_seconds is None:
            return None
        return self.compute_seconds + self.network_seconds

    @property
    def gpu_hours(self) -> float | None:
        """Of the whole run."""
        seconds = self.step_seconds
        return None if seconds is None else seconds * self.config.total_steps * self.cluster.ranks / 3600

    @property
    def received_bytes(self) -> float:
        """Over the wire, in a step."""
        return sum(collective.received for collective in self.collectives)


def plan_run(config: Config, cluster: Cluster) -> RunPlan:
    """The plan of a run.

    Raises:
        ConfigError: the global batch does not divide over the ranks, or the stage does not support the precision.
        LayoutError: a matrix would not be worked on exactly once.
    """
    ranks, device = cluster.ranks, cluster.device.kind
    config.accumulation(ranks)
    model = build_model(config.model, config.run.seed, device="meta")
    groups = config.optimizer.param_groups(model)
    # Every GPU in the table is fast at bf16; a CPU is taken to be like this one.
    fast_bf16 = device == "cuda" or has_fast_bf16("cpu")
    bf16 = resolve_precision(config.train, config.engine, fast_bf16=fast_bf16).is_bf16
    if problems := config.engine.precision_problems("bf16" if bf16 else "fp32"):
        raise ConfigError([f"engine.{problem}" for problem in problems])
    layout = layout_of(config, groups, ranks)
    group = next((g for g in groups if g["kind"] == "matrix"), None)
    plan = plan_group(layout, completed(group), device=device) if layout and group else None
    by_polar = None
    if plan and layout and group and group["direction"] == "aurora":
        by_polar = plan_group(layout, {**completed(group), "row_balance": "polar"}, device=device).imbalance
    if plan is not None:
        check_cover(plan)
    divided = None
    if group and config.engine.divides_matrices(ranks):
        blocks = placed_blocks(group["params"], group)
        shapes = {f"{place.name}[{place.area.row}:{place.area.row_stop}]": b.shape for b, place in blocks.items()}
        divided = divided_plan(shapes, completed(group), ranks, device)
    owners = plan or divided
    whole = step_flops(block_shapes(group), group, device=device) if group and not owners else 0
    return RunPlan(
        config=config,
        model=model,
        cluster=cluster,
        matrices=plan,
        divided=divided,
        by_polar=by_polar,
        memory=memory(config, groups, layout, plan, bf16, ranks, device),
        model_flops=flops_per_token(config.model, config.sequence_length) * config.train.global_batch_tokens,
        optimizer_flops=max(owners.loads) if owners else whole,
        collectives=collectives(config, model, groups, layout, plan, ranks, bf16, device=device),
        checkpoint_bytes=_checkpoint_bytes(groups),
    )


def layout_of(config: Config, groups: Sequence[Mapping[str, Any]], ranks: int) -> Layout | None:
    """The layout that DeepSpeed or fully_shard will make; None where every rank holds everything."""
    shapes = [dict(zip(g["param_names"], (tuple(p.shape) for p in g["params"]), strict=True)) for g in groups]
    if config.engine.kind == "fsdp2":
        each = {name: shape for of_group in shapes for name, shape in of_group.items()}
        shards = config.engine.sharding_ranks(ranks)
        return row_layout(each, {name: chunked_rows(shape[0], shards) for name, shape in each.items()})
    if config.engine.kind != "deepspeed" or config.engine.zero_stage == 0:
        return None
    return zero_layout(shapes, ranks, config.engine.zero_stage)


def check_cover(plan: Plan) -> dict[str, int]:
    """Follow every element of every matrix from its shard to the rank that works on it.

    Returns:
        Name of each matrix -> elements that arrive.

    Raises:
        LayoutError: a part of a matrix does not arrive whole at its rank, or a matrix is not worked on exactly once.
    """
    fragments = plan.fragments
    covered: dict[str, int] = {}
    for unit, team in zip(plan.units, plan.teams, strict=True):
        runs = [unit.run(fragment) for _, fragment in fragments[unit.name]]
        for place, member in enumerate(team):
            part = unit.part(place, len(team))
            arriving = sum(
                piece.elements
                for low, high in runs
                if low < high
                for piece in rectangles(low, high, unit.columns, part)
            )
            if arriving != part.elements:
                raise LayoutError(
                    f"{unit.name}: {arriving:,} elements arrive at rank {member}, expected the {part.elements:,} that "
                    "it works on"
                )
            covered[unit.name] = covered.get(unit.name, 0) + arriving
    for name, elements in covered.items():
        rows, columns = plan.layout.shapes[name]
        if elements != rows * columns:
            raise LayoutError(f"{name}: {elements:,} elements are worked on, expected {rows * columns:,}")
    return covered


def completed(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group of `param_groups` with every option."""
    keys = ("params", "param_names", "kind", "role", "row_blocks")
    options = complete("matrix", {key: value for key, value in group.items() if key not in keys})
    return {**options, **{key: group[key] for key in keys if key in group}}


def _checkpoint_bytes(groups: Sequence[Mapping[str, Any]]) -> int:
    """fp32 weights and state; the index and the random generators are small."""
    return sum(p.numel() * FP32 * (2 if g["kind"] == "matrix" else 3) for g in groups for p in g["params"])
