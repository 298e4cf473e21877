"""Bring fragments of matrices to the ranks that work on them, and back.

The work is divided into *rounds* of equally shaped parts, as many per rank as a bucket holds. A round is one uneven
all-to-all there and one back: what a rank holds of its own parts is copied, everything else travels in the wire dtype.
Every value is rounded to the wire dtype whether it travels or not, so the result does not depend on who owns what.
Every rank takes part in every round, even if it holds nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..blocks import BUCKET_ELEMENTS, Rectangle
from .owners import Plan, rectangles

WireDtype = Literal["bf16", "fp32"]
WIRE_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Run(NamedTuple):
    """Elements [low, high) of a flattened unit, at `offset` of this rank's shard."""

    unit: int
    low: int
    high: int
    offset: int

    def of(self, shard: Tensor) -> Tensor:
        """Its view of the shard, or of a tensor of the same length."""
        return shard[self.offset : self.offset + self.high - self.low]


class Part(NamedTuple):
    """What this rank works on: a unit, or its part of one."""

    unit: int
    area: Rectangle


class Link(NamedTuple):
    """A rectangle in a run and in a part, by their places in the round's lists; -1 if one is on the other rank."""

    run: int
    part: int
    area: Rectangle


@dataclass
class Round:
    """What one rank does in a round."""

    units: Sequence[int] = ()
    """Of the round, on all ranks."""
    runs: list[Run] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    local: list[Link] = field(default_factory=list)
    outward: dict[int, list[Link]] = field(default_factory=lambda: defaultdict(list))
    """By rank: pieces of this rank's runs in that rank's parts."""
    inward: dict[int, list[Link]] = field(default_factory=lambda: defaultdict(list))
    """By rank: pieces of that rank's runs in this rank's parts."""


def make_rounds(
    plan: Plan, rank: int, bucket_elements: int = BUCKET_ELEMENTS, names: Collection[str] | None = None
) -> list[Round]:
    """The rounds of one rank, for the parameters of these names or for all. All ranks have equally many, with the same
    units."""
    return [_round(plan, indices, rank) for indices in schedule(plan, bucket_elements, names)]


