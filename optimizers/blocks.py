"""The matrices of a matrix group: whole weights, blocks of rows of fused ones, and weights that are stored otherwise.

A fused q/k/v projection is three matrices, and each attention head may need a direction of its own. Then the singular
values of each block count, and the block is what is tall or wide. `row_blocks` of a group says so, with one entry per
parameter. `views` says, also with one entry per parameter, how a matrix of outputs x inputs lies in its parameter if it
is not simply that. Blocks are views; the state keeps the shape of the parameter.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from .fields import OptionError

BUCKET_ELEMENTS = 2**24
"""The most elements of a stack of equal shapes (a single matrix may be larger). Besides weights, gradients and state, a
step needs six fp32 tensors of this size (64 MiB each) for matrices four times as tall as wide, eight for square ones,
and up to ten for riemannian_aurora, however many weights the model has."""
CPU_BUCKET_ELEMENTS = 2**22
"""The same where parameters are on a CPU. Its allocator keeps no tensor above 32 MiB for the next one, and to get fresh
memory takes several times as long as to fill it: a step of Aurora over many small matrices took a third longer."""

View = Literal["in_out", "stack", "flat"]
"""How the matrices of a parameter lie in it: "in_out", one matrix, stored as inputs x outputs (transformers' Conv1D);
"stack", [experts, outputs, inputs], a matrix for each expert; "flat", [outputs, ...], one matrix whose columns are all
other dimensions (a convolution)."""


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
    """Rows [start, stop) of a matrix of a parameter, or elements [start, stop) of a flat shard.

    Its *piece* is what it covers of the parameter, and of every tensor of the parameter's shape, in the parameter's own
    dimensions. Everything elementwise works on pieces; `matrix` and `piece` change to outputs x inputs and back.
    """

    param: Tensor
    start: int
    stop: int
    view: View | None = None
    index: int = 0
    """Which matrix of a "stack"."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix: outputs and inputs."""
        return self.stop - self.start, columns(self.param.shape, self.view)

    @property
    def area(self) -> Rectangle:
        """All columns of its rows."""
        return Rectangle(self.start, self.stop, 0, self.shape[1])

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of a tensor of the parameter's shape, as a view."""
        if self.view == "in_out":
            return tensor[:, self.start : self.stop]
        return self.rows_of(tensor)

    def rows_of(self, tensor: Tensor) -> Tensor:
        """The view of a tensor with one entry for each row of the parameter's matrices, as `row_shape`."""
        return (tensor[self.index] if self.view == "stack" else tensor)[self.start : self.stop]

    def matrix(self, piece: Tensor) -> Tensor:
        """A piece as [rows, columns]."""
        if self.view == "in_out":
            return piece.mT
        return piece.flatten(1) if self.view == "flat" else piece

    def piece(self, matrix: Tensor) -> Tensor:
        """[rows, columns] in the dimensions of the piece."""
        if self.view == "in_out":
            return matrix.mT
        return matrix.unflatten(1, self.param.shape[1:]) if self.view == "flat" else matrix


def row_shape(shape: Sequence[int], view: View | None) -> tuple[int, ...]:
    """The dimensions of a parameter that count rows: the matrices of a stack, then the rows of each matrix."""
    if view == "in_out":
        return (shape[1],)
    return (shape[0], shape[1]) if view == "stack" else (shape[0],)


def columns(shape: Sequence[int], view: View | None) -> int:
    """The columns of each matrix of a parameter of this shape."""
    if view == "in_out":
        return shape[0]
    return prod(shape[1:]) if view == "flat" else shape[-1]


def views(group: Mapping[str, Any]) -> list[View | None]:
    """The entry of every parameter of a group: how its matrices lie in it, None for outputs x inputs.

    Raises:
        OptionError: not one entry per parameter, or an unknown one.
    """
    params, given = group["params"], group.get("views")
    if given is None:
        return [None] * len(params)
    if isinstance(given, str) or not isinstance(given, Sequence) or len(given) != len(params):
        raise OptionError(
            f"views is {given!r}: expected one entry for each of the {len(params)} parameters of the group, "
            f"None or one of {', '.join(get_args(View))}"
        )
    for view in given:
        if view is not None and view not in get_args(View):
            raise OptionError(f"views has {view!r}: expected None or one of {', '.join(get_args(View))}")
    return list(given)


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
    for p, entry, view in zip(params, entries, views(group), strict=True):
        rows = row_shape(p.shape, view)[-1]
        if entry is not None and (sum(entry) != rows or any(height < 1 for height in entry)):
            raise OptionError(
                f"row_blocks {entry} of a parameter of shape {tuple(p.shape)}: expected rows that sum to {rows}"
            )
    return entries


def entry_of(p: Tensor, group: Mapping[str, Any]) -> tuple[tuple[int, ...] | None, View | None]:
    """The entries of one parameter of a group, as in `row_blocks` and `views`."""
    if group.get("row_blocks") is None and group.get("views") is None:
        return None, None
    entries = zip(group["params"], row_blocks(group), views(group), strict=True)
    return next((entry, view) for other, entry, view in entries if other is p)


def singly(group: Mapping[str, Any]) -> Iterator[tuple[Tensor, Mapping[str, Any]]]:
    """Every parameter of a group, with the group that has no other. The entries of the group are checked once."""
    if group.get("row_blocks") is None and group.get("views") is None:
        yield from ((p, group) for p in group["params"])
        return
    for p, entry, view in zip(group["params"], row_blocks(group), views(group), strict=True):
        yield p, {**group, "params": [p], "row_blocks": [entry], "views": [view]}


def blocks(p: Tensor, entry: tuple[int, ...] | None, view: View | None = None) -> Iterator[Block]:
    """The blocks of one parameter; a stack has those of each of its matrices."""
    *stacked, rows = row_shape(p.shape, view)
    for index in range(*stacked) if stacked else (0,):
        start = 0
        for height in entry or (rows,):
            yield Block(p, start, start + height, view, index)
            start += height


def bucket_elements(device_type: str) -> int:
    """The most elements of a stack on a device of this type, such as "cuda"."""
    return min(BUCKET_ELEMENTS, CPU_BUCKET_ELEMENTS) if device_type == "cpu" else BUCKET_ELEMENTS


def buckets(members: Iterable[Block]) -> Iterator[list[Block]]:
    """Lists of blocks with the same shape and device, in the order given, each as large as the device's bucket."""
    alike: dict[tuple[tuple[int, int], torch.device], list[Block]] = defaultdict(list)
    for block in members:
        alike[block.shape, block.param.device].append(block)
    for (shape, device), equal in alike.items():
        size = max(1, bucket_elements(device.type) // max(1, shape[0] * shape[1]))
        for start in range(0, len(equal), size):
            yield equal[start : start + size]
