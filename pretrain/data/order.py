"""The order of reading: which units belong to an epoch, in which order, and which lane reads which of them.

Say a source has the units a b c d e and two lanes. In epoch 0 the seed may order them d a e c b: its first lane then
reads d e b, and its second a c. Epoch 1 has a different order and different shares. Ranks and workers play no part
here: they divide the lanes among themselves.
"""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil
from typing import TypeVar

from pretrain.config.data import DataConfig
from pretrain.data.catalog import Catalog, make_catalog
from pretrain.data.errors import DataError
from pretrain.data.mixture import Stage, exact
from pretrain.data.split import Split, is_validation
from pretrain.data.units import Unit

T = TypeVar("T")
_KEPT_ORDERS = 4  # epochs of a ring whose order is cached: the current one, and those in which carried tails began


@dataclass(frozen=True)
class Ring:
    """Lanes that take turns and whose epochs begin and end together: those of a source.

    Without a mixture, and for the validation split, there is a single ring for all sources.
    """

    name: str
    """What messages call it: the name of the source, or the names of all."""
    units: Mapping[int, tuple[Unit, ...]]
    """The units of its sources, by the index of the source in the config."""
    lanes: range
    """Its lanes, in the numbering of all lanes of the plan."""
    epochs: int | None
    """Epochs until it ends; None if it never does."""
    _orders: dict[int, list[tuple[int, Unit]]] = field(default_factory=dict, repr=False, compare=False)

    def lane_units(self, epoch: int, lane: int, seed: int) -> list[tuple[int, Unit]]:
        """Return the units that a lane reads in an epoch, in order: every n-th of the epoch's units, for n lanes.

        Each comes with the index of its source in the config.
        """
        if epoch not in self._orders:
            while len(self._orders) >= _KEPT_ORDERS:
                del self._orders[min(self._orders)]
            named = {index: [(index, unit) for unit in units] for index, units in self.units.items()}
            self._orders[epoch] = epoch_order(named, seed, epoch)
        return self._orders[epoch][lane - self.lanes.start :: len(self.lanes)]


@dataclass(frozen=True)
class ReadPlan:
    """Everything that determines what each lane reads; the same on every rank and in every worker."""

    rings: tuple[Ring, ...]
    """One for each source of the config, in this order; a single one without a mixture and for validation."""
    stages: tuple[Stage, ...]
    """How the rings are mixed."""
    seed: int
    epochs: int | None
    """Epochs of each ring until the stream ends; None if a ring goes on up to its own limit."""
    split: Split
    validation_fraction: float
    max_bad_rows: int = 0
    """The bad rows that may be skipped."""

    @property
    def lanes(self) -> int:
        """Lanes of all rings."""
        return self.rings[-1].lanes.stop

    def ring_of(self, lane: int) -> int:
        """Return the index of the ring that a lane belongs to."""
        return next(index for index, ring in enumerate(self.rings) if lane in ring.lanes)

    def lane_units(self, epoch: int, lane: int) -> list[Unit]:
        """Return the units that a lane reads in an epoch, in order."""
        return [unit for _, unit in self.rings[self.ring_of(lane)].lane_units(epoch, lane, self.seed)]

    def lane_sources(self, epoch: int, lane: int) -> list[int]:
        """Return the source of each of these units, as its index in the config."""
        return [source for source, _ in self.rings[self.ring_of(lane)].lane_units(epoch, lane, self.seed)]

    def used_rings(self, rings: Collection[int]) -> list[int]:
        """Return those of some rings that the first stage reads; the others are read when a later stage wants them."""
        return [ring for ring in rings if self.stages[0].shares[ring]]

    def selects(self, text: bytes) -> bool:
        """Return whether a document, given as UTF-8, belongs to the split that is read."""
        return is_validation(text, self.validation_fraction) == (self.split == "validation")