def schedule(
    plan: Plan, bucket_elements: int = BUCKET_ELEMENTS, names: Collection[str] | None = None
) -> Iterator[list[int]]:
    """Units of one shape and team size, up to a bucket for every rank. A rank works in one team at a time."""
    alike: dict[tuple[tuple[int, int], int], list[int]] = defaultdict(list)
    for index, (unit, team) in enumerate(zip(plan.units, plan.teams, strict=True)):
        if names is None or unit.name in names:
            alike[unit.shape, len(team)].append(index)
    for (shape, size), indices in alike.items():
        most = 1 if size > 1 else max(1, bucket_elements // max(1, shape[0] * shape[1]))
        rounds: list[list[int]] = []
        busy: list[dict[int, int]] = []
        for index in indices:
            team = plan.teams[index]
            turn = 0
            while turn < len(rounds) and any(busy[turn].get(rank, 0) >= most for rank in team):
                turn += 1
            if turn == len(rounds):
                rounds.append([])
                busy.append({})
            rounds[turn].append(index)
            for rank in team:
                busy[turn][rank] = busy[turn].get(rank, 0) + 1
        yield from rounds


def _round(plan: Plan, indices: Sequence[int], rank: int) -> Round:
    found = Round(indices)
    for index in indices:
        unit, team = plan.units[index], plan.teams[index]
        areas = {member: unit.part(place, len(team)) for place, member in enumerate(team)}
        if rank in areas:
            found.parts.append(Part(index, areas[rank]))
        for holder, own in enumerate(plan.layout.fragments):
            for fragment in (fragment for fragment in own if fragment.name == unit.name):
                low, high = unit.run(fragment)
                if low >= high:
                    continue
                if holder == rank:
                    first = unit.row * unit.columns + low - fragment.start
                    found.runs.append(Run(index, low, high, fragment.offset + first))
                for member, area in areas.items():
                    pieces = rectangles(low, high, unit.columns, area)
                    if holder == rank == member:
                        found.local += (Link(len(found.runs) - 1, len(found.parts) - 1, piece) for piece in pieces)
                    elif holder == rank:
                        found.outward[member] += (Link(len(found.runs) - 1, -1, piece) for piece in pieces)
                    elif member == rank:
                        found.inward[holder] += (Link(-1, len(found.parts) - 1, piece) for piece in pieces)
    return found


class Transfer(NamedTuple):
    """An all-to-all in progress, with the tensor that it writes to."""

    received: Tensor
    sent: Tensor
    """Kept alive until the end, since the collective reads from it."""
    work: dist.Work | None

    def wait(self) -> Tensor:
        """The received elements, complete for whatever is launched after this call."""
        if self.work is not None:
            self.work.wait()
        return self.received


class Exchange:
    """Moves the values of a round.

    Args:
        plan: who works on what.
        rank: of this process.
        group: the process group over which the layout is cut; None is the default one.
        wire_dtype: in which values travel.
        device: where the shards live.

    Attributes:
        received_bytes: of all collectives so far, counted where they are called.
    """

    def __init__(
        self, plan: Plan, rank: int, group: dist.ProcessGroup | None, wire_dtype: WireDtype, device: torch.device
    ) -> None:
        self.plan, self.rank, self.group, self.device = plan, rank, group, device
        self.world_size = plan.layout.world_size
        self.dtype = WIRE_DTYPES[wire_dtype]
        self.received_bytes = 0

    def gather(self, turn: Round, runs: Iterable[Tensor], dtype: torch.dtype | None = None) -> Gathering:
        """Start to bring the values of the runs to the parts.

        Args:
            turn: the round.
            runs: flat, by run.
            dtype: of the wire, if not the usual one.
        """
        dtype = dtype or self.dtype
        rounded = [run.to(dtype) for run in runs]

        def piece(link: Link) -> Tensor:
            return self._in_run(turn.runs[link.run], rounded[link.run], link.area)

        sent = [[piece(link) for link in turn.outward.get(rank, ())] for rank in range(self.world_size)]
        transfer = self._send(sent, _sizes(turn.inward, self.world_size), dtype)
        shape = (len(turn.parts), *(turn.parts[0].area.shape if turn.parts else (0, 0)))
        stack = torch.empty(shape, dtype=dtype, device=self.device)
        for link in turn.local:
            _in_part(turn.parts[link.part], stack[link.part], link.area).copy_(piece(link))
        return Gathering(turn, stack, transfer)

    def scatter(self, turn: Round, stack: Tensor) -> Scattering:
        """Start to bring values [parts, ...] of the parts back to the runs."""
        rounded = stack.to(self.dtype)

        def piece(link: Link) -> Tensor:
            return _in_part(turn.parts[link.part], rounded[link.part], link.area)

        sent = [[piece(link) for link in turn.inward.get(rank, ())] for rank in range(self.world_size)]
        transfer = self._send(sent, _sizes(turn.outward, self.world_size), self.dtype)
        runs = [torch.empty(run.high - run.low, dtype=self.dtype, device=self.device) for run in turn.runs]
        for link in turn.local:
            self._in_run(turn.runs[link.run], runs[link.run], link.area).copy_(piece(link))
        return Scattering(self, turn, runs, transfer)

    def _in_run(self, run: Run, values: Tensor, area: Rectangle) -> Tensor:
        """The view of a rectangle in the values of a run."""
        columns = self.plan.units[run.unit].columns
        first = area.row * columns + area.column - run.low
        return values.as_strided(area.shape, (columns, 1), values.storage_offset() + first)

    def _send(self, sent: Sequence[Sequence[Tensor]], received: list[int], dtype: torch.dtype) -> Transfer:
        flat = [piece.reshape(-1) for pieces in sent for piece in pieces]
        outgoing = torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=self.device)
        incoming = torch.empty(sum(received), dtype=dtype, device=self.device)
        if self.world_size == 1:
            return Transfer(incoming, outgoing, None)
        self.received_bytes += incoming.numel() * incoming.element_size()
        sizes = [sum(piece.numel() for piece in pieces) for pieces in sent]
        work = dist.all_to_all_single(incoming, outgoing, received, sizes, group=self.group, async_op=True)
        return Transfer(incoming, outgoing, work)


class Gathering(NamedTuple):
    """Values on their way to the parts."""

    turn: Round
    stack: Tensor
    transfer: Transfer

    def wait(self) -> Tensor:
        """The parts, [parts, rows, columns] fp32."""
        received, at = self.transfer.wait(), 0
        for _, links in sorted(self.turn.inward.items()):
            for link in links:
                values = received[at : at + link.area.elements].view(link.area.shape)
                _in_part(self.turn.parts[link.part], self.stack[link.part], link.area).copy_(values)
                at += link.area.elements
        return self.stack.float()


class Scattering(NamedTuple):
    """Values on their way back to the runs."""

    exchange: Exchange
    turn: Round
    runs: list[Tensor]
    transfer: Transfer

    def wait(self) -> list[Tensor]:
        """The runs, flat fp32."""
        received, at = self.transfer.wait(), 0
        for _, links in sorted(self.turn.outward.items()):
            for link in links:
                values = received[at : at + link.area.elements].view(link.area.shape)
                self.exchange._in_run(self.turn.runs[link.run], self.runs[link.run], link.area).copy_(values)
                at += link.area.elements
        return [run.float() for run in self.runs]


def _in_part(part: Part, values: Tensor, area: Rectangle) -> Tensor:
    """The view of a rectangle in the values of a part."""
    row, column = part.area.row, part.area.column
    return values[area.row - row : area.row_stop - row, area.column - column : area.column_stop - column]


def _sizes(links: Mapping[int, Sequence[Link]], world_size: int) -> list[int]:
    """Elements by rank."""
    return [sum(link.area.elements for link in links.get(rank, ())) for rank in range(world_size)]
