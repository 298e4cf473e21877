"""`aurora plan`: what a run on a cluster amounts to, before anything is submitted.

Everything comes from the config, the model on the meta device and the layout that ZeRO will make: no process is started
and no memory needed, so a laptop plans 64 ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from optimizers import Aurora, has_fast_bf16
from optimizers.blocks import blocks, row_blocks
from optimizers.flops import step_flops
from optimizers.options import complete
from optimizers.sharded import Layout, Plan, ShardedMatrices, plan_group, zero_layout
from optimizers.sharded.exchange import WIRE_DTYPES
from pretrain.config import Config
from pretrain.model.build import build_model
from pretrain.model.cost import flops_per_token, parameter_count, peak_flops_of
from pretrain.planning.memory import FP32, Memory, memory
from pretrain.planning.summary import describe


@dataclass(frozen=True)
class Device:
    """A kind of device. `memory` is in bytes, `peak` the dense bf16 rate in FLOP/s; None where it is not known."""

    name: str
    memory: int | None
    peak: float | None

    @property
    def kind(self) -> str:
        """torch's name of it."""
        return "cpu" if self.name == "CPU" else "cuda"


def _device(name: str, gigabytes: int) -> Device:
    peak = peak_flops_of(name)
    assert peak is not None, name
    return Device(name, gigabytes * 10**9, peak)


DEVICES = {
    "a100-40gb": _device("A100", 40),
    "a100": _device("A100", 80),
    "h100": _device("H100", 80),
    "h200": _device("H200", 141),
    "b200": _device("B200", 180),
    "mi300x": _device("MI300X", 192),
    "cpu": Device("CPU", None, None),
}
"""By the name for the command line; peaks from `pretrain.model.cost`, memory from the vendors' data sheets."""


@dataclass(frozen=True)
class RunPlan:
    """What a run amounts to."""

    config: Config
    model: nn.Module
    ranks: int
    device: Device
    mfu: float
    matrices: Plan | None
    """Owners of the matrices; None where every rank computes all directions."""
    by_polar: float | None
    """The imbalance if rows were balanced by polar calls."""
    memory: Memory
    """Of the rank that needs most."""
    step_flops: float
    """Of the model, all ranks together."""
    optimizer_flops: int
    """Of the slowest rank's directions."""
    collectives: dict[str, int]
    """Bytes that a rank receives in a step, by what for."""
    checkpoint_bytes: int

    @property
    def step_seconds(self) -> float | None:
        """At the stated MFU, the slowest rank's directions at the same rate; None for a device of unknown peak."""
        if self.device.peak is None:
            return None
        return (self.step_flops / self.ranks + self.optimizer_flops) / (self.mfu * self.device.peak)

    @property
    def gpu_hours(self) -> float | None:
        """Of the whole run."""
        return None if self.step_seconds is None else self.step_seconds * self.config.total_steps * self.ranks / 3600


def plan_run(config: Config, ranks: int, device: Device, mfu: float) -> RunPlan:
    """The plan of a run on `ranks` GPUs.

    Raises:
        ValueError: the global batch does not divide over the ranks.
    """
    model = build_model(config.model, config.run.seed, device="meta")
    groups = config.optimizer.param_groups(model)
    # On a GPU "auto" is bf16, on a CPU what this one is fast at.
    auto = device.kind == "cuda" or has_fast_bf16("cpu")
    bf16 = config.train.precision == "bf16" or (config.train.precision == "auto" and auto)
    layout = layout_of(config, groups, ranks)
    group = next((g for g in groups if g["kind"] == "matrix"), None)
    plan = plan_group(layout, _completed(group), device=device.kind) if layout and group else None
    by_polar = None
    if plan and layout and group and group["direction"] == "aurora":
        by_polar = plan_group(layout, {**_completed(group), "row_balance": "polar"}, device=device.kind).imbalance
    worst = max(
        (memory(config, groups, layout, plan, rank, bf16) for rank in range(ranks if plan else 1)),
        key=lambda found: found.peak,
    )
    tokens = config.train.global_batch_tokens
    return RunPlan(
        config=config,
        model=model,
        ranks=ranks,
        device=device,
        mfu=mfu,
        matrices=plan,
        by_polar=by_polar,
        memory=worst,
        step_flops=flops_per_token(config.model, config.sequence_length) * tokens,
        optimizer_flops=max(plan.loads) if plan else _whole_flops(group, device.kind),
        collectives=collectives(config, groups, plan, ranks, bf16),
        checkpoint_bytes=_checkpoint_bytes(groups),
    )


