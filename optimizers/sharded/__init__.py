"""Aurora on parameters that an engine has flattened and cut between processes.

    layout = flat_layout(groups, world_size)     # or read from an engine: optimizers.sharded.engines
    shard(optimizer, layout, rank)               # its groups hold this rank's flat shards

`layout` says where every element lies, `owners` who computes what, and `exchange` moves fragments. `matrices` is the
holder of these matrices for `optimizers.matrices`, whose step is the same as for whole ones. `teams` splits one matrix
between several ranks.
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
"""Sizes of teams that share a matrix. All members repeat the work on its short side, so larger teams gain nothing."""


def plan_group(layout: Layout, group: Mapping[str, Any], *, device: torch.device | str = "cpu") -> Plan:
    """The plan of a matrix group.

    Args:
        layout: of the whole optimizer.
        group: with `param_names`, its options, and `row_blocks` if any parameter is split.
        device: where the directions will run.

    Raises:
        LayoutError: a parameter of the group is not stored as outputs x inputs.
    """
    for name, view in zip(group["param_names"], group.get("views") or (), strict=False):
        if view is not None:
            raise LayoutError(
                f"{name} has the view {view!r}: only matrices that are stored as outputs x inputs can be cut between "
                "ranks. Give it to AdamW by an override"
            )
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
    """Tell an optimizer which matrices its shards are made of; a collective call of all ranks.

    Args:
        optimizer: with named groups. When it steps, each group holds this rank's flat fp32 shard.
        layout: of all its groups.
        rank: of this process in `group`.
        group: the process group over which the layout is cut; None is the default one.
        wire_dtype: in which momenta and steps travel between the ranks.
        device: where the shards live.
        plan: who works on what; by default that of `plan_group`.

    Returns:
        The holder of the matrices; None if the optimizer has no matrices and needs nothing.

    Raises:
        LayoutError: the layout does not fit the optimizer, or the ranks disagree.
    """
    if any(g["kind"] == "mixed" for g in optimizer.param_groups):
        raise LayoutError(
            "a group has no kind and holds matrices and other parameters: on shards every group has to say which it "
            "holds, as those of optimizers.param_groups do"
        )
    matrices = [g for g in optimizer.param_groups if g["kind"] == "matrix"]
    if not matrices:
        return None
    if len(matrices) > 1:
        raise LayoutError(
            f"{len(matrices)} matrix groups: all matrices have to be in one group, so that one plan covers them"
        )
    plan = plan or plan_group(layout, matrices[0], device=device)
    sharded = ShardedMatrices(plan, rank, group, wire_dtype, torch.device(device))
    optimizer.bind(sharded)
    return sharded
