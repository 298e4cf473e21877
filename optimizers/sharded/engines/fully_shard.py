"""The layout of an optimizer of DTensors, read from them: what torch's fully_shard (FSDP2) made of a model."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...dtensors import is_dtensor, shard_dimension
from ..layout import Held, LayoutError
from ..rows import read_rows, row_layout


def read_layout(groups: Sequence[Mapping[str, Any]]) -> Held:
    """The layout of all ranks, in which each parameter is a shard of its own, and this rank's part. Collective.

    Args:
        groups: those of an optimizer, with `param_names`.

    Raises:
        LayoutError: a parameter is not a DTensor, or they are not all sharded by rows over the same dimension of a
            mesh.
    """
    params: dict[str, Tensor] = {}
    numbers = []
    for number, group in enumerate(groups):
        params |= zip(group["param_names"], group["params"], strict=True)
        numbers += [number] * len(group["params"])
    if plain := [name for name, p in params.items() if not is_dtensor(p)]:
        raise LayoutError(f"{len(plain)} parameters are not DTensors, which fully_shard makes of all: {plain[0]}")
    process_group, rank, rows = read_rows(params)
    layout = row_layout({name: tuple(p.shape) for name, p in params.items()}, rows)
    first = next(iter(params.values()))
    assert is_dtensor(first), "all of them are"
    mesh, sharding = first.device_mesh, shard_dimension(first)
    replica = 0
    for dimension in range(mesh.ndim):
        if dimension != sharding:
            replica = replica * mesh.size(dimension) + mesh.get_local_rank(dimension)
    return Held(layout, rank, list(params.values()), numbers, process_group, replica)
