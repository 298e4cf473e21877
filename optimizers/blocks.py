"""The matrices of a matrix group: whole weights, or blocks of rows of fused ones.

A fused q/k/v projection is three matrices, and each attention head may need a direction of its own. Then the singular
values of each block count, and the block is what is tall or wide. `row_blocks` of a group says so, with one entry per
parameter. Blocks are views; the state keeps the shape of the parameter.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .fields import OptionError

BUCKET_ELEMENTS = 2**24
"""The most elements of a stack of equal shapes (a single matrix may be larger). Besides weights, gradients and state, a
step needs six fp32 tensors of this size (64 MiB each) for matrices four times as tall as wide, eight for square ones,
and up to ten for riemannian_aurora, however many weights the model has."""


class Rectangle(NamedTuple):
    """Rows [row, row_stop) and columns [column, column_stop) of a matrix."""

    row: int
    row_stop: int
    column: int
    column_stop: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.row_stop - self.row, self.column_stop - self.column

    @property
    def elements(self) -> int:
        """How many there are."""
        return (self.row_stop - self.row) * (self.column_stop - self.column)

    def shifted(self, rows: int) -> "Rectangle":
        """The rectangle so many rows further down."""
        return self._replace(row=self.row + rows, row_stop=self.row_stop + rows)


@dataclass(frozen=True)
class Block:
    """Rows [start, stop) of a 2-D parameter, or elements [start, stop) of a flat shard."""

    param: Tensor
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.stop - self.start, self.param.shape[1]

    @property
    def area(self) -> Rectangle:
        """All columns of its rows."""
        return Rectangle(self.start, self.stop, 0, self.param.shape[1])

    def of(self, tensor: Tensor) -> Tensor:
        """The view of a tensor whose first dimension is that of the parameter."""
        return tensor[self.start : self.stop]


def row_blocks(group: Mapping[str, Any]) -> list[tuple[int, ...] | None]:
    """The entry of every parameter of a group: the rows of its blocks, or None for the whole.

    Raises:
        OptionError: not one entry per parameter, or block rows that do not add up to the parameter's.
    """
    params = group["params"]
    given = group.get("row_blocks")
    if given is None:
        return [None] * len(params)
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != len(params):
        raise OptionError(
            f"row_blocks is {given!r}: expected one entry for each of the {len(params)} parameters of the group, "
            "None or the rows of its blocks"
        )
    entries = [None if entry is None else tuple(entry) for entry in given]
    for p, entry in zip(params, entries, strict=True):
        if entry is not None and (sum(entry) != len(p) or any(rows < 1 for rows in entry)):
            raise OptionError(
                f"row_blocks {entry} of a parameter of shape {tuple(p.shape)}: expected rows that sum to {len(p)}"
            )
    return entries


def entry_of(p: Tensor, group: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The entry of one parameter of a group, as in `row_blocks`."""
    if group.get("row_blocks") is None:
        return None
    return next(entry for other, entry in zip(group["params"], row_blocks(group), strict=True) if other is p)


def blocks(p: Tensor, entry: tuple[int, ...] | None) -> Iterator[Block]:
    """The blocks of one parameter."""
    start = 0
    for rows in entry or (len(p),):
        yield Block(p, start, start + rows)
        start += rows


def buckets(members: Iterable[Block]) -> Iterator[list[Block]]:
    """Lists of blocks with the same shape and device, in the order given, up to BUCKET_ELEMENTS elements each."""
    alike: dict[tuple[tuple[int, int], torch.device], list[Block]] = defaultdict(list)
    for block in members:
        alike[block.shape, block.param.device].append(block)
    for (shape, _), equal in alike.items():
        size = max(1, BUCKET_ELEMENTS // max(1, shape[0] * shape[1]))
        for start in range(0, len(equal), size):
            yield equal[start : start + size]
