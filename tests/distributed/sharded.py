"""What the ranks of the sharding tests do: a sharded and a dense optimizer step the same recorded gradients."""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from optimizers import Aurora
from optimizers.directions import ROW_SLOTS
from optimizers.sharded import Layout, plan_group, shard, zero_layout

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    # No number of ranks divides these, and the matrices straddle the borders of shards.
    "matrix": {
        "q": (8, 8),
        "qkv": (14, 6),
        "up": (17, 5),
        "gate": (17, 5),
        "down": (5, 17),
        "tiny": (1, 3),
        "o": (7, 7),
    },
    "embedding": {"embedding": (23, 8)},
    "vector": {"gain": (5,), "bias": (1,)},
}


def tensors(shapes: dict[str, dict[str, tuple[int, ...]]], seed: int) -> dict[str, Tensor]:
    """Random tensors by name."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for part in shapes.values() for name, shape in part.items()}


def groups(
    shapes: dict[str, dict[str, tuple[int, ...]]], weights: dict[str, Tensor], options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Parameter groups over the weights; `row_blocks` and `views` may be given by name."""
    options = dict(options)
    blocks, views = options.pop("row_blocks", {}), options.pop("views", {})
    found: list[dict[str, Any]] = []
    for role, part in shapes.items():
        kind = "matrix" if role == "matrix" else "adamw"
        group = {"params": [weights[name] for name in part], "param_names": list(part), "kind": kind, "role": role}
        found.append(group | (options if kind == "matrix" else {"weight_decay": 0.01}))
    if blocks:
        found[0]["row_blocks"] = [blocks.get(name) for name in shapes["matrix"]]
    if views:
        found[0]["views"] = [views.get(name) for name in shapes["matrix"]]
    return found


def cut(layout: Layout, rank: int, values: dict[str, Tensor]) -> list[Tensor]:
    """This rank's shards of the values."""
    shards = [torch.zeros(size) for size in layout.shard_sizes]
    for f in layout.fragments[rank]:
        shards[f.shard][f.offset : f.offset + f.length] = values[f.name].reshape(-1)[f.start : f.stop]
    return shards


