"""The order of reading: which units belong to an epoch, in which order, and which lane reads which of them.

Say a source has the units a b c d e and there are two lanes. In epoch 0 the seed may order them d a e c b: lane 0
then reads d e b, and lane 1 reads a c. Epoch 1 has a different order and different shares. Ranks and workers play no
part here: they divide the lanes among themselves.
"""

import hashlib
from dataclasses import dataclass, field
from fractions import Fraction
from math import ceil, floor

from pretrain.config.data import DataConfig
from pretrain.data.catalog import Catalog, make_catalog
from pretrain.data.errors import DataError
from pretrain.data.split import Split, is_validation
from pretrain.data.units import Unit

_KEPT_ORDERS = 4  # epochs whose order is cached: the current one, and those in which carried tails began


@dataclass(frozen=True)
class ReadPlan:
    """Everything that determines what each lane reads; the same on every rank and in every worker."""

    units: tuple[tuple[Unit, ...], ...]
    """The units of each source."""
    weights: tuple[Fraction, ...]
    """Passes over each source per epoch."""
    lanes: int
    seed: int
    epochs: int | None
    """Epochs until the stream ends; None if it never does."""
    split: Split
    validation_fraction: float
    _orders: dict[int, list[Unit]] = field(default_factory=dict, repr=False, compare=False)

    def lane_units(self, epoch: int, lane: int) -> list[Unit]:
        """Return the units that a lane reads in an epoch, in order: every `lanes`-th of the epoch's units."""
        if epoch not in self._orders:
            while len(self._orders) >= _KEPT_ORDERS:
                del self._orders[min(self._orders)]
            self._orders[epoch] = epoch_order(self.units, self.weights, self.seed, epoch)
        return self._orders[epoch][lane :: self.lanes]

    def selects(self, text: bytes) -> bool:
        """Return whether a document, given as UTF-8, belongs to the split that is read."""
        return is_validation(text, self.validation_fraction) == (self.split == "validation")


def make_plan(config: DataConfig, split: Split, epochs: int | None, catalog: Catalog | None = None) -> ReadPlan:
    """Determine the order of reading.

    The validation split is read once, by a single lane, each source with weight 1 and in an order that no setting
    changes, so that bits per byte can be compared between runs that differ in lanes, seed or weights.

    Args:
        config: the sources and lanes.
        split: the documents to read.
        epochs: how often; None for no end.
        catalog: the files of the sources; listed here if there is none.

    Raises:
        DataError: a source cannot be listed, or there are fewer units than lanes.

    """
    units = (catalog or make_catalog(config)).units(config)
    if split == "validation":
        weights = (Fraction(1),) * len(units)
        return ReadPlan(units, weights, 1, 0, 1, split, config.validation_fraction)
    if problem := lane_problem(config, [len(source) for source in units]):
        raise DataError(problem)
    weights = tuple(exact(source.weight) for source in config.sources)
    return ReadPlan(units, weights, config.lanes, config.seed, epochs, split, config.validation_fraction)


def lane_problem(config: DataConfig, counts: list[int]) -> str | None:
    """Return the problem if the sources, with these numbers of units, cannot feed all lanes; None if they can."""
    pairs = zip(config.sources, counts, strict=True)
    units = sum(floor(exact(source.weight) * count) for source, count in pairs)
    if units >= config.lanes:
        return None
    cures = f"raise split_units of its sources ({ceil(config.lanes / max(units, 1))} times as many units are enough)"
    if units:
        cures = f"lower data.lanes to {units} at most, or {cures}"
    return (
        f"data.lanes is {config.lanes}, but an epoch may have only {units} read units (parquet row groups and files "
        f"of JSON lines, times split_units and weight), fewer than one for each lane: {cures}"
    )


def epoch_order(
    units: tuple[tuple[Unit, ...], ...], weights: tuple[Fraction, ...], seed: int, epoch: int
) -> list[Unit]:
    """Return all units of an epoch in the order in which they are dealt to the lanes.

    A source of n units and weight w contributes wn units per epoch, rounded such that the total is right after every
    epoch. Units are sorted by a keyed hash and not shuffled by a library's generator: its sequence may change in a
    later release, and a run could then not be resumed.
    """
    entries: list[tuple[bytes, Unit]] = []
    for index, (source, weight) in enumerate(zip(units, weights, strict=True)):
        if not source:
            continue
        due = _round(weight * len(source) * (epoch + 1)) - _round(weight * len(source) * epoch)
        copies, extra = divmod(due, len(source))
        chosen = sorted(range(len(source)), key=lambda unit: _key(seed, epoch, "choose", index, unit))[:extra]
        for copy in range(copies + 1):
            for unit in chosen if copy == copies else range(len(source)):
                entries.append((_key(seed, epoch, "order", index, unit, copy), source[unit]))
    return [unit for _, unit in sorted(entries, key=lambda entry: entry[0])]


def exact(weight: float) -> Fraction:
    """Return the decimal number that was written in the config: 0.29 of 100 units is 29, not 28.999."""
    return Fraction(repr(weight))


def _round(number: Fraction) -> int:
    return floor(number + Fraction(1, 2))


def _key(*parts: object) -> bytes:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).digest()
