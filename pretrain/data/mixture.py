"""The mixture: which source gives each next sequence, so that the shares of the tokens hold all the time.

The schedule is Tijdeman's (R. Tijdeman, The chairman assignment problem, Discrete Mathematics 32, 1980). Let n sources
have shares that add up to 1. Of the first t sequences, a source with the share s is due st. A source that has given x
sequences

    is eligible for sequence t      if  x <= st - 1/(2n-2), so that it does not run ahead of its share, and
    must have given another one by  the first t with  st - x > 1 - 1/(2n-2), its deadline.

Each sequence goes to the eligible source with the earliest deadline, the first in the config among equals. Then
|st - x| <= 1 - 1/(2n-2) for every source after every sequence: each stays strictly within one sequence of its share.
Taking the source that is furthest behind its share instead misses that bound from five sources on.

Sequences are counted from the last border: the beginning of a stage, or the end of a source. Everything is computed in
whole numbers; no rounding can make two machines disagree.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Self, TypedDict


@dataclass(frozen=True)
class Stage:
    """A part of the stream with constant shares."""

    shares: tuple[Fraction, ...]
    """Of each source, in any unit; 0 if the source is not read in this stage."""
    until_tokens: int | None
    """Where it ends, in tokens of the whole stream, rounded up to a whole sequence; None for the last stage."""


class MixtureState(TypedDict):
    """Position of the schedule. JSON-serialisable."""

    stage: int
    """Index of the current stage."""
    taken: list[int]
    """Sequences of each source since the last border."""


class Schedule:
    """Assigns sequences to sources, one after the other."""

    def __init__(
        self,
        stages: Sequence[Stage],
        sequence_length: int,
        *,
        sequence: int = 0,
        ended: Collection[int] = (),
        state: MixtureState | None = None,
    ) -> None:
        """Begin at a position.

        Args:
            stages: at least one; the borders ascend.
            sequence_length: tokens of a sequence.
            sequence: number of sequences assigned so far.
            ended: the sources that have ended.
            state: of a schedule with the same stages, after that many sequences; None at the beginning.

        """
        self._weights = [_whole(stage.shares) for stage in stages]
        self._borders = [
            None if stage.until_tokens is None else -(-stage.until_tokens // sequence_length) for stage in stages
        ]
        self._sequence = sequence
        self._ended = frozenset(ended)
        self._stage = state["stage"] if state else 0
        self._begin(state["taken"] if state else None)
        self._pass_borders()

    @property
    def stage(self) -> int:
        """Index of the current stage."""
        return self._stage

    def next(self) -> int | None:
        """Return the source of the next sequence; None if every source of this stage has ended."""
        step = self._step + 1
        chosen, earliest = None, 0
        for source, (release, deadline) in self._windows.items():
            if release <= step and (chosen is None or deadline < earliest):
                chosen, earliest = source, deadline
        return chosen

    def next_run(self, limit: int) -> tuple[int, int] | None:
        """Return the source of the next sequences and how many of them in a row it gives, at most `limit`.

        None if every source of this stage has ended. A source that shares a stage is asked again after each sequence.
        """
        source = self.next()
        if source is None:
            return None
        if len(self._live) > 1:
            return source, 1
        border = self._borders[self._stage]
        return source, limit if border is None else min(limit, border - self._sequence)

    def take(self, source: int, sequences: int = 1) -> None:
        """Record that the next sequences came from `source`, as `next` or `next_run` said."""
        if not sequences:
            return
        self._taken[source] += sequences
        self._step += sequences
        self._sequence += sequences
        self._windows[source] = self._window(source)
        self._pass_borders()

    def end(self, source: int) -> None:
        """Record that a source has no further sequence: from here on the others have its share, in proportion."""
        self._ended |= {source}
        self._begin()

    def skip_stage(self) -> bool:
        """Go to the next stage early; return whether there was one."""
        if self._stage + 1 == len(self._weights):
            return False
        self._stage += 1
        self._begin()
        return True

    def demand(self, sequences: int) -> Counter[int]:
        """Return how many of the next sequences each source has to give if none of them ends."""
        ahead = self.copy()
        found: Counter[int] = Counter()
        missing = sequences
        while missing and (run := ahead.next_run(missing)) is not None:
            source, count = run
            found[source] += count
            missing -= count
            ahead.take(source, count)
        return found

    def copy(self) -> Self:
        """Return an independent schedule at the same position."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._taken, other._windows = list(self._taken), dict(self._windows)
        return other

    def state(self) -> MixtureState:
        """Return the position; `sequence` and `ended` are recorded elsewhere in the state of the stream."""
        return MixtureState(stage=self._stage, taken=list(self._taken))

    def _begin(self, taken: Sequence[int] | None = None) -> None:
        """Start counting from a border, or continue from one after which `taken` were given."""
        weights = self._weights[self._stage]
        self._live = [source for source, weight in enumerate(weights) if weight and source not in self._ended]
        self._total = sum(weights[source] for source in self._live)
        self._taken = [0] * len(weights) if taken is None else list(taken)
        self._step = sum(self._taken)
        self._windows = {source: self._window(source) for source in self._live}

    def _pass_borders(self) -> None:
        while (border := self._borders[self._stage]) is not None and self._sequence >= border:
            self._stage += 1
            self._begin()

    def _window(self, source: int) -> tuple[int, int]:
        """Return the first step at which the source may give its next sequence, and the step by which it must."""
        taken, weight, inverse_slack = self._taken[source], self._weights[self._stage][source], 2 * len(self._live) - 2
        if not inverse_slack:
            return 0, 0  # it is alone
        release = -(-self._total * (inverse_slack * taken + 1) // (inverse_slack * weight))
        deadline = self._total * (inverse_slack * (taken + 1) - 1) // (inverse_slack * weight) + 1
        return release, deadline


def exact(number: float) -> Fraction:
    """Return the decimal number that was written in the config: 0.1 is a tenth, not the nearest binary fraction."""
    return Fraction(repr(number))


def _whole(shares: Sequence[Fraction]) -> list[int]:
    """The same proportions in whole numbers."""
    unit = lcm(*(share.denominator for share in shares))
    return [int(share * unit) for share in shares]
