"""Aurora on parameters that an engine has flattened and cut between processes.

    layout = flat_layout(groups, world_size)     # or read from DeepSpeed: optimizers.sharded.deepspeed
    shard(optimizer, layout, rank)               # its groups hold this rank's flat shards

`layout` says where every element lies, `plan` who computes what, `exchange` moves fragments, `matrices` makes the step,
`row_sharded` shares one matrix out among several ranks.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from ..aurora import Aurora
from .exchange import WireDtype
from .layout import Held, Layout, LayoutError, chunked_layout, flat_layout, zero_layout
from .matrices import ShardedMatrices
from .owners import Plan, make_plan, units_of
from .teams import part_flops, unshareable

__all__ = [
    "Held",
    "Layout",
    "LayoutError",
    "Plan",
    "ShardedMatrices",
    "chunked_layout",
    "flat_layout",
    "plan_group",
    "shard",
    "zero_layout",
]

TEAM_SIZES = (2, 3, 4, 8, 16)
"""Ranks that may share one matrix. Their work on its short side is the same for each, so larger teams gain nothing."""


def plan_group(layout: Layout, group: Mapping[str, Any], *, device: torch.device | str = "cpu") -> Plan:
    """The plan of a matrix group.

    Args:
        layout: of the whole optimizer.
        group: with `param_names`, its options, and `row_blocks` if any parameter is split.
        device: where the directions will run.
    """
    shapes = {name: layout.shapes[name] for name in group["param_names"]}
    units = units_of(shapes, group, group.get("row_blocks"), device=device)
    part_costs = {}
    if unshareable(group) is None:
        sizes = [size for size in TEAM_SIZES if size <= layout.world_size]
        part_costs = {size: [part_flops(*u.shape, group, size, device=device) for u in units] for size in sizes}
    return make_plan(layout, units, part_costs)


def shard(
    optimizer: Aurora,
    layout: Layout,
    rank: int,
    *,
    group: dist.ProcessGroup | None = None,
    wire_dtype: WireDtype = "bf16",
    device: torch.device | str = "cpu",
    plan: Plan | None = None,
) -> ShardedMatrices | None:
    """Tell an optimizer how its shards make up matrices; a collective of all ranks.

    Args:
        optimizer: with named groups; when it steps, each holds this rank's flat fp32 shard.
        layout: of all its groups.
        rank: this process's, in `group`.
        group: the process group over which the layout is cut; None is the default one.
        wire_dtype: in which momenta and steps travel between the ranks.
        device: where the shards live.
        plan: who works on what, if it is not to be `plan_group`'s.

    Returns:
        What does the work; None if the optimizer has no matrices, and then needs nothing.

    Raises:
        LayoutError: the layout does not fit the optimizer, or the ranks disagree.
    """
    matrices = [g for g in optimizer.param_groups if g["kind"] == "matrix"]
    if not matrices:
        return None
    if len(matrices) > 1:
        raise LayoutError(f"{len(matrices)} matrix groups: all matrices have to be in one, so that all can be planned")
    plan = plan or plan_group(layout, matrices[0], device=device)
    sharded = ShardedMatrices(plan, rank, group, wire_dtype, torch.device(device))
    optimizer.bind(sharded)
    return sharded