def make_plan(config: DataConfig, split: Split, epochs: int | None, catalog: Catalog | None = None) -> ReadPlan:
    """Determine the order of reading.

    The validation split is read once, by a single lane, in an order that no setting changes, so that bits per byte can
    be compared between runs that differ in lanes, seed or mixture.

    Args:
        config: the sources, lanes and mixtures.
        split: the documents to read.
        epochs: how often each source is read; None for no end, except those that the config sets.
        catalog: the files of the sources; listed here if there is none.

    Raises:
        DataError: a source cannot be listed, or there are fewer units than lanes.

    """
    catalog = catalog or make_catalog(config)
    units = catalog.units(config)
    if split == "validation":
        whole = Ring(", ".join(source.path for source in config.sources), dict(enumerate(units)), range(1), 1)
        return ReadPlan(
            (whole,), (Stage((Fraction(1),), None),), 0, 1, split, config.validation_fraction, config.max_bad_rows
        )
    if problem := lane_problem(config, [len(source) for source in units]):
        raise DataError(problem)
    stages = make_stages(config)
    rings = _rings(config, units, epochs) if stages else (_whole_ring(config, units, epochs),)
    stages = stages or (Stage((Fraction(1),), None),)
    return ReadPlan(rings, stages, config.seed, epochs, split, config.validation_fraction, config.max_bad_rows)


def _whole_ring(config: DataConfig, units: Sequence[tuple[Unit, ...]], epochs: int | None) -> Ring:
    """Return the ring of all sources together, each of which is read once in an epoch."""
    limits = [limit for limit in config.epoch_limits if limit is not None]
    limit = max(limits) if len(limits) == len(units) else None
    return Ring(
        ", ".join(config.names), dict(enumerate(units)), range(config.lanes), limit if epochs is None else epochs
    )


def _rings(config: DataConfig, units: Sequence[tuple[Unit, ...]], epochs: int | None) -> tuple[Ring, ...]:
    """Return a ring for each source."""
    rings: list[Ring] = []
    first = 0
    for index, (name, source, limit) in enumerate(zip(config.names, units, config.epoch_limits, strict=True)):
        lanes = range(first, first + min(config.lanes, len(source)))
        rings.append(Ring(name, {index: source}, lanes, limit if epochs is None else epochs))
        first = lanes.stop
    return tuple(rings)


def make_stages(config: DataConfig) -> tuple[Stage, ...]:
    """Return the mixtures of a run; none if the config has none."""
    if config.stages is not None:
        return tuple(
            Stage(tuple(exact(stage.mixture.get(name, 0)) for name in config.names), stage.until_tokens)
            for stage in config.stages
        )
    if config.mixture is not None:
        return (Stage(tuple(exact(config.mixture[name]) for name in config.names), None),)
    return ()


def lane_problem(config: DataConfig, counts: list[int]) -> str | None:
    """Return the problem if the sources, with these numbers of units, cannot feed all lanes; None if they can.

    In a mixture, each source has at most as many lanes as units.
    """
    units = sum(counts)
    if units >= config.lanes:
        return None
    cures = f"raise split_units of its sources ({ceil(config.lanes / max(units, 1))} times as many units are enough)"
    if units:
        cures = f"lower data.lanes to {units} at most, or {cures}"
    return (
        f"data.lanes is {config.lanes}, but an epoch has only {units} read units (parquet row groups and files of JSON "
        f"lines, times split_units), fewer than one for each lane: {cures}"
    )


def epoch_order(units: Mapping[int, Sequence[T]], seed: int, epoch: int) -> list[T]:
    """Return all units of an epoch in the order in which they are dealt to the lanes.

    Units are sorted by a keyed hash and not shuffled by a library's generator: its sequence may change in a later
    release, and a run could then not be resumed.

    Args:
        units: those of each source, by its index in the config, or what stands for them.
        seed: of the order.
        epoch: counted from 0.

    """
    entries = [
        entry
        for index, source in units.items()
        for entry in zip(_keys(seed, epoch, index, len(source)), source, strict=True)
    ]
    return [unit for _, unit in sorted(entries, key=lambda entry: entry[0])]


def _keys(seed: int, epoch: int, source: int, units: int) -> Iterator[bytes]:
    """Yield the key of each unit: the hash of ``(seed, epoch, 'order', source, unit, 0)`` as Python prints it.

    The 0 stands for the copy of the unit: a source could once be read several times in an epoch.
    """
    same = hashlib.blake2b(f"({seed}, {epoch}, 'order', {source}, ".encode(), digest_size=16)
    for number in range(units):
        key = same.copy()
        key.update(b"%d, 0)" % number)
        yield key.digest()
