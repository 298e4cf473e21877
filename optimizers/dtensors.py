"""Parameters of which this process stores a part: what torch's fully_shard (FSDP2) makes of those of a model.

A DTensor has the shape of the whole parameter; this process stores its *local* part. Matrices may be sharded by rows
over one dimension of their mesh and replicated over the others (HSDP). Everything elementwise works on local parts.
"""

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

from .blocks import View
from .fields import OptionError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

# What activation checkpointing and torch.compile put into the names of a model's parameters.
WRAPPER_NAMES = ("_checkpoint_wrapped_module.", "_orig_mod.")


def is_dtensor(x: object) -> "TypeGuard[DTensor]":
    """Whether it is a DTensor. Does not import their module, which plain training never needs."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """The part of a tensor that this process stores, sharing its memory: all of it unless it is a DTensor."""
    return x.to_local().detach() if is_dtensor(x) else x


def dense_grad(p: Tensor) -> Tensor:
    """The gradient of a parameter that has one: of a DTensor the part that belongs to this process.

    Raises:
        ValueError: it is sparse.
    """
    grad = p.grad
    assert grad is not None, "callers choose parameters that have a gradient"
    if grad.layout != torch.strided:
        raise ValueError(f"a gradient has layout {grad.layout}: expected a dense one (sparse=False in nn.Embedding)")
    if is_dtensor(grad) and is_dtensor(p) and grad.placements != p.placements:
        grad = grad.redistribute(placements=p.placements)
    return local(grad)


def shard_dimension(p: "DTensor") -> int | None:
    """The dimension of the mesh over which a DTensor is sharded, the first if there are several; None for none."""
    return next((i for i, placement in enumerate(p.placements) if not placement.is_replicate()), None)


def replicas_of(p: Tensor) -> list[list[int]] | None:
    """The processes of each group over which a DTensor is sharded; None if its mesh does not have all processes."""
    assert is_dtensor(p), "callers choose DTensors"
    mesh, dimension = p.device_mesh, shard_dimension(p)
    if dimension is None or mesh.size() < torch.distributed.get_world_size():
        return None
    groups: list[list[int]] = mesh.mesh.movedim(dimension, -1).reshape(-1, mesh.size(dimension)).tolist()
    return groups


def refuse_flat(name: str, p: Tensor) -> None:
    """Refuse a parameter that is several in one.

    Raises:
        OptionError: torch marks it as one into which FullyShardedDataParallel (FSDP1) flattens those of a module.
    """
    if getattr(p, "_is_flat_param", False):
        raise OptionError(
            f"{name} is a flat parameter of FullyShardedDataParallel (FSDP1): the matrices in it cannot be told apart. "
            "Aurora works with fully_shard (FSDP2), DistributedDataParallel, ZeroRedundancyOptimizer and DeepSpeed's "
            "ZeRO (optimizers.sharded)"
        )


def refuse_placements(name: str, p: Tensor, *, is_matrix: bool, view: View | None = None) -> None:
    """Refuse a DTensor that cannot be stepped. AdamW steps any parts of a parameter; a matrix needs whole rows.

    Raises:
        OptionError: partial sums; a matrix that is not sharded by rows, or over several dimensions of its mesh, or is
            stored as inputs x outputs.
    """
    if not is_dtensor(p):
        return
    if is_matrix and view == "in_out":
        raise OptionError(
            f"{name} is a DTensor that is stored as inputs x outputs (view 'in_out'; GPT-2's Conv1D): fully_shard cuts "
            "its inputs, and a matrix can only be cut by its outputs. Give such weights to AdamW by an override in "
            "routing=Settings(...), or use DistributedDataParallel"
        )
    from torch.distributed.tensor import Shard

    cut = [placement for placement in p.placements if not placement.is_replicate()]
    by_rows = len(cut) <= 1 and all(type(placement) is Shard and placement.dim == 0 for placement in cut)
    if any(placement.is_partial() for placement in p.placements) or (is_matrix and not by_rows):
        raise OptionError(
            f"{name} is a DTensor with the placements {_shown(p)}: matrices may be sharded by rows over one dimension "
            "of the mesh and replicated over the others, as fully_shard does (FSDP2, HSDP). Tensor parallelism, expert "
            "parallelism and other placements are not supported; an override in routing=Settings(...) can give a "
            "parameter to AdamW"
        )


def mesh_of(groups: Iterable[Mapping[str, Any]]) -> "DeviceMesh | None":
    """The mesh of all DTensors of an optimizer; None if it has none.

    Raises:
        OptionError: they are on several meshes.
    """
    first: tuple[str, DTensor] | None = None
    for index, group in enumerate(groups):
        names = group.get("param_names", ())
        for place, p in enumerate(group["params"]):
            if not is_dtensor(p):
                continue
            name = names[place] if len(names) == len(group["params"]) else f"parameter {place} of group {index}"
            first = first or (name, p)
            if p.device_mesh != first[1].device_mesh:
                raise OptionError(
                    f"{name} is on the mesh {p.device_mesh}, {first[0]} on {first[1].device_mesh}: all parameters of "
                    "an optimizer have to be sharded over the same mesh. Expert and tensor parallelism, which use "
                    "others for some, are not supported"
                )
    return None if first is None else first[1].device_mesh


def zeros_for(p: Tensor, shape: torch.Size) -> Tensor:
    """fp32 zeros for the state of a parameter: a DTensor like it, unless the state is a scalar.

    Args:
        p: the parameter.
        shape: of the whole state: that of the parameter, one entry for each of its rows, or a scalar.
    """
    if not shape or not is_dtensor(p):
        return torch.zeros(shape, dtype=torch.float32, device=p.device)
    part = local(p)
    if shape == p.shape:
        return like(p, torch.zeros_like(part, dtype=torch.float32), shape)
    return like(p, torch.zeros(len(part), *shape[1:], dtype=torch.float32, device=part.device), shape)


def like(p: "DTensor", part: Tensor, shape: torch.Size) -> "DTensor":
    """The DTensor of this shape, placed as `p` is, whose local part is this."""
    from torch.distributed.tensor import DTensor

    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=shape, stride=stride)


def placed(p: Tensor, key: str, value: Tensor) -> Tensor:
    """Saved state in the place of its parameter: a whole tensor is cut as the parameter is, without communication. The
    local part of a DTensor is contiguous, so that a step can write into views of it.

    Raises:
        ValueError: it is a DTensor and the parameter is not, or is on another mesh.
    """
    if is_dtensor(value) and not is_dtensor(p):
        raise ValueError(
            f"the loaded {key} is a DTensor, its parameter is not: load a full state dict, in which every tensor is "
            "whole (full_state_dict=True of torch.distributed.checkpoint)"
        )
    if not is_dtensor(p) or not value.ndim:
        return value
    if not is_dtensor(value):
        from torch.distributed.tensor import distribute_tensor

        return _contiguous(distribute_tensor(value.detach(), p.device_mesh, p.placements, src_data_rank=None))
    if value.device_mesh != p.device_mesh:
        raise ValueError(f"the loaded {key} is on the mesh {value.device_mesh}, its parameter on {p.device_mesh}")
    return _contiguous(value.redistribute(placements=p.placements))


def _contiguous(value: "DTensor") -> "DTensor":
    part = local(value)
    return value if part.is_contiguous() else like(value, part.contiguous(), value.shape)


def follow(groups: Iterable[dict[str, Any]], state: dict[Tensor, Any], model: nn.Module) -> None:
    """Put DTensors that have replaced parameters of the model since into the groups, and move the state to them.

    fully_shard exchanges the parameters of a model for DTensors of the same names and shapes. Anything else that
    replaces a parameter may mean something else, so it is left alone.
    """
    current = {_bare(name): p for name, p in model.named_parameters(remove_duplicate=False)}
    held = set(current.values())
    for group in groups:
        names, params = group.get("param_names", ()), group["params"]
        if len(names) != len(params):
            continue
        for index, (name, old) in enumerate(zip(names, params, strict=True)):
            new = current.get(_bare(name))
            if not is_dtensor(new) or is_dtensor(old) or old in held or new.shape != old.shape:
                continue
            params[index] = new
            if old in state:
                state[new] = {key: placed(new, key, value) for key, value in state.pop(old).items()}
            # torch.distributed.checkpoint steps a new optimizer once, with gradients of zero that it puts here.
            if old.grad is not None and new.grad is None:
                new.grad, old.grad = placed(new, "gradient", old.grad), None


def _bare(name: str) -> str:
    for part in WRAPPER_NAMES:
        name = name.replace(part, "")
    return name


def _shown(p: "DTensor") -> str:
    names = p.device_mesh.mesh_dim_names or range(p.device_mesh.ndim)
    return ", ".join(f"{placement} over {name!r}" for placement, name in zip(p.placements, names, strict=True))
