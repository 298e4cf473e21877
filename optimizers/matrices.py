"""The step of a matrix group, and how it reaches matrices that may lie on several processes.

A direction needs whole matrices; everything else in a step is elementwise. So a step works with two views of a group:
*pieces*, the runs of elements that this process stores, and *stacks* of equally shaped matrices, or of its parts of
matrices, for which this process finds directions. A holder says what the pieces and stacks are and moves values between
them. `WholeMatrices` is the holder where every parameter is whole; `optimizers.sharded` has those for flat shards
(DeepSpeed's ZeRO), for DTensors (FSDP2), and for parameters that all processes have (DDP). An engine that cuts them in
another way needs another holder and no other step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from . import directions
from .blocks import Block, Rectangle, View, blocks, buckets, entry_of, row_blocks, row_shape, views
from .directions import Direction
from .directions.speedrun import enlarged
from .dtensors import dense_grad, refuse_flat, refuse_placements
from .fields import OptionError
from .polar.rows import HERE, Rows
from .update import blend_, commit_, update_

State = Mapping[Tensor, Mapping[str, Tensor]]
"""The state of each parameter or shard, as in `Optimizer.state`."""


class Place(NamedTuple):
    """Which part of which parameter a matrix of a stack is."""

    name: str
    """The parameter's name in its group's `param_names`; "parameter 3" in a group without names. With the number of the
    matrix, as in "experts[2]", if it is a stack of them."""
    area: Rectangle
    """Rows and columns of the parameter's matrix."""


DirectionObserver = Callable[[Place, Tensor], None]
"""Called with the direction, [rows, columns] fp32, of a part of a parameter."""


class Piece(Protocol):
    """A run of elements of a parameter, or of a shard, that is stored here."""

    @property
    def param(self) -> Tensor:
        """The parameter or shard."""

    def of(self, tensor: Tensor) -> Tensor:
        """The run in a tensor that is laid out as the parameter is: its gradient, its momentum. A view if it can be."""