def layout_of(config: Config, groups: Sequence[Mapping[str, Any]], ranks: int) -> Layout | None:
    """The layout that DeepSpeed will make; None where every rank holds everything."""
    if config.engine.kind != "deepspeed" or config.engine.zero_stage == 0:
        return None
    shapes = [dict(zip(g["param_names"], (tuple(p.shape) for p in g["params"]), strict=True)) for g in groups]
    return zero_layout(shapes, ranks, config.engine.zero_stage)


def _completed(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group of `param_groups` with every option."""
    keys = ("params", "param_names", "kind", "role", "row_blocks")
    options = complete("matrix", {key: value for key, value in group.items() if key not in keys})
    return {**options, **{key: group[key] for key in keys if key in group}}


def _whole_flops(group: Mapping[str, Any] | None, device: str) -> int:
    if group is None:
        return 0
    parts = zip(group["params"], row_blocks(group), strict=True)
    return step_flops([block.shape for p, split in parts for block in blocks(p, split)], group, device=device)


def _checkpoint_bytes(groups: Sequence[Mapping[str, Any]]) -> int:
    """fp32 weights and state; the index and the random generators are small."""
    return sum(p.numel() * FP32 * (2 if g["kind"] == "matrix" else 3) for g in groups for p in g["params"])


def collectives(
    config: Config, groups: Sequence[Mapping[str, Any]], plan: Plan | None, ranks: int, bf16: bool
) -> dict[str, int]:
    """Bytes that the busiest rank receives in a step.

    The exchange is counted exactly; reductions and gatherings as rings, (ranks - 1) / ranks of the elements each time.
    """
    engine, elements = config.engine, sum(p.numel() for g in groups for p in g["params"])
    around = (ranks - 1) / ranks
    zero = engine.kind == "deepspeed"
    weights = 2 if bf16 and zero else 4
    sums = (2 if engine.communication_dtype == "bf16" else 4) if zero else 4
    stage = engine.zero_stage if zero else 0
    rounds = config.global_batch_sequences // (config.train.micro_batch_sequences * ranks)
    # Stages 2 and 3 reduce in every micro-batch; stage 0 and plain reduce and send back.
    reductions = {0: 2.0, 1: 1.0}.get(stage, float(rounds))
    gatherings = {0: 0.0, 3: 2.0 * rounds}.get(stage, 1.0)
    found = {
        "reduce gradients": int(elements * around * sums * reductions),
        "gather weights": int(elements * around * weights * gatherings),
    }
    if plan is not None:
        found["exchange matrices"] = max(plan.received_elements) * WIRE_DTYPES[engine.wire_dtype].itemsize
    return found


def dry_run(config: Config, ranks: int) -> dict[str, int]:
    """Build the sharded optimizer of every rank, on the meta device and without processes.

    Returns:
        Name of every matrix -> elements that the ranks work on together.

    Raises:
        LayoutError, AssertionError: some matrix is not covered exactly once.
    """
    model = build_model(config.model, config.run.seed, device="meta")
    groups = config.optimizer.param_groups(model)
    layout = layout_of(config, groups, ranks)
    if layout is None:
        return {}
    covered: dict[str, int] = {}
    arriving: dict[tuple[int, int], int] = {}
    plan = None
    for rank in range(ranks):
        optimizer = Aurora([dict(group) for group in groups])
        for group, size in zip(optimizer.param_groups, layout.shard_sizes, strict=True):
            group["params"] = [torch.empty(size, device="meta", requires_grad=True)]
        matrix = next(g for g in optimizer.param_groups if g["kind"] == "matrix")
        plan = plan or plan_group(layout, matrix)
        sharded = ShardedMatrices(plan, rank, None, config.engine.wire_dtype, torch.device("meta"), connect=False)
        optimizer.bind(sharded)
        for group in optimizer.param_groups:
            optimizer.state_of(group["params"][0], group)
        for turn in sharded.rounds:
            for part in turn.parts:
                name = plan.units[part.unit].name
                covered[name] = covered.get(name, 0) + part.area.elements
            for links in (turn.local, *turn.inward.values()):
                for link in links:
                    key = (turn.parts[link.part].unit, rank)
                    arriving[key] = arriving.get(key, 0) + link.area.elements
    assert plan is not None, "at least one rank"
    for index, (unit, team) in enumerate(zip(plan.units, plan.teams, strict=True)):
        for place, member in enumerate(team):
            wanted = unit.part(place, len(team)).elements
            assert arriving.get((index, member), 0) == wanted, f"{unit.name} does not arrive whole at rank {member}"
    for name, elements in covered.items():
        rows, columns = layout.shapes[name]
        assert elements == rows * columns, f"{name} is worked on {elements / (rows * columns)} times"
    return covered


def format_plan(plan: RunPlan, gpus_per_node: int) -> list[str]:
    """The plan in words, a line each."""
    config, need = plan.config, plan.memory
    gigabytes = {name: value / 1e9 for name, value in need.parts().items() if name != "start"}
    nodes = -(-plan.ranks // gpus_per_node)
    lines = describe(config, plan.model, plan.ranks)
    device = plan.device
    known = (
        ""
        if device.memory is None or device.peak is None
        else (f" ({device.memory / 1e9:.0f} GB, {device.peak / 1e12:.0f} TFLOP/s in bf16)")
    )
    lines.append(f"cluster   {plan.ranks} ranks on {nodes} nodes of {gpus_per_node} {device.name}{known}")
    zero = f"DeepSpeed, ZeRO {config.engine.zero_stage}" if config.engine.kind == "deepspeed" else "plain"
    lines.append(f"engine    {zero}")
    if plan.matrices is not None:
        owners = plan.matrices
        teams = sum(len(team) > 1 for team in owners.teams)
        polar = f"; with balance by polar calls {plan.by_polar:.3f}" if plan.by_polar is not None else ""
        lines.append(
            f"owners    {len(owners.units)} matrices, {teams} of them shared by several ranks; slowest rank "
            f"{owners.imbalance:.3f} of an equal share{polar}"
        )
    moved = ", ".join(f"{name} {value / 1e9:.3f} GB" for name, value in plan.collectives.items())
    lines.append(f"network   received by the busiest rank in a step: {moved}")
    parts = ", ".join(f"{name} {value:.2f}" for name, value in gigabytes.items())
    lines.append(f"memory    GB a rank: {parts}")
    lines.append(f"          {_verdict(need, device)}")
    total = plan.step_flops + plan.optimizer_flops * plan.ranks
    if plan.step_seconds is None:
        lines.append(f"time      not known on this device ({total:.3e} FLOPs a step)")
    else:
        lines.append(
            f"time      {plan.step_seconds:.2f} s a step at an assumed MFU of {plan.mfu:.0%} ({total:.3e} FLOPs a "
            f"step), {plan.step_seconds * config.total_steps / 86400:.1f} days, {plan.gpu_hours:,.0f} GPU-hours"
        )
    lines.append(f"storage   {plan.checkpoint_bytes / 1e9:.1f} GB a checkpoint")
    return lines


def _verdict(need: Memory, device: Device) -> str:
    if device.memory is None:
        return f"at the peak of a step {need.peak_on_cpu / 1e9:.1f} GB resident above the level before set-up"
    share = need.peak / device.memory
    verdict = "fits" if share <= 0.9 else "is tight" if share <= 1 else "DOES NOT FIT"
    return (
        f"at the peak of a step {need.peak / 1e9:.1f} GB, {share:.0%} of the device: {verdict} (the allocator and "
        "the libraries take a few GB more)"
    )


def as_json(plan: RunPlan) -> dict[str, Any]:
    """The same as plain data."""
    owners = plan.matrices
    members = zip(owners.units, owners.teams, strict=True) if owners else ()
    return {
        "ranks": plan.ranks,
        "device": asdict(plan.device),
        "mfu": plan.mfu,
        "parameters": parameter_count(plan.config.model)["total"],
        "tokens": plan.config.train.total_tokens,
        "steps": plan.config.total_steps,
        "imbalance": owners.imbalance if owners else None,
        "imbalance_by_polar": plan.by_polar,
        "owners": {f"{unit.name}:{unit.row}": list(team) for unit, team in members},
        "exchange_elements": owners.received_elements if owners else [],
        "collective_bytes": plan.collectives,
        "memory": {**plan.memory.parts(), "peak": plan.memory.peak, "peak_on_cpu": plan.memory.peak_on_cpu},
        "step_flops": plan.step_flops,
        "optimizer_flops": plan.optimizer_flops,
        "step_seconds": plan.step_seconds,
        "gpu_hours": plan.gpu_hours,
        "checkpoint_bytes": plan.checkpoint_bytes,
    }
