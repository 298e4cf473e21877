"""What the ranks of the tests of divided matrices do: one optimizer per rank with whole parameters, and a dense one."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from optimizers import Aurora, directions
from optimizers.sharded import DividedMatrices, exchange
from optimizers.sharded.layout import LayoutError
from pretrain.config import parse_config
from pretrain.engine.plain import PlainEngine
from pretrain.engine.ranks import keep_group
from tests.conftest import TINY
from tests.distributed.sharded import SHAPES, groups, start_gloo, tensors


def leaves(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.clone().requires_grad_() for name, weight in weights.items()}


def compare(
    options: dict[str, Any],
    *,
    shapes: dict[str, dict[str, tuple[int, ...]]] = SHAPES,
    steps: int = 8,
    wire: Any = "fp32",
    bucket: int | None = None,
    nan_on: int | None = None,
) -> dict[str, Any]:
    """Step a dense optimizer and one that divides its matrices on the same gradients.

    Args:
        options: of the matrix group.
        shapes: of the parameters.
        steps: how many.
        wire: dtype in which directions travel.
        bucket: elements of a bucket, if not the usual ones.
        nan_on: the rank with a NaN in a gradient of the fourth step.
    """
    rank, _ = start_gloo()
    if bucket is not None:
        exchange.schedule.__defaults__ = (bucket, None)  # this process ends with the test
    weights = tensors(shapes, 1)
    dense = Aurora(groups(shapes, leaves(weights), options))
    own = Aurora(groups(shapes, leaves(weights), options))
    holder = DividedMatrices(wire_dtype=wire)
    own.bind(holder)
    found: list[int] = []
    find = directions.from_options

    def counting(u: Tensor, *arguments: Any) -> Any:
        if not u.is_meta:  # a count of operations
            found.append(len(u))
        return find(u, *arguments)

    taken = []
    for step in range(steps):
        gradients = tensors(shapes, 100 + step)
        for optimizer in (dense, own):
            for group in optimizer.param_groups:
                for name, p in zip(group["param_names"], group["params"], strict=True):
                    p.grad = gradients[name].clone()
        if nan_on is not None and step == 3:
            dense.permitted = torch.tensor(False)
            if rank == nan_on:
                own.param_groups[0]["params"][0].grad[0, 0] = torch.nan
        dense.step()
        dense.permitted = None
        directions.from_options = counting
        own.step()
        directions.from_options = find
        taken.append(bool(own.last_step_finite))
    differing, sums = [], []
    for group, other in zip(own.param_groups, dense.param_groups, strict=True):
        for name, p, q in zip(group["param_names"], group["params"], other["params"], strict=True):
            assert own.state[p].keys() == dense.state[q].keys()
            for slot, value in {"weight": p, **own.state[p]}.items():
                wanted = {"weight": q, **dense.state[q]}[slot]
                sums.append(value.double().sum().item())
                if not torch.equal(value, wanted):
                    differing.append((name, slot, (value - wanted).norm().item() / wanted.norm().item()))
    others = 0
    for turn in holder.turns(own.param_groups[0]["params"], own.param_groups[0]):
        for (m, n), owner in zip((block.shape for block in turn.pieces), turn.owners, strict=True):
            kept = m if directions.row_slot(own.param_groups[0], m, n) else 0
            others += (m * n * holder.dtype.itemsize + 4 * kept) * (owner != rank)
    dist.destroy_process_group()
    return {
        "differing": differing,
        "sums": sums,
        "found": sum(found) / steps,
        "received": holder.received_bytes / steps,
        "others": others,
        "taken": taken,
        "fallbacks": (int(own.last_step_fallbacks), int(dense.last_step_fallbacks)),
    }


def empty() -> bool:
    """A step of nothing but an empty matrix and a gain."""
    start_gloo()
    params = [torch.zeros(5, 0, requires_grad=True), torch.ones(3, requires_grad=True)]
    optimizer = Aurora([{"params": params[:1], "kind": "matrix"}, {"params": params[1:], "kind": "adamw"}])
    optimizer.bind(DividedMatrices())
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    dist.destroy_process_group()
    return bool((params[1] < 1).all())


def network(seed: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 6), nn.Linear(6, 24))


def wrapped() -> dict[str, Any]:
    """`Aurora` of a DistributedDataParallel against that of the model inside, which divides nothing."""
    rank, _ = start_gloo()
    keep_group()
    losses: dict[str, list[float]] = {}
    kinds = {}
    for way in ("divided", "whole", "bound"):
        model = DistributedDataParallel(network())
        optimizer = Aurora(model if way == "divided" else model.module, lr=0.02)
        if way == "bound":
            optimizer.bind(DividedMatrices())
        kinds[way] = type(optimizer.matrices).__name__
        losses[way] = []
        for step in range(4):
            inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(10 * step + rank))
            loss = model(inputs).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[way].append(loss.item())
    dist.destroy_process_group()
    return {"losses": losses, "kinds": kinds}


def joined() -> int:
    """Ranks with different numbers of batches inside `join`; the steps that this one took."""
    rank, _ = start_gloo()
    keep_group()
    model = DistributedDataParallel(network())
    optimizer = Aurora(model, lr=0.02)
    taken = 0
    with warnings.catch_warnings(), model.join():
        warnings.simplefilter("ignore")
        for _ in range(3 + 2 * rank):
            optimizer.zero_grad()
            model(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
            taken += 1
    dist.destroy_process_group()
    return taken


def freed_late(elements: int) -> bool:
    """Free the model of an engine that was closed, while a collective still holds a tensor."""
    engine = PlainEngine(parse_config(TINY))
    model = engine.model = DistributedDataParallel(network())
    dist.broadcast(torch.full((elements,), float(engine.ranks.rank)), src=0, async_op=True)
    engine.close()
    del engine  # which holds the group as well
    del model
    return not dist.is_initialized()


def refused(fault: str) -> str:
    """The message of a first step of ranks that do not have the same weights, or the same options."""
    rank, _ = start_gloo()
    weights = tensors(SHAPES, 1 + (rank if fault == "weights" else 0))
    optimizer = Aurora(groups(SHAPES, leaves(weights), {}))
    if fault == "options" and rank == 1:
        optimizer.param_groups[0]["iterations"] = 3
    optimizer.bind(DividedMatrices())
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    try:
        optimizer.step()
    except LayoutError as error:
        return str(error)
    finally:
        dist.destroy_process_group()
    return ""
