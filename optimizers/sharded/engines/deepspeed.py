"""The layout of a DeepSpeed optimizer, read from fields of it that are not public.

Stages 1 and 2 and the bf16 optimizer leave `_hp_mapping` on each parameter: which part of it lies in this rank's flat
partition, and where. Stage 3 cuts every parameter into one chunk per rank and keeps the place of this rank's chunk in
`grad_position`. DeepSpeed does not promise any of these names. A test reads all of them from the installed release, and
an error names a missing one. DeepSpeed itself is not imported here.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..layout import Held, Layout, Shape, ShardFragment

SUPPORTED = ">=0.19.8,<0.20"
"""The releases whose fields are known."""

FLAT_PARTITIONS = {
    "DeepSpeedZeroOptimizer": "single_partition_of_fp32_groups",
    "BF16_Optimizer": "fp32_groups_flat_partition",
    "DeepSpeedZeroOptimizer_Stage3": "fp32_partitioned_groups_flat",
}
"""Wrapper class -> the field with its flat fp32 partitions, one for each group of the client optimizer."""

Named = Mapping[str, Tensor]


class ContractError(RuntimeError):
    """The installed DeepSpeed lacks a field that the layout is read from."""


def shards(wrapper: object) -> list[Tensor] | None:
    """This rank's flat fp32 partitions by optimizer group; None for a wrapper that keeps parameters whole (stage 0).

    Raises:
        ContractError: a sharding wrapper does not have them.
    """
    field = FLAT_PARTITIONS.get(type(wrapper).__name__)
    return None if field is None else list(_field(wrapper, field))


def read_layout(
    wrapper: object, groups: Sequence[Named], rank: int, world_size: int, group: dist.ProcessGroup | None = None
) -> Held | None:
    """The layout of all ranks and this rank's shards; None if the wrapper keeps parameters whole. Collective.

    Args:
        wrapper: what DeepSpeed made of the optimizer.
        groups: the model's parameters by name, for each group of the client optimizer before it was wrapped.
        rank: of this process.
        world_size: the number of ranks.
        group: their process group, for CPU objects; None is the default one.

    Raises:
        ContractError: a field is missing, or stage 3 split a group.
        LayoutError: the fragments do not cover the parameters.
    """
    flat = shards(wrapper)
    if flat is None:
        return None
    if len(flat) != len(groups):
        raise ContractError(
            f"{type(wrapper).__name__} made {len(flat)} flat groups of {len(groups)} groups: expected one each. Under "
            "stage 3 sub_group_size has to be at least the number of elements of the largest group"
        )
    is_chunked = type(wrapper).__name__ == "DeepSpeedZeroOptimizer_Stage3"
    own: list[ShardFragment] = []
    shapes: dict[str, Shape] = {}
    for shard, named in enumerate(groups):
        for name, p in named.items():
            shapes[name] = tuple(_field(p, "ds_shape")) if is_chunked else tuple(p.shape)
            found = _chunk(wrapper, name, p, rank) if is_chunked else _mapped(name, p, shard)
            own += [found] if found is not None and found.length else []
    everyone: list[Any] = [own] * world_size
    if world_size > 1:
        dist.all_gather_object(everyone, own, group=group)
    layout = Layout(shapes, tuple(map(tuple, everyone)), tuple(tensor.numel() for tensor in flat))
    return Held(layout, rank, flat)


def _mapped(name: str, p: Tensor, shard: int) -> ShardFragment | None:
    mapping = _field(p, "_hp_mapping")
    if mapping is None:
        return None
    inside, flat = _field(mapping, "lp_fragment_address"), _field(mapping, "hp_fragment_address")
    return ShardFragment(name, _field(inside, "start"), _field(inside, "numel"), shard, _field(flat, "start"))


def _chunk(wrapper: Any, name: str, p: Any, rank: int) -> ShardFragment:
    shard, offset, chunk = _field(wrapper, "grad_position")[_field(wrapper, "get_param_id")(p)]
    start = rank * chunk
    return ShardFragment(name, start, max(0, min(chunk, _field(p, "ds_numel") - start)), shard, offset)


def _field(holder: object, name: str) -> Any:
    try:
        return getattr(holder, name)
    except AttributeError:
        raise ContractError(
            f"DeepSpeed's {type(holder).__name__} has no field {name!r}, from which the layout of shards is read: "
            f"install deepspeed{SUPPORTED}"
        ) from None
