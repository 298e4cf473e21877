"""Where the elements of every parameter lie when an engine has cut its parameters between ranks.

On each rank, an optimizer group of a ZeRO engine is one flat tensor, its *shard*; with DTensors each parameter is a
shard of its own. A *fragment* is a run of elements of one flattened parameter in a shard. The layout is the table of
all fragments of all ranks. Plans, the exchange and checkpoints read nothing else, so they work equally with a layout
that was read from an engine (see `engines`) and with one that was computed here for any number of ranks.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from math import prod

import torch.distributed as dist
from torch import Tensor

Shape = tuple[int, ...]
Groups = Sequence[Mapping[str, Shape]]
"""The parameters of each optimizer group in order: name -> shape."""

# DeepSpeed pads a flat group to a multiple of this many elements per rank (nccl_start_alignment_factor).
ALIGNMENT = 2


class LayoutError(ValueError):
    """Fragments that do not cover the parameters exactly, or a layout that does not fit."""


@dataclass(frozen=True)
class ShardFragment:
    """A run of elements of one parameter in one shard."""

    name: str
    start: int
    """First element, in the flattened parameter."""
    length: int
    shard: int
    """Index of the tensor that holds it: of the optimizer group, or of the DTensor."""
    offset: int
    """First element, in that tensor."""

    @property
    def stop(self) -> int:
        """One past the last element, in the flattened parameter."""
        return self.start + self.length


@dataclass(frozen=True)
class Layout:
    """All fragments of all ranks.

    Raises:
        LayoutError: fragments overlap, leave a gap, or belong to an unknown parameter.
    """

    shapes: Mapping[str, Shape]
    """The shape of every parameter."""
    fragments: tuple[tuple[ShardFragment, ...], ...]
    """By rank."""
    shard_sizes: tuple[int, ...]
    """Elements of each shard of a rank, including padding; the same on every rank."""

    def __post_init__(self) -> None:
        pieces: dict[str, list[tuple[int, int]]] = {name: [] for name in self.shapes}
        for rank, own in enumerate(self.fragments):
            for fragment in own:
                if fragment.name not in pieces:
                    raise LayoutError(f"rank {rank} holds a fragment of {fragment.name!r}, which is not a parameter")
                pieces[fragment.name].append((fragment.start, fragment.stop))
        for name, shape in self.shapes.items():
            end = 0
            for start, stop in sorted(pieces[name]):
                if start != end:
                    fault = "overlap at" if start < end else "leave a gap before"
                    raise LayoutError(f"the fragments of {name} {fault} element {start} (expected {end})")
                end = stop
            if end != prod(shape):
                raise LayoutError(f"the fragments of {name} cover {end} of its {prod(shape)} elements")

    @property
    def world_size(self) -> int:
        """Ranks."""
        return len(self.fragments)

    def digest(self) -> str:
        """sha256 of the table, for comparing ranks."""
        table = [sorted(self.shapes.items()), [[astuple(f) for f in own] for own in self.fragments], self.shard_sizes]
        return hashlib.sha256(json.dumps(table).encode()).hexdigest()


@dataclass(frozen=True)
class Held:
    """What one process holds of a layout."""

    layout: Layout
    rank: int
    """Of the process among those over which the layout is cut."""
    shards: Sequence[Tensor]
    """Its fp32 tensors that the optimizer steps: a flat one for each optimizer group, or DTensors."""
    groups: Sequence[int] | None = None
    """The optimizer group of each shard; None: they are in the order of the groups."""
    process_group: dist.ProcessGroup | None = None
    """Those over which the layout is cut; None is the default one."""
    replica: int = 0
    """Which of several equal copies of all shards this process has a part of (HSDP)."""

    def group_of(self, shard: int) -> int:
        """The index of the optimizer group of a shard."""
        return shard if self.groups is None else self.groups[shard]


def flat_layout(groups: Groups, world_size: int) -> Layout:
    """The layout of DeepSpeed's stages 1 and 2 and of its bf16 optimizer.

    The parameters of a group are laid end to end, padded at the end, and cut into one equal shard per rank.
    """
    fragments: list[list[ShardFragment]] = [[] for _ in range(world_size)]
    sizes = []
    for shard, parameters in enumerate(groups):
        total = sum(prod(shape) for shape in parameters.values())
        size = -(-total // (ALIGNMENT * world_size)) * ALIGNMENT
        sizes.append(size)
        first = 0
        for name, shape in parameters.items():
            stop = first + prod(shape)
            for rank in range(first // size, -(-stop // size)):
                low, high = max(first, rank * size), min(stop, (rank + 1) * size)
                fragments[rank].append(ShardFragment(name, low - first, high - low, shard, low - rank * size))
            first = stop
    return Layout(_shapes(groups), tuple(map(tuple, fragments)), tuple(sizes))


def chunked_layout(groups: Groups, world_size: int) -> Layout:
    """The layout of DeepSpeed's stage 3: every parameter in one equal chunk per rank; the last may be shorter."""
    fragments: list[list[ShardFragment]] = [[] for _ in range(world_size)]
    sizes = []
    for shard, parameters in enumerate(groups):
        offset = 0
        for name, shape in parameters.items():
            total = prod(shape)
            chunk = -(-total // world_size)
            for rank in range(world_size):
                start = rank * chunk
                if start < total:
                    fragments[rank].append(ShardFragment(name, start, min(chunk, total - start), shard, offset))
            offset += chunk
        sizes.append(offset)
    return Layout(_shapes(groups), tuple(map(tuple, fragments)), tuple(sizes))


def zero_layout(groups: Groups, world_size: int, stage: int) -> Layout:
    """The layout of a ZeRO stage, 1 to 3, as DeepSpeed makes it.

    Raises:
        ValueError: another stage.
    """
    if stage not in (1, 2, 3):
        raise ValueError(f"ZeRO stage {stage} does not shard the optimizer: expected 1, 2 or 3")
    return chunked_layout(groups, world_size) if stage == 3 else flat_layout(groups, world_size)


def _shapes(groups: Groups) -> dict[str, Shape]:
    return {name: tuple(shape) for parameters in groups for name, shape in parameters.items()}
