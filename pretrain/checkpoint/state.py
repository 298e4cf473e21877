"""Conversion between the model and optimizer of one process and checkpoint fragments.

An engine either keeps whole parameters on every rank or shards them (`Engine.held`). A checkpoint treats both the same
way: it stores contiguous runs of elements of named tensors, and this process holds some of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from optimizers import Aurora
from optimizers.directions import ROW_SLOTS
from optimizers.dtensors import is_dtensor, local
from optimizers.sharded import Held, ShardedMatrices
from pretrain.checkpoint.format import TELEMETRY_SLOT, CheckpointError, Fragment
from pretrain.checkpoint.store import CheckpointReader


def fragments(model: nn.Module, optimizer: Aurora, held: Held | None = None) -> Iterator[Fragment]:
    """Yield the weights and optimizer state that this process holds, as checkpoint fragments.

    `values` are the tensors themselves, not copies: loading writes into them. `held` is that of the engine; None means
    that every rank holds whole parameters.
    """
    return _whole(model, optimizer) if held is None else _cut(held, optimizer)


def _whole(model: nn.Module, optimizer: Aurora) -> Iterator[Fragment]:
    """Yield every tensor as one fragment; weights are those that the optimizer steps, possibly fp32 copies."""
    stepped = set()
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            stepped.add(name)
            for slot, values in {"weight": p.detach(), **optimizer.state_of(p, group)}.items():
                yield Fragment(name, slot, tuple(values.shape), 0, values)
    for name, parameter in model.named_parameters():
        if name not in stepped:  # frozen
            yield Fragment(name, "weight", tuple(parameter.shape), 0, parameter.detach())


def _cut(held: Held, optimizer: Aurora) -> Iterator[Fragment]:
    for f in held.layout.fragments[held.rank]:
        shard, shape = held.shards[f.shard], held.layout.shapes[f.name]
        state = optimizer.state_of(shard, optimizer.param_groups[held.group_of(f.shard)])
        for slot, values in {"weight": shard.detach(), **state}.items():
            if slot == "step":
                if f.start == 0:
                    yield Fragment(f.name, slot, (), 0, values)
            elif slot not in ROW_SLOTS:
                flat = local(values).reshape(-1)
                yield Fragment(f.name, slot, shape, f.start, flat[f.offset : f.offset + f.length])
            elif is_dtensor(values):  # placed as the rows of its parameter are
                per_row = prod(values.shape[1:])
                start = f.start // prod(shape[1:]) * per_row
                yield Fragment(f.name, slot, tuple(values.shape), start, local(values).reshape(-1))
    yield from _row_states(held, optimizer)


def _row_states(held: Held, optimizer: Aurora) -> Iterator[Fragment]:
    """Yield what is kept for each row of a matrix, which under ZeRO is held by its owner, not with its elements."""
    sharded = optimizer.matrices
    if not isinstance(sharded, ShardedMatrices):
        return  # the optimizer has only AdamW groups, or DTensors
    group = optimizer.param_groups[sharded.shard]
    slot, at = sharded.row_slot(group), 0
    if slot is None:
        return
    values = optimizer.state_of(held.shards[sharded.shard], group)[slot]
    for name, start, stop in sharded.owned_rows(group):
        yield Fragment(name, slot, held.layout.shapes[name][:1], start, values[at : at + stop - start])
        at += stop - start


def group_settings(optimizer: Aurora) -> list[dict[str, Any]]:
    """Return the hyperparameters and `param_names` of each group, without `base_lr`, which the config determines."""
    without = ("params", "base_lr")
    return [{key: value for key, value in group.items() if key not in without} for group in optimizer.param_groups]


@torch.no_grad()
def load_weights(reader: CheckpointReader, model: nn.Module) -> None:
    """Load the weights of a checkpoint into a model that has not been passed to an engine yet.

    Raises:
        CheckpointError: the checkpoint's parameters are not those of the model.
    """
    parameters = dict(model.named_parameters())
    saved = reader.index["parameters"]
    shapes = {name: list(p.shape) for name, p in parameters.items()}
    if shapes != {name: slots["weight"]["shape"] for name, slots in saved.items()}:
        raise CheckpointError(f"{reader.folder}: its parameters are not those of this model")
    copy_weights(reader.read, model)


@torch.no_grad()
def copy_weights(read: Callable[[str, str], Tensor], model: nn.Module) -> None:
    """Copy the weights that `read` returns for a name and the slot ``weight`` into a model of the same shapes."""
    for name, parameter in model.named_parameters():
        parameter.copy_(read(name, "weight"))


@torch.no_grad()
def load_state(reader: CheckpointReader, model: nn.Module, optimizer: Aurora, held: Held | None = None) -> None:
    """Load the fp32 weights and the optimizer state from a checkpoint, whatever the number of ranks that wrote it.

    Of the hyperparameters only the scheduled learning rate is restored. The others come from the config:
    `pretrain.run.identity` ensures that those which affect the result are unchanged, and the rest may change on resume.

    Raises:
        CheckpointError: the groups or their state do not match this optimizer.
    """
    groups = reader.index["optimizer_groups"]
    if [g["param_names"] for g in groups] != [g["param_names"] for g in optimizer.param_groups]:
        raise CheckpointError(f"{reader.folder}: its optimizer groups are not those of this config")
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group["lr"] = settings["lr"]
    load_tensors(reader, model, optimizer, held)


@torch.no_grad()
def load_tensors(reader: CheckpointReader, model: nn.Module, optimizer: Aurora, held: Held | None = None) -> None:
    """Load the fp32 weights and the optimizer state by the names of the parameters, whatever groups they were in.

    Raises:
        CheckpointError: the state does not match this optimizer.
    """
    saved = reader.index["parameters"]
    known: dict[str, set[str]] = {name: set() for name in saved}
    for fragment in fragments(model, optimizer, held):
        known[fragment.name].add(fragment.slot)
        record = saved[fragment.name].get(fragment.slot)
        if record is None:
            fragment.values.zero_()  # the parameter has not been stepped yet
        elif tuple(record["shape"]) != fragment.shape:
            raise CheckpointError(f"{reader.folder}: {fragment.slot} of {fragment.name} has shape {record['shape']}")
        else:
            values = reader.read(fragment.name, fragment.slot, fragment.start, fragment.values.numel())
            fragment.values.copy_(values.reshape(fragment.values.shape))
    if held is None:
        unknown = {slot for name, slots in saved.items() for slot in slots.keys() - known[name] - {TELEMETRY_SLOT}}
        if unknown:
            raise CheckpointError(
                f"{reader.folder}: {', '.join(sorted(unknown))}: not part of the state of this optimizer"
            )
    else:
        _load_steps(reader, held, optimizer)


def _load_steps(reader: CheckpointReader, held: Held, optimizer: Aurora) -> None:
    """Load the step count of each shard: one for all its parameters, even if none of them starts in it."""
    names: list[set[str]] = [set() for _ in held.shards]
    for fragment in itertools.chain(*held.layout.fragments):
        names[fragment.shard].add(fragment.name)
    for shard, (tensor, within) in enumerate(zip(held.shards, names, strict=True)):
        saved = {name: reader.index["parameters"][name] for name in within}
        steps = {reader.read(name, "step").item() if "step" in slots else 0.0 for name, slots in saved.items()}
        if len(steps) > 1:
            raise CheckpointError(
                f"{reader.folder}: parameters of one group have different step counts {sorted(steps)}; "
                "a sharded group needs the same count for all"
            )
        optimizer.state_of(tensor, optimizer.param_groups[held.group_of(shard)])["step"].fill_(steps.pop())