def start_gloo() -> tuple[int, int]:
    """Rank and world size."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        dist.init_process_group("gloo")
    return int(os.environ.get("RANK", "0")), world_size


def states(optimizer: Aurora, layout: Layout | None, rank: int) -> Iterator[tuple[str, str, int, Tensor]]:
    """(name, slot, first element, values) of everything that an optimizer holds."""
    if layout is None:
        for group in optimizer.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                yield name, "weight", 0, p.reshape(-1)
                for slot, values in optimizer.state[p].items():
                    yield name, slot, 0, values.reshape(-1)
        return
    for f in layout.fragments[rank]:
        group = optimizer.param_groups[f.shard]
        flat = group["params"][0]
        yield f.name, "weight", f.start, flat[f.offset : f.offset + f.length]
        for slot, values in optimizer.state[flat].items():
            if slot == "step":
                yield f.name, slot, 0, values.reshape(-1)
            elif slot not in ROW_SLOTS:
                yield f.name, slot, f.start, values[f.offset : f.offset + f.length]
    matrix = next(g for g in optimizer.param_groups if g["kind"] == "matrix")
    kept, at = optimizer.matrices.row_slot(matrix), 0
    for name, low, high in optimizer.matrices.owned_rows(matrix) if kept else ():
        yield name, kept, low, optimizer.state[matrix["params"][0]][kept][at : at + high - low]
        at += high - low


def compare(
    stage: int,
    options: dict[str, Any],
    *,
    shapes: dict[str, dict[str, tuple[int, ...]]] = SHAPES,
    steps: int = 20,
    wire: str = "fp32",
    fault: str = "",
    calls: str = "one",
    bucket: int | None = None,
    team: int = 1,
) -> dict[str, Any]:
    """Step a dense optimizer and this rank's side of a sharded one on the same gradients.

    Args:
        stage: ZeRO stage of the layout.
        options: of the matrix group.
        shapes: of the parameters.
        steps: how many.
        wire: dtype of the exchange.
        fault: "dropped" fragment, "stale" momentum, or "rate" off by 1 %.
        calls: "one" step() for all groups, or one for each "group", as DeepSpeed makes them.
        bucket: elements of a bucket, if not the usual ones.
        team: ranks that share every matrix with a long side of at least as many.

    Returns:
        Squared difference and squared size by (name, slot), bytes received and the plan's prediction, and more.
    """
    from optimizers.sharded import exchange

    rank, world_size = start_gloo()
    if bucket is not None:
        exchange.make_rounds.__defaults__ = (bucket, None)
    weights = tensors(shapes, 1)
    layout = zero_layout([dict(part) for part in shapes.values()], world_size, stage)
    dense = Aurora(groups(shapes, {name: w.clone().requires_grad_() for name, w in weights.items()}, options))
    own = Aurora(groups(shapes, {name: w.clone().requires_grad_() for name, w in weights.items()}, options))
    for group, flat in zip(own.param_groups, cut(layout, rank, weights), strict=True):
        group["params"] = [flat.requires_grad_()]
    plan = plan_group(layout, own.param_groups[0])
    if team > 1:
        teams = [
            tuple(range(team)) if max(unit.shape) >= team else alone
            for unit, alone in zip(plan.units, plan.teams, strict=True)
        ]
        plan = dataclasses.replace(plan, teams=tuple(teams))
    sharded = shard(own, layout, rank, wire_dtype=wire, plan=plan)  # type: ignore[arg-type]
    counted = {"calls": 0, "bytes": 0}
    send = dist.all_to_all_single

    def counting(received: Tensor, *arguments: Any, **named: Any) -> Any:
        counted["calls"] += 1
        counted["bytes"] += received.numel() * received.element_size()
        return send(received, *arguments, **named)

    dist.all_to_all_single = counting  # this process ends with the test
    assert sharded is not None
    if fault == "rate":
        own.param_groups[0]["lr"] *= 1.01
    for step in range(steps):
        gradients = tensors(shapes, 100 + step)
        for group in dense.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                p.grad = gradients[name]
        for group, flat in zip(own.param_groups, cut(layout, rank, gradients), strict=True):
            group["params"][0].grad = flat
        if fault == "dropped" and rank == world_size - 1 and step == 3:
            own.param_groups[0]["params"][0].grad[:2] = 0
        if fault == "stale" and rank == 0 and step == 5:
            own.state[own.param_groups[0]["params"][0]]["momentum"].zero_()
        dense.step()
        own.reset_report()
        all_groups = own.param_groups
        for chosen in [all_groups] if calls == "one" else [[group] for group in all_groups]:
            own.param_groups = chosen
            own.step()
        own.param_groups = all_groups
    whole = {(name, slot): values for name, slot, _, values in states(dense, None, rank)}
    errors: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for name, slot, first, values in states(own, layout, rank):
        wanted = whole[name, slot][first : first + len(values)].double()
        entry = errors[name, slot]
        entry[0] += (values.double() - wanted).square().sum().item()
        entry[1] += wanted.square().sum().item()
    if world_size > 1:
        dist.destroy_process_group()
    return {
        "errors": dict(errors),
        "bytes": counted["bytes"],
        "calls": counted["calls"],
        "planned": sharded.plan.received_elements[rank],
        "teams": sharded.plan.teams,
        "rounds": len(sharded.rounds),
        "fallbacks": int(own.last_step_fallbacks),
        "dense_fallbacks": int(dense.last_step_fallbacks),
    }


def worst(results: list[dict[str, Any]]) -> float:
    """The largest relative Frobenius error of any tensor, over all ranks."""
    total: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for result in results:
        for key, (difference, size) in result["errors"].items():
            total[key][0] += difference
            total[key][1] += size
    return max((difference / size) ** 0.5 if size else difference**0.5 for difference, size in total.values())
