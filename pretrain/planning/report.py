"""What `aurora plan` prints: ten lines of answer, details, a comparison of settings, or all numbers as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pretrain.config import Config, ConfigError, load_config
from pretrain.model.cost import parameter_count
from pretrain.planning.cluster import Cluster, RunPlan, plan_run
from pretrain.planning.devices import DEVICES
from pretrain.planning.memory import Memory
from pretrain.planning.summary import describe
from pretrain.planning.traffic import Collective
from pretrain.processes.errors import UserError
from pretrain.text_tables import aligned

HEADER = ("setting", "GB a rank", "fits", "GB received", "compute s", "network s", "step s", "GPU-hours")
UNKNOWN_LINKS = "the link speeds of this device are not known; give --link-gbytes and --node-link-gbytes"


class PlanError(UserError):
    """A request that cannot be planned."""


def cluster_of(
    ranks: int, device: str, per_node: int, mfu: float, link_gbytes: float | None, node_link_gbytes: float | None
) -> Cluster:
    """The cluster of a command line.

    Args:
        ranks: GPUs, one process each.
        device: by its name in `DEVICES`.
        per_node: GPUs of a node.
        mfu: assumed share of the peak.
        link_gbytes: GB/s that a GPU receives from other nodes; None is the device's own.
        node_link_gbytes: GB/s that a GPU receives from its node; None is the device's own.

    Raises:
        PlanError: an unknown device.
    """
    if device not in DEVICES:
        raise PlanError(f"--device: expected one of {', '.join(DEVICES)}, got {device!r}")
    within, between = (None if speed is None else speed * 1e9 for speed in (node_link_gbytes, link_gbytes))
    return Cluster(ranks, DEVICES[device], per_node, mfu, within, between)


def answer(plan: RunPlan) -> list[str]:
    """What one wants to know first: whether it fits, how long it takes and why, ten lines."""
    config, cluster, need = plan.config, plan.cluster, plan.memory
    kind = _engine(plan)
    lines = [
        f"run       {config.run.name}: {parameter_count(config.model)['total']:,} parameters, "
        f"{config.train.total_tokens:,} tokens in {config.total_steps:,} steps, {kind}",
        f"cluster   {cluster.ranks} ranks on {cluster.nodes} {'node' if cluster.nodes == 1 else 'nodes'} of "
        f"{cluster.per_node} {cluster.device.name}{_device_figures(plan)}",
        f"fits      {_verdict(need, plan)}",
        f"step      {_step(plan)}",
        f"total     {_total(plan)}",
        f"compute   {_compute(plan)}",
        f"network   {_network(plan)}",
        f"memory    {_memory(need)}",
        f"slowest   {_slowest(plan)}",
        f"storage   {_storage(plan)}",
    ]
    return lines


def _engine(plan: RunPlan) -> str:
    engine, ranks = plan.config.engine, plan.cluster.ranks
    if engine.kind == "fsdp2":
        shards = engine.sharding_ranks(ranks)
        return "FSDP2" if shards == ranks else f"FSDP2 in {ranks // shards} replicas of {shards} ranks"
    return f"ZeRO {engine.zero_stage}" if engine.kind == "deepspeed" else "plain data parallel"


def _device_figures(plan: RunPlan) -> str:
    device = plan.cluster.device
    if device.memory is None or device.peak is None:
        return ""
    return f" ({device.memory / 1e9:.0f} GB, {device.peak / 1e12:.0f} TFLOP/s in bf16)"


def _verdict(need: Memory, plan: RunPlan) -> str:
    device = plan.cluster.device
    unknown = "" if need.activations else "; the activations of this architecture are not included"
    if device.memory is None:
        return (
            f"about {need.peak_on_cpu / 1e9:.1f} GB resident at the peak of a step, above the level before set-up (how "
            f"much the allocator keeps differs between runs){unknown}"
        )
    share = need.peak / device.memory
    verdict = "yes" if share <= 0.9 else "TIGHT" if share <= 1 else "NO"
    part = f"{share:.0%}" if share >= 0.01 else "less than 1%"
    return (
        f"{verdict}: {need.peak / 1e9:.1f} GB at the peak of a step, {part} of the device (the allocator and the "
        f"libraries take a few GB more{unknown})"
    )


def _step(plan: RunPlan) -> str:
    compute, network, total = plan.compute_seconds, plan.network_seconds, plan.step_seconds
    if compute is None:
        return "time not known: the device's peak is not in the table"
    if network is None or total is None:
        return f"{compute:.3f} s compute; network time not known: {UNKNOWN_LINKS}"
    apart = f"{compute:.3f} s compute + {network:.3f} s network"
    return f"{total:.3f} s = {apart}, one after the other (no overlap is assumed)"


def _total(plan: RunPlan) -> str:
    seconds, hours = plan.step_seconds, plan.gpu_hours
    if seconds is None or hours is None:
        return "not known without the time of a step"
    return f"{seconds * plan.config.total_steps / 86400:.1f} days, {hours:,.0f} GPU-hours"


def _compute(plan: RunPlan) -> str:
    per_rank = plan.model_flops / plan.cluster.ranks + plan.optimizer_flops
    assumed = "" if plan.cluster.device.peak is None else f", at an assumed {plan.cluster.mfu:.0%} of the peak"
    return (
        f"{per_rank:.3e} FLOPs a step on the slowest rank, {plan.optimizer_flops / per_rank:.1%} of them for "
        f"directions{assumed}"
    )


def _network(plan: RunPlan) -> str:
    if not plan.collectives:
        return "nothing: one rank" if plan.cluster.ranks == 1 else "nothing"
    within, between = plan.cluster.links
    moved: dict[str, float] = {}
    for collective in plan.collectives:
        moved[collective.purpose] = moved.get(collective.purpose, 0.0) + collective.received
    parts = ", ".join(f"{purpose} {received / 1e9:.3f}" for purpose, received in moved.items())
    speeds = "link speeds not known"
    if within is not None or between is not None:
        known = [("within a node", within), ("between nodes", between)]
        speeds = "assumed links per GPU: " + ", ".join(
            f"{'unknown' if speed is None else f'{speed / 1e9:g} GB/s'} {where}" for where, speed in known
        )
    return f"{plan.received_bytes / 1e9:.3f} GB received a step by the busiest rank ({parts}); {speeds}"


def _memory(need: Memory) -> str:
    parts = {name: value for name, value in need.parts().items() if name != "start"}
    return "GB a rank: " + ", ".join(f"{name} {value / 1e9:.2f}" for name, value in parts.items())


def _slowest(plan: RunPlan) -> str:
    owners = plan.matrices or plan.divided
    if owners is None:
        return "all ranks alike: each computes every direction"
    teams = sum(len(team) > 1 for team in owners.teams)
    rank = owners.loads.index(max(owners.loads))
    return (
        f"rank {rank}: {owners.imbalance:.3f} of an equal share of the directions ({len(owners.units)} matrices, "
        f"{teams} of them shared by several ranks)"
    )


def _storage(plan: RunPlan) -> str:
    keep = plan.config.checkpoint
    kept = keep.keep_last + (plan.config.total_steps // keep.keep_every_steps if keep.keep_every_steps else 0)
    size = plan.checkpoint_bytes
    return f"{size / 1e9:.1f} GB a checkpoint, {size * kept / 1e9:,.0f} GB for the {kept} that are kept at most"


def details(plan: RunPlan) -> list[str]:
    """The derived numbers of the run, each collective, and who works on which matrices."""
    lines = describe(plan.config, plan.model, plan.cluster.ranks)
    for collective in plan.collectives:
        lines.append(f"network   {_collective(plan, collective)}")
    if plan.collectives:
        lines.append(
            "          received over the wire: rings, 2 (n - 1) / n of the payload for an all-reduce on n ranks, "
            "(n - 1) / n for the others, all of an all-to-all's"
        )
    owners = plan.matrices
    if owners is not None:
        lines.append(f"owners    {len(owners.units)} matrices, each covered exactly once")
        if plan.by_polar is not None:
            lines.append(f"          slowest rank if rows were balanced by polar calls: {plan.by_polar:.3f}")
        lines += owners.table()
    elif plan.divided is not None:
        lines.append(f"owners    {len(plan.divided.units)} matrices, which every rank has whole")
        lines += plan.divided.table()
    return lines


def _collective(plan: RunPlan, collective: Collective) -> str:
    seconds = plan.cluster.seconds(collective)
    time = "" if seconds is None else f", {seconds * 1e3:.1f} ms"
    return (
        f"{collective.purpose}: {collective.operation} of {collective.payload:,} bytes in {collective.dtype} over "
        f"{collective.ranks} ranks, {collective.received / 1e9:.3f} GB received{time}"
    )


def as_json(plan: RunPlan) -> dict[str, Any]:
    """Everything as plain data. Bytes, seconds, and FLOPs of a step unless the key says otherwise."""
    owners, cluster = plan.matrices, plan.cluster
    either = owners or plan.divided
    members = zip(owners.units, owners.teams, strict=True) if owners else ()
    within, between = cluster.links
    return {
        "ranks": cluster.ranks,
        "nodes": cluster.nodes,
        "device": asdict(cluster.device),
        "mfu": cluster.mfu,
        "link_bytes_per_second": {"within_node": within, "between_nodes": between},
        "parameters": parameter_count(plan.config.model)["total"],
        "tokens": plan.config.train.total_tokens,
        "steps": plan.config.total_steps,
        "imbalance": either.imbalance if either else None,
        "imbalance_by_polar": plan.by_polar,
        "owners": {f"{unit.name}:{unit.row}": list(team) for unit, team in members},
        "exchange_elements": owners.received_elements if owners else [],
        "collectives": [
            {**asdict(c), "payload": c.payload, "received": c.received, "seconds": cluster.seconds(c)}
            for c in plan.collectives
        ],
        "received_bytes": plan.received_bytes,
        "memory": {**plan.memory.parts(), "peak": plan.memory.peak, "peak_on_cpu": plan.memory.peak_on_cpu},
        "model_flops": plan.model_flops,
        "optimizer_flops": plan.optimizer_flops,
        "compute_seconds": plan.compute_seconds,
        "network_seconds": plan.network_seconds,
        "step_seconds": plan.step_seconds,
        "gpu_hours": plan.gpu_hours,
        "checkpoint_bytes": plan.checkpoint_bytes,
    }


def variants(path: str, overrides: Sequence[str], compare: str) -> dict[str, Config | ConfigError]:
    """The configs that `--compare section.key=value,value,...` asks for, by their override.

    Values that the config does not allow keep their place, with the error.

    Raises:
        PlanError: no key, or no value.
    """
    key, equals, values = compare.partition("=")
    listed = [value.strip() for value in values.split(",")]
    if not key or not equals or not all(listed):
        raise PlanError(f"--compare: expected section.key=value,value,..., got {compare!r}")
    found: dict[str, Config | ConfigError] = {}
    for override in (f"{key}={value}" for value in listed):
        try:
            found[override] = load_config(path, [*overrides, override])
        except ConfigError as error:
            found[override] = error
    return found


def comparison(configs: dict[str, Config | ConfigError], cluster: Cluster) -> tuple[list[str], dict[str, Any]]:
    """A table with one row per setting, and the same as plain data: each plan's numbers, or its `error`."""
    rows: list[tuple[str, ...]] = [HEADER]
    refused: list[str] = []
    data: dict[str, Any] = {}
    for override, config in configs.items():
        try:
            if isinstance(config, ConfigError):
                raise config
            plan = plan_run(config, cluster)
        except UserError as error:
            refused += [f"{override} is not possible: {line}" for line in str(error).splitlines()]
            data[override] = {"error": str(error)}
            continue
        data[override] = as_json(plan)
        fits = _verdict(plan.memory, plan).split(":")[0] if cluster.device.memory else "-"
        rows.append(
            (
                override,
                f"{(plan.memory.peak if cluster.device.memory else plan.memory.peak_on_cpu) / 1e9:.1f}",
                fits,
                f"{plan.received_bytes / 1e9:.3f}",
                *(_number(seconds, ".3f") for seconds in (plan.compute_seconds, plan.network_seconds)),
                _number(plan.step_seconds, ".3f"),
                _number(plan.gpu_hours, ",.0f"),
            )
        )
    return [*aligned(rows), *refused], data


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else format(value, style)
