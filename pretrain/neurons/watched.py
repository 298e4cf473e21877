"""The MLP matrices that telemetry watches, whole or in fragments of flat shards.

An engine either keeps whole optimizer parameters on every rank or shards them (`Engine.held`). Whole parameters are
treated as the layout of a single rank, rank 0, whose shards are the parameters themselves, so one code path is enough:

* the average b of the clipped gradients is updated elementwise, in the local fragments, before each optimizer step;
* squared norms per neuron, of weights and directions, are summed over the local elements, then over the ranks;
* leverage needs whole matrices: each rank receives the complete averages of some of them, in fp32.

In checkpoints the averages are fragments of the slot ``telemetry_average``, like any other state.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optimizers import Aurora
from optimizers.blocks import Rectangle
from optimizers.dtensors import local
from optimizers.matrices import Place
from optimizers.sharded import DividedMatrices, Held, Layout, make_plan
from optimizers.sharded.exchange import Exchange, make_rounds
from optimizers.sharded.layout import ShardFragment
from optimizers.sharded.owners import Unit
from optimizers.update import blend_
from pretrain.checkpoint.format import TELEMETRY_SLOT, Fragment
from pretrain.checkpoint.store import CheckpointReader
from pretrain.engine.base import Engine
from pretrain.neurons import measures as neurons

MOMENTUM = 0.95
"""Factor of the average of the gradients."""

QUANTITIES = ("leverage", "direction", "weight")


@dataclass(frozen=True)
class Watched:
    """One matrix of an MLP."""

    name: str
    """A short name such as ``layers.0.gate_proj``."""
    parameter: str
    """The name of the parameter in the model."""
    neurons: Literal["rows", "columns"]
    """Whether a neuron is a row or a column."""

    def by_neuron(self, values: Tensor) -> Tensor:
        """Orient a matrix shaped like the parameter so that it has one row per neuron."""
        return values if self.neurons == "rows" else values.mT


def watched_matrices(model: nn.Module) -> list[Watched]:
    """Return the matrices of every MLP (a module with an `up_proj` and a `down_proj`), in the model's order."""
    mlps = [path for path, m in model.named_modules() if hasattr(m, "up_proj") and hasattr(m, "down_proj")]
    found = []
    for index, path in enumerate(mlps):
        for name in ("gate_proj", "up_proj", "down_proj"):
            if hasattr(model.get_submodule(path), name):
                along: Literal["rows", "columns"] = "columns" if name == "down_proj" else "rows"
                found.append(Watched(f"layers.{index}.{name}", f"{path}.{name}.weight", along))
    return found


@dataclass
class Piece:
    """The part of a watched matrix on this rank: a contiguous run of its elements."""

    watched: Watched
    place: ShardFragment
    average: Tensor
    """[place.length] fp32, this part of b."""

    def of(self, shard: Tensor) -> Tensor:
        """Return its elements of the shard, or of any tensor that is placed as the shard is, as a flat view."""
        return local(shard.detach()).reshape(-1)[self.place.offset : self.place.offset + self.place.length]


