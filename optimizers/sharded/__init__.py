"""Aurora on parameters that an engine has flattened and cut between processes.

    layout = flat_layout(groups, world_size)     # or read from an engine: optimizers.sharded.engines
    shard(optimizer, layout, rank)               # its groups hold this rank's flat shards

`layout` says where every element lies, `owners` who computes what, and `exchange` moves fragments. `matrices` is the
holder of these matrices for `optimizers.matrices`, whose step is the same as for whole ones. `teams` splits one matrix
between several ranks. `rows` is the holder of parameters that fully_shard (FSDP2) has made DTensors; an optimizer binds
it by itself. `divided` is the holder of whole parameters that all processes have (DistributedDataParallel).
"""

from typing import Any, Protocol

import torch
import torch.distributed as dist

from ..matrices import Matrices
from .divided import DividedMatrices
from .exchange import WireDtype
from .layout import Held, Layout, LayoutError, chunked_layout, flat_layout, zero_layout
from .matrices import ShardedMatrices
from .owners import Plan, make_plan, plan_group
from .rows import DTensorMatrices, chunked_rows, row_layout

__all__ = [
    "DTensorMatrices",
    "DividedMatrices",
    "Held",
    "Layout",
    "LayoutError",
    "Plan",
    "ShardedMatrices",
    "chunked_layout",
    "chunked_rows",
    "flat_layout",
    "make_plan",
    "plan_group",
    "row_layout",
    "shard",
    "zero_layout",
]


class Bindable(Protocol):
    """An optimizer of matrices: Aurora."""

    param_groups: list[dict[str, Any]]

    def bind(self, matrices: Matrices) -> None:
        """From now on the matrix group holds what `matrices` says."""


def shard(
    optimizer: Bindable,
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
