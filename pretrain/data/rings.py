"""The rings of a stream: where each source is, and the items of its lanes that no batch has taken yet."""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

from pretrain.data.mixture import Schedule
from pretrain.data.order import Ring
from pretrain.data.packing import PackedSequence
from pretrain.data.state import LaneState, SourceCounts, SourceState
from pretrain.data.workers import Reader


@dataclass
class RingPosition:
    """Where a ring is: all of its state but the cursors of the lanes. The same on every rank."""

    ring: Ring
    epoch: int
    turns: deque[int]
    """The lanes that have not left the ring in this epoch, beginning with the next one."""
    sequences: int
    tokens: int
    documents: int
    text_bytes: int
    bad_rows: int
    cut_documents: int
    of_sources: tuple[SourceCounts, ...] | None
    """Of each of its sources, in the order of the config, if it has several; None if a state without them was resumed.
    """
    whole_epoch: bool
    """Whether this epoch is read from its beginning; not after a resume."""
    epoch_sequences: int = 0
    """Sequences of this epoch since its beginning or the resume."""

    @classmethod
    def of(cls, ring: Ring, saved: SourceState, *, resumed: bool) -> Self:
        """Restore the position of a ring."""
        left = set(saved["left"])
        turns = deque(lane for number, lane in enumerate(ring.lanes) if number not in left)
        while turns and turns[0] != ring.lanes[saved["next_lane"]]:
            turns.rotate(-1)
        return cls(
            ring,
            saved["epoch"],
            turns if saved["epoch"] != ring.epochs else deque(),
            sequences=saved["sequences"],
            tokens=saved["tokens"],
            documents=saved["documents"],
            text_bytes=saved["text_bytes"],
            bad_rows=saved["bad_rows"],
            cut_documents=saved.get("cut_documents", 0),
            of_sources=tuple(saved["of_sources"]) if "of_sources" in saved else None,
            whole_epoch=not resumed,
        )

    def state(self, lanes: list[LaneState]) -> SourceState:
        """Return what is saved, with the positions of its lanes."""
        first = self.ring.lanes.start
        state = SourceState(
            epoch=self.epoch,
            next_lane=self.turns[0] - first if self.turns else 0,
            left=[lane - first for lane in self.ring.lanes if lane not in set(self.turns)],
            lanes=lanes,
            sequences=self.sequences,
            tokens=self.tokens,
            documents=self.documents,
            text_bytes=self.text_bytes,
            bad_rows=self.bad_rows,
        )
        if self.cut_documents:
            state["cut_documents"] = self.cut_documents
        if self.of_sources is not None:
            state["of_sources"] = list(self.of_sources)
        return state

    def copy(self) -> Self:
        """Return an independent position."""
        return replace(self, turns=self.turns.copy())

    @property
    def ended(self) -> bool:
        """Whether the last epoch is over."""
        return self.epoch == self.ring.epochs

    def begin_epoch(self) -> None:
        """Let all lanes return for the next epoch, unless it was the last one."""
        self.epoch += 1
        self.whole_epoch, self.epoch_sequences = True, 0
        self.turns.extend(() if self.ended else self.ring.lanes)

    def count(
        self, sequences: int, tokens: int, text_bytes: int, documents: int, bad_rows: int, cut_documents: int
    ) -> None:
        """Count the sequences of a batch."""
        self.sequences += sequences
        self.tokens += tokens
        self.text_bytes += text_bytes
        self.documents += documents
        self.bad_rows += bad_rows
        self.cut_documents += cut_documents

    def count_parts(self, parts: Sequence[Sequence[int]]) -> None:
        """Count the tokens, documents and bytes of each source, by its index in the config."""
        if self.of_sources is not None:
            more = (parts[source] for source in self.ring.units)
            self.of_sources = tuple(
                SourceCounts(
                    tokens=before["tokens"] + tokens,
                    documents=before["documents"] + documents,
                    text_bytes=before["text_bytes"] + text_bytes,
                )
                for before, (tokens, documents, text_bytes) in zip(self.of_sources, more, strict=True)
            )

    def deal(self, count: int, ready: Sequence[int], wanted: Mapping[int, int], dealt: list[int]) -> list[int]:
        """Deal at most `count` rows to the lanes whose turn it is; see `take_turns`."""
        rows: list[int] = []
        while len(rows) < count and self.turns:
            if count - len(rows) >= len(self.turns):
                rounds = min(ready[lane] - dealt[lane] for lane in self.turns)
                if rounds := min(rounds, (count - len(rows)) // len(self.turns)):
                    rows += [*self.turns] * rounds
                    for lane in self.turns:
                        dealt[lane] += rounds
                    continue
            lane = self.turns[0]
            if dealt[lane] < ready[lane]:
                rows.append(lane)
                dealt[lane] += 1
                self.turns.rotate(-1)
            elif ready[lane] < wanted.get(lane, 0):
                self.turns.popleft()  # its epoch is over
            else:
                break
        self.epoch_sequences += len(rows)
        return rows


class RingQueues:
    """The items of a reader's lanes of one ring that it has yielded and no batch has taken yet, by lane."""

    def __init__(self, reader: Reader, ring: int, lanes: Sequence[int]) -> None:
        self.ring = ring
        self._items = reader.items(ring)
        self.documents = 0
        """Documents of this epoch, over the lanes that have reached its end."""
        self.ready: dict[int, deque[PackedSequence]] = {lane: deque() for lane in lanes}
        """The sequences of each lane that no batch has taken yet."""
        self._ended: set[int] = set()

    def look_ahead(self, lane: int, wanted: int) -> int:
        """Return how many sequences of the epoch a lane has, at most `wanted`."""
        own, ready, ended = self.ready[lane], self.ready, self._ended
        while len(own) < wanted and lane not in ended:
            item = next(self._items)
            if isinstance(item, PackedSequence):
                ready[item.lane].append(item)
            else:
                ended.add(item.lane)
                self.documents += item.documents
        return min(wanted, len(own))

    def begin_epoch(self) -> None:
        """Expect sequences from all lanes again."""
        self._ended.clear()
        self.documents = 0


def take_turns(
    schedule: Schedule,
    rings: Sequence[RingPosition],
    ready: Sequence[int],
    wanted: Mapping[int, int],
    dealt: list[int],
    missing: int,
) -> list[int]:
    """Deal at most `missing` rows to the lanes whose turn it is; return the lane of each row.

    Advances `schedule`, `rings` and `dealt`. Stops early where a source's epoch is over, and at a lane whose next
    sequences are not known yet: those that are ready were not all that it has.

    Args:
        schedule: says which ring each row comes from.
        rings: the rings.
        ready: sequences of each lane for this batch that are known to exist.
        wanted: how many were asked for; a lane with fewer has no others in this epoch.
        dealt: rows of this batch that each lane has been dealt.
        missing: rows that the batch still lacks.

    """
    rows: list[int] = []
    while len(rows) < missing and (run := schedule.next_run(missing - len(rows))) is not None:
        source, count = run
        given = rings[source].deal(count, ready, wanted, dealt)
        schedule.take(source, len(given))
        rows += given
        if len(given) < count:
            break
    return rows
