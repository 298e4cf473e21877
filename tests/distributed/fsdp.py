"""What the ranks of the FSDP2 tests do: an optimizer of DTensors and a dense one step the same recorded gradients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from optimizers import Aurora
from optimizers.sharded import DTensorMatrices, Layout
from tests.distributed.sharded import SHAPES, groups, start_gloo, tensors


class Bag(nn.Module):
    """Parameters by name, nothing else."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight.clone()))


def start(mesh_shape: tuple[int, ...]) -> DeviceMesh:
    """The process group, also of one rank, and a mesh of this shape whose last dimension shards."""
    start_gloo()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])


def sharded(model: nn.Module, mesh: DeviceMesh) -> dict[str, DTensor]:
    """The parameters of a model after fully_shard."""
    fully_shard(model, mesh=mesh)
    found: dict[str, Any] = dict(model.named_parameters())
    assert all(isinstance(p, DTensor) for p in found.values())
    return found


def set_gradients(params: dict[str, Any], gradients: dict[str, Tensor]) -> None:
    """Give each parameter its gradient, cut as the parameter is."""
    for name, p in params.items():
        p.grad = distribute_tensor(gradients[name], p.device_mesh, p.placements, src_data_rank=None)


@contextmanager
def counted_bytes() -> Iterator[list[int]]:
    """The bytes that every all-to-all of this process receives, counted below the optimizer."""
    found: list[int] = []
    send = dist.all_to_all_single

    def counting(received: Tensor, *arguments: Any, **named: Any) -> Any:
        found.append(received.numel() * received.element_size())
        return send(received, *arguments, **named)

    dist.all_to_all_single = counting
    try:
        yield found
    finally:
        dist.all_to_all_single = send


def differences(own: Aurora, dense: Aurora) -> dict[tuple[str, str], float]:
    """The largest difference of every weight and state from the dense ones, relative to their norm; 0 if bit-equal."""
    found = {}
    for group, other in zip(own.param_groups, dense.param_groups, strict=True):
        for name, p, q in zip(group["param_names"], group["params"], other["params"], strict=True):
            assert isinstance(p, DTensor)
            assert own.state[p].keys() == dense.state[q].keys(), name
            for slot, value in {"weight": p, **own.state[p]}.items():
                wanted = {"weight": q, **dense.state[q]}[slot].detach()
                assert isinstance(value, DTensor) == (slot != "step")
                got = value.full_tensor() if isinstance(value, DTensor) else value
                assert got.shape == wanted.shape, (name, slot)
                size = float(wanted.double().norm()) or 1.0
                found[name, slot] = float((got.detach().double() - wanted.double()).norm()) / size
    return found


def exchanged(layout: Layout, name: str) -> Layout:
    """A layout in which the first two ranks have each other's rows of a parameter."""
    first, second, *others = layout.fragments
    a = next(f for f in first if f.name == name)
    b = next(f for f in second if f.name == name)
    assert a.length == b.length
    swapped = [
        tuple(replace(f, start=other.start) if f is own else f for f in fragments)
        for fragments, own, other in ((first, a, b), (second, b, a))
    ]
    return replace(layout, fragments=(*swapped, *others))


def compare(
    mesh_shape: tuple[int, ...],
    variants: dict[str, dict[str, Any]],
    *,
    shapes: dict[str, dict[str, tuple[int, ...]]] = SHAPES,
    steps: int = 20,
    wire: Any = "fp32",
    fault: str = "",
    part_of_mesh: bool = False,
) -> dict[str, dict[str, Any]]:
    """Step a dense optimizer and one of DTensors on the same gradients, for each variant of the options.

    Args:
        mesh_shape: (ranks,), or (replicas, ranks of each).
        variants: options of the matrix group by name.
        shapes: of the parameters.
        steps: how many.
        wire: dtype of the exchange; "fp32" is what the optimizer takes by itself.
        part_of_mesh: shard over the last dimension of the mesh only; each of its groups trains alone.
        fault: "rows", the rows of a shard permuted, or "ranks", those of two ranks exchanged in the layout.

    Returns:
        By variant: `worst`, the largest difference of any tensor, and its name; the bytes received and planned after
        the first step; and more.
    """
    from optimizers.sharded import rows

    mesh = start(mesh_shape)["shard"] if part_of_mesh else start(mesh_shape)
    found = {}
    if fault == "ranks":
        read = rows.row_layout
        rows.row_layout = lambda shapes, held: exchanged(read(shapes, held), "qkv")  # this process ends with the test
    for variant, options in variants.items():
        weights = tensors(shapes, 1)
        dense_weights = {name: nn.Parameter(w.clone()) for name, w in weights.items()}
        params = sharded(Bag(weights), mesh)
        dense = Aurora(groups(shapes, dense_weights, options))  # type: ignore[arg-type]
        own = Aurora(groups(shapes, params, options))  # type: ignore[arg-type]
        if wire != "fp32":
            own.bind(DTensorMatrices(wire))
        received = 0
        for step in range(steps):
            gradients = tensors(shapes, 100 + step)
            for name, p in dense_weights.items():
                p.grad = gradients[name].clone()
            set_gradients(params, gradients)
            if fault == "rows" and step == 3 and mesh.get_local_rank("shard") == 0:
                part = params["up"].grad.to_local()
                part.copy_(part.flip(0))
            dense.step()
            with counted_bytes() as counted:
                own.step()
            # The first step also checks that every matrix arrives complete.
            received += sum(counted) if step else 0
        holder = own.matrices.sharded(own.param_groups[0])
        rank = mesh.get_local_rank("shard")
        distances = differences(own, dense)
        found[variant] = {
            "worst": max((distance, *key) for key, distance in distances.items()),
            "received": received,
            "elements": holder.plan.received_elements[rank],
            "planned": (steps - 1) * holder.planned_bytes(own.param_groups[0])[rank],
            "team": max(map(len, holder.plan.teams)),
            "straddling": sum(len(pieces) > 1 for pieces in holder.plan.fragments.values()),
            "empty": min(p.to_local().numel() for p in params.values()),
            "fallbacks": (int(own.last_step_fallbacks), int(dense.last_step_fallbacks)),
        }
    dist.destroy_process_group()
    return found