class Turn(Protocol):
    """A share of a step's work: matrices of one shape, as many as a bucket holds."""

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of each whole matrix, though the stack may hold parts of them."""

    @property
    def pieces(self) -> Sequence[Piece]:
        """The runs of these matrices that are stored here: views of parameters or shards, and of their state."""

    @property
    def places(self) -> Sequence[Place]:
        """What the stack here holds, in its order; none if this process finds no direction in this turn."""


class Arriving(Protocol):
    """Values on their way."""

    def wait(self) -> Any:
        """The values, complete for whatever is launched after this call."""


class Matrices(Protocol):
    """A holder: where the matrices of a group lie, and how their values move.

    All processes that share a group call every method that moves values, in the same order.
    """

    @property
    def device(self) -> torch.device | None:
        """Where the flag and the counts of a step live; None: where the first parameter is."""

    @property
    def is_whole(self) -> bool:
        """Whether the groups hold the parameters themselves, whole or as DTensors. If not, they hold flat shards: one
        step may take several calls of `step`, and a state_dict has only this process's share."""

    @property
    def in_flight(self) -> int:
        """How many turns may be on their way back while the next is computed."""

    def prepare(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Called before each step with all groups: what has a gradient on any process has one on all afterwards."""

    def shares(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Sequence[tuple[Matrices, list[Tensor]]]:
        """The holders that step these parameters of the group, each with its own."""

    def agree(self, finite: Tensor) -> Tensor:
        """Whether `finite` is true on all processes."""

    def total(self, counts: Tensor) -> Tensor:
        """The sum over all processes."""

    def state_shapes(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, torch.Size]:
        """The state of a parameter or shard of a matrix group, by slot."""

    def turns(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Sequence[Turn]:
        """The work of a step of these parameters or shards of the group.

        Raises:
            OptionError: a parameter that this holder cannot step.
        """

    def gather(self, turn: Any, values: Iterable[Tensor]) -> Arriving:
        """Start to bring the values of the pieces, one tensor each, to the stacks: [k, rows, columns] fp32."""

    def scatter(self, turn: Any, stack: Tensor) -> Arriving:
        """Start to bring the values of the stacks back to the pieces: a sequence of fp32 tensors."""

    def fetch_rows(self, turns: Sequence[Any], group: Mapping[str, Any], state: State) -> None:
        """Bring state that has a value for each row to the processes that find directions, before the first turn."""

    def store_rows(self, turns: Sequence[Any], group: Mapping[str, Any], state: State) -> None:
        """Bring it back after the last one."""

    def row_states(self, turn: Any, slot: str, group: Mapping[str, Any], state: State) -> list[Tensor]:
        """For each matrix of the stack the part of a slot with one number for each row that belongs to it, to be
        written to."""

    def weight_norms(self, turns: Sequence[Any]) -> list[Tensor]:
        """For each turn the Frobenius norms of the whole matrices in the stack, [k, 1, 1]."""

    def direction(self, turn: Any, u: Tensor, group: Mapping[str, Any], row_state: Tensor | None) -> Direction:
        """The directions of a stack. Over all processes together, every fallback and retry is counted once."""

    def rows(self, turn: Any) -> Rows:
        """Reductions over the rows of the whole matrices of the stack."""


def matrix_step(
    matrices: Matrices,
    turns: Sequence[Turn],
    state: State,
    group: Mapping[str, Any],
    finite: Tensor,
    observer: DirectionObserver | None = None,
) -> Tensor:
    """Step the parameters or shards of a matrix group, whose gradients are in their `grad`.

    For each turn: blend the momenta, gather them, find the directions, scatter the steps, update the weights. While a
    turn is computed the values of the next one may already be travelling.

    Args:
        matrices: the holder.
        turns: its turns for these parameters or shards.
        state: of each of them, by the holder's `state_shapes`.
        group: complete options.
        finite: bool scalar that all processes agree on; False leaves everything as it is.
        observer: is shown every direction.

    Returns:
        The fallbacks and retries of all directions, over all processes: int64 [2] on the device of `finite`.
    """
    counts = torch.zeros(2, dtype=torch.int64, device=finite.device)
    norms: Sequence[Tensor | None] = matrices.weight_norms(turns) if group["uw_floor"] else [None] * len(turns)

    def start(turn: Turn) -> Arriving:
        return matrices.gather(turn, _blended(turn, state, group, finite))

    matrices.fetch_rows(turns, group, state)
    coming = [start(turn) for turn in turns[:1]]
    returning: deque[tuple[Turn, Arriving]] = deque()
    for index, turn in enumerate(turns):
        u = coming.pop().wait()
        coming = [start(following) for following in turns[index + 1 : index + 2]]
        if len(u):
            u, counted = _stepped(matrices, turn, u, state, group, norms[index], finite, observer)
            counts += counted.to(counts.device)
        returning.append((turn, matrices.scatter(turn, u)))
        del u
        while len(returning) > matrices.in_flight:
            _apply(*returning.popleft(), group, finite)
    while returning:
        _apply(*returning.popleft(), group, finite)
    matrices.store_rows(turns, group, state)
    return matrices.total(counts)


def _blended(turn: Turn, state: State, group: Mapping[str, Any], finite: Tensor) -> Iterator[Tensor]:
    """Moves the momentum of each piece and gives its u."""
    for piece in turn.pieces:
        momentum = piece.of(state[piece.param]["momentum"])
        grad = piece.of(dense_grad(piece.param))
        signed = -grad if group.get("maximize") else grad
        yield blend_(momentum, signed, group["momentum"], group["nesterov"], finite)


def _stepped(
    matrices: Matrices,
    turn: Turn,
    u: Tensor,
    state: State,
    group: Mapping[str, Any],
    norms: Tensor | None,
    finite: Tensor,
    observer: DirectionObserver | None,
) -> tuple[Tensor, Tensor]:
    """The steps of a stack before the learning rate, with the fallbacks and retries of its directions."""
    slot = directions.row_slot(group, *turn.shape)
    kept = matrices.row_states(turn, slot, group, state) if slot else []
    found = matrices.direction(turn, u, group, torch.stack(kept) if kept else None)
    if observer is not None:
        for place, d in zip(turn.places, found.d, strict=True):
            observer(place, d)
    if found.row_state is not None:
        for values, new in zip(kept, found.row_state, strict=True):
            commit_(values, new, finite)
    scale = directions.lr_scale(group["lr_scale"], *turn.shape)
    d = found.d if observer is None else found.d.clone()  # an observer may keep what it was given
    steps = directions.scaled_(d, scale, polar=group["polar"])
    if norms is not None:
        steps = enlarged(steps, group["uw_floor"] * norms, matrices.rows(turn))
    return steps, torch.stack([found.fallbacks.sum(), found.retries.sum()])


def _apply(turn: Turn, returning: Arriving, group: Mapping[str, Any], finite: Tensor) -> None:
    """Updates the pieces of a turn by their steps."""
    decay = {key: group[key] for key in ("lr", "weight_decay", "cautious")}
    for piece, step in zip(turn.pieces, returning.wait(), strict=True):
        update_(piece.of(piece.param), step, finite, **decay)


@dataclass(frozen=True)
class WholeTurn:
    """Equally shaped matrices of one device, each a piece of its own."""

    pieces: list[Block]
    places: list[Place]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.pieces[0].shape


@dataclass(frozen=True)
class Here:
    """Values that have nowhere to go. They are made when they are waited for: one bucket at a time is in memory."""

    values: Callable[[], Any]

    def wait(self) -> Any:
        """The values."""
        return self.values()


class WholeMatrices:
    """The holder of parameters that are whole on this process. Equal shapes are stacked in buckets."""

    device: torch.device | None = None
    is_whole = True
    in_flight = 0

    def prepare(self, groups: Sequence[Mapping[str, Any]]) -> None:
        """Nothing to do."""

    def shares(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> Sequence[tuple[Matrices, list[Tensor]]]:
        """All of them."""
        return [(self, list(params))] if params else []

    def agree(self, finite: Tensor) -> Tensor:
        """There is nobody else."""
        return finite

    def total(self, counts: Tensor) -> Tensor:
        """There is nobody else."""
        return counts

    def state_shapes(self, p: Tensor, group: Mapping[str, Any]) -> dict[str, torch.Size]:
        """`momentum` of the parameter's shape, `step`, and a slot with a number for each row if any block has one."""
        shapes = {"momentum": p.shape, "step": torch.Size()}
        entry, view = entry_of(p, group)
        slots = (directions.row_slot(group, *block.shape) for block in blocks(p, entry, view))
        if (slot := next(filter(None, slots), None)) is not None:
            shapes[slot] = torch.Size(row_shape(p.shape, view))
        return shapes

    def turns(self, params: Sequence[Tensor], group: Mapping[str, Any]) -> list[WholeTurn]:
        """The buckets of these parameters' blocks."""
        places = placed_blocks(params, group)
        return [WholeTurn(bucket, [places[block] for block in bucket]) for bucket in buckets(places)]

    def gather(self, turn: WholeTurn, values: Iterable[Tensor]) -> Here:
        """Stacks them."""

        def stack() -> Tensor:
            if len(turn.pieces) == 1:
                return turn.pieces[0].matrix(next(iter(values))).contiguous().unsqueeze(0)
            device = turn.pieces[0].param.device
            u = torch.empty(len(turn.pieces), *turn.shape, dtype=torch.float32, device=device)
            for matrix, block, value in zip(u, turn.pieces, values, strict=True):
                matrix.copy_(block.matrix(value))
            return u

        return Here(stack)

    def scatter(self, turn: WholeTurn, stack: Tensor) -> Here:
        """The matrices of the stack, in the dimensions of their pieces."""
        return Here(lambda: [block.piece(matrix) for block, matrix in zip(turn.pieces, stack, strict=True)])

    def fetch_rows(self, turns: Sequence[WholeTurn], group: Mapping[str, Any], state: State) -> None:
        """They are here."""

    def store_rows(self, turns: Sequence[WholeTurn], group: Mapping[str, Any], state: State) -> None:
        """They are here."""

    def row_states(self, turn: WholeTurn, slot: str, group: Mapping[str, Any], state: State) -> list[Tensor]:
        """The rows of each block."""
        return [block.rows_of(state[block.param][slot]) for block in turn.pieces]

    def weight_norms(self, turns: Sequence[WholeTurn]) -> list[Tensor]:
        """Of the weights as they are."""

        def norm(block: Block) -> Tensor:
            weight = block.matrix(block.of(block.param))
            return torch.linalg.vector_norm(weight.float(), dim=(-2, -1), keepdim=True)

        return [torch.stack([norm(block) for block in turn.pieces]) for turn in turns]

    def direction(self, turn: WholeTurn, u: Tensor, group: Mapping[str, Any], row_state: Tensor | None) -> Direction:
        """`directions.from_options`."""
        return directions.from_options(u, group, row_state)

    def rows(self, turn: WholeTurn) -> Rows:
        """All rows are here."""
        return HERE


def placed_blocks(params: Sequence[Tensor], group: Mapping[str, Any]) -> dict[Block, Place]:
    """The blocks of some of a group's parameters with their places; none of those without elements. It checks them."""
    check_params(group)
    entries = dict(zip(group["params"], zip(row_blocks(group), views(group), strict=True), strict=True))
    names = dict(zip(group["params"], param_names(group), strict=True))
    found = {}
    for p in (p for p in params if p.numel()):
        for block in blocks(p, *entries[p]):
            name = f"{names[p]}[{block.index}]" if block.view == "stack" else names[p]
            found[block] = Place(name, block.area)
    return found


def param_names(group: Mapping[str, Any]) -> list[str]:
    """The names of a group's parameters, for messages and observers: their positions if it has no names, those of other
    parameters, because they have been joined to flat ones, or one name twice, because it has those of two models."""
    names, count = group.get("param_names", ()), len(group["params"])
    return list(names) if len(set(names)) == len(names) == count else [f"parameter {i}" for i in range(count)]


def check_params(group: Mapping[str, Any]) -> None:
    """Refuse what a group of this kind cannot step.

    Raises:
        OptionError: a complex or integer tensor, a flat parameter of FSDP1, a DTensor that is not sharded by rows, a
            tensor in a matrix group whose dimensions do not fit its view (2-D without one), or row_blocks that do not
            fit.
    """
    is_matrix = group["kind"] == "matrix"
    if not is_matrix and (group.get("row_blocks") is not None or group.get("views") is not None):
        key = "views" if group.get("row_blocks") is None else "row_blocks"
        raise OptionError(f"{key} in a group of kind {group['kind']!r}: only matrices have blocks")
    for name, p, view in zip(param_names(group), group["params"], views(group), strict=True):
        refuse_flat(name, p)
        in_mixed = group["kind"] == "mixed" and p.ndim == 2 and min(p.shape) > 1
        refuse_placements(name, p, is_matrix=is_matrix or in_mixed, view=view)
        if not p.is_floating_point():
            if not p.requires_grad:  # quantised weights that adapters leave alone
                continue
            raise OptionError(f"{name} has dtype {p.dtype}: expected a real floating point tensor")
        if is_matrix and not _fits(view, p.ndim):
            expected = {None: "2-D", "in_out": "2-D", "stack": "3-D", "flat": "at least 3-D"}[view]
            raise OptionError(
                f"{name} of shape {tuple(p.shape)} is in a matrix group: expected {expected}. If it was flattened or "
                "split (by DeepSpeed or FSDP), its direction cannot be found from the pieces; if it is not a matrix, "
                "put it into a group of kind 'adamw' (optimizers.param_groups does)"
            )
    if is_matrix:
        row_blocks(group)


def _fits(view: View | None, ndim: int) -> bool:
    return ndim >= 3 if view == "flat" else ndim == (3 if view == "stack" else 2)