class WatchedMatrices:
    """The watched matrices of a run on one rank.

    Args:
        model: the model, as prepared by the engine.
        optimizer: the optimizer, whose groups contain the engine's shards.
        engine: the engine, which knows how parameters are sharded.

    Attributes:
        here: whether this rank takes part in measuring: every rank of the first replica if parameters are sharded,
            otherwise only rank 0.
    """

    def __init__(self, model: nn.Module, optimizer: Aurora, engine: Engine) -> None:
        self.optimizer, self.engine = optimizer, engine
        self.watched = watched_matrices(model)
        self._by_parameter = {watched.parameter: watched for watched in self.watched}
        self.here = engine.rank == 0 if engine.held is None else engine.held.replica == 0
        self._held = engine.held or _as_held(optimizer, list(self._by_parameter))
        self._shapes = {name: self._held.layout.shapes[name] for name in self._by_parameter}
        self._pieces = self._make_pieces() if self.here else []
        self._by_shard: dict[Tensor, list[Piece]] = defaultdict(list)
        for piece in self._pieces:
            self._by_shard[self._held.shards[piece.place.shard]].append(piece)
        self._directions: dict[str, Tensor] = {}
        self._divided = optimizer.matrices if isinstance(optimizer.matrices, DividedMatrices) else None

    def _make_pieces(self) -> list[Piece]:
        held, found = self._held, []
        for place in held.layout.fragments[held.rank]:
            if place.name in self._by_parameter:
                average = torch.zeros(place.length, dtype=torch.float32, device=held.shards[place.shard].device)
                found.append(Piece(self._by_parameter[place.name], place, average))
        return found

    @torch.no_grad()
    def move_averages(self, shard: Tensor, finite: Tensor) -> None:
        """Update the averages with the gradients of a shard; called as `Aurora.gradient_observer`."""
        for piece in self._by_shard.get(shard, ()):
            assert shard.grad is not None, "the optimizer steps what has a gradient"
            blend_(piece.average, piece.of(shard.grad), MOMENTUM, False, finite)

    def watch_directions(self, on: bool) -> None:
        """Start or stop recording the optimizer's directions, and drop those recorded so far."""
        self._directions = {}
        self.optimizer.direction_observer = self._take_direction if on and (self.here or self._divided) else None

    def _take_direction(self, place: Place, direction: Tensor) -> None:
        watched = self._by_parameter.get(place.name)
        if watched is not None:
            total = self._directions.setdefault(watched.name, self._zeros(watched))
            # Contiguous, because the order of the elements in memory determines how a sum is rounded.
            _add_squares(total, watched, place.area, direction.contiguous())

    def gather_directions(self) -> None:
        """Where ranks with whole parameters divide the matrices, each has seen its own: a collective of all ranks."""
        if self._divided is not None:
            own = [self._directions.get(watched.name, self._zeros(watched)) for watched in self.watched]
            total = torch.cat(own)
            dist.all_reduce(total, group=self._divided.group)
            names = (watched.name for watched in self.watched)
            self._directions = dict(zip(names, total.split([len(values) for values in own]), strict=True))

    @torch.no_grad()
    def measure(self, taken: bool) -> dict[str, Tensor]:
        """Measure every quantity of every matrix; a collective of the ranks with `here`.

        Args:
            taken: whether the last step changed the weights; if it was skipped, its directions are zeros.

        Returns:
            ``<matrix>.<quantity>`` -> [neurons] fp64: ``leverage``, and the squared norms ``direction`` and
            ``weight``. All zeros if the quantity is undefined.
        """
        found = {f"{w.name}.{quantity}": self._zeros(w) for w in self.watched for quantity in QUANTITIES}
        self._add_leverages(found)
        for piece in self._pieces:
            self._add_run(found[f"{piece.watched.name}.weight"], piece, piece.of(self._held.shards[piece.place.shard]))
            direction = self._adamw_direction(piece) if taken else None
            if direction is not None:
                self._add_run(found[f"{piece.watched.name}.direction"], piece, direction)
        for name, squares in self._directions.items() if taken else ():
            found[f"{name}.direction"] += squares
        if self.engine.held is None or not found:
            return found
        total = torch.cat(list(found.values()))
        if self._held.layout.world_size > 1:
            dist.all_reduce(total, group=self._held.process_group)
        return dict(zip(found, total.split([len(values) for values in found.values()]), strict=True))

    def _zeros(self, watched: Watched) -> Tensor:
        rows, columns = self._shapes[watched.parameter]
        count = rows if watched.neurons == "rows" else columns
        return torch.zeros(count, dtype=torch.float64, device=self.engine.device)

    def _add_leverages(self, found: dict[str, Tensor]) -> None:
        """Gather each matrix on one rank, and measure it there."""
        units = []
        for watched in self.watched:
            (rows, columns), count = self._shapes[watched.parameter], len(found[f"{watched.name}.leverage"])
            # All rows of a square polar factor have norm 1, whatever the gradients: there is nothing to measure.
            if count * count > rows * columns:
                units.append(Unit(watched.parameter, 0, rows, columns, rows * columns * min(rows, columns)))
        held = self._held
        plan = make_plan(held.layout, units)
        exchange = Exchange(plan, held.rank, held.process_group, "fp32", self.engine.device)
        averages = {(piece.place.name, piece.place.start): piece.average for piece in self._pieces}
        for turn in make_rounds(plan, held.rank):
            runs = [averages[units[run.unit].name, run.low] for run in turn.runs]
            for part, b in zip(turn.parts, exchange.gather(turn, runs).wait(), strict=True):
                watched = self._by_parameter[units[part.unit].name]
                values = neurons.leverage(watched.by_neuron(b))
                if values is not None:
                    found[f"{watched.name}.leverage"] += values

    def _add_run(self, total: Tensor, piece: Piece, values: Tensor) -> None:
        """Add the squares of a piece's elements to the sums of their neurons."""
        columns, place = self._shapes[piece.place.name][1], piece.place
        row, row_stop = place.start // columns, -(-place.stop // columns)
        lines = torch.zeros((row_stop - row) * columns, dtype=values.dtype, device=values.device)
        lines[place.start - row * columns : place.stop - row * columns] = values
        _add_squares(total, piece.watched, Rectangle(row, row_stop, 0, columns), lines.view(-1, columns))

    def _adamw_direction(self, piece: Piece) -> Tensor | None:
        """Return m_hat / (sqrt(v_hat) + eps) of the last step, fp64; None if AdamW does not train the piece."""
        shard = self._held.shards[piece.place.shard]
        state, group = self.optimizer.state.get(shard), self._group_of(piece)
        if group["kind"] != "adamw" or not state:
            return None
        beta1, beta2 = group["betas"]
        mean = piece.of(state["exp_avg"]).double() / (1 - beta1 ** state["step"].double())
        square = piece.of(state["exp_avg_sq"]).double() / (1 - beta2 ** state["step"].double())
        return mean / (square.sqrt() + group["eps"])

    def _group_of(self, piece: Piece) -> dict[str, Any]:
        return next(group for group in self.optimizer.param_groups if piece.place.name in group["param_names"])

    def fragments(self) -> Iterator[Fragment]:
        """Yield the averages, for a checkpoint."""
        for piece in self._pieces:
            name = piece.place.name
            yield Fragment(name, TELEMETRY_SLOT, self._shapes[name], piece.place.start, piece.average)

    def restore(self, reader: CheckpointReader) -> None:
        """Restore the averages that a checkpoint contains."""
        for piece in self._pieces:
            place = piece.place
            if TELEMETRY_SLOT in reader.index["parameters"][place.name]:
                piece.average.copy_(reader.read(place.name, TELEMETRY_SLOT, place.start, place.length))


def _as_held(optimizer: Aurora, names: list[str]) -> Held:
    """Describe parameters that every rank holds whole as the shards of a single rank.

    The shards are the tensors that the optimizer steps: under ZeRO 0 in bf16, fp32 copies of the model's weights.
    """
    groups = optimizer.param_groups
    stepped = {name: p for g in groups for name, p in zip(g["param_names"], g["params"], strict=True)}
    shapes = {name: tuple(stepped[name].shape) for name in names}
    places = tuple(ShardFragment(name, 0, prod(shape), shard, 0) for shard, (name, shape) in enumerate(shapes.items()))
    layout = Layout(shapes, (places,), tuple(place.length for place in places))
    return Held(layout, 0, [stepped[name] for name in names])


def _add_squares(total: Tensor, watched: Watched, area: Rectangle, values: Tensor) -> None:
    """Add the squares of the values [rows, columns] of a rectangle of a matrix to the sums of its neurons."""
    row, row_stop, column, column_stop = area
    low, high = (row, row_stop) if watched.neurons == "rows" else (column, column_stop)
    total[low:high] += neurons.squared_rows(watched.by_neuron(values))
