"""Which evaluation items overlap with the training text, by n-grams of words.

As in GPT-3's study of contamination (Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C): case and
punctuation are ignored, and an item overlaps if it shares any n-gram of words with the training text, n = 13. Items
with fewer than n words cannot be judged and are counted as too short. Unlike there, n-grams that are frequent in the
training text count as well.

The training text is read once, as a stream. Memory holds the n-grams of the items as two 64-bit hashes each, and their
vocabulary: an n-gram of the training text with any other word cannot match.
"""

import hashlib
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pretrain.config.data import DataConfig
from pretrain.data.catalog import Catalog, require_text
from pretrain.data.formats import read_unit
from pretrain.data.order import is_validation
from pretrain.data.sampling import undivided_units
from pretrain.data.units import Unit

NGRAM = 13
_WORD = re.compile(r"[^\W_]+")
_PART = 1 << 20  # characters of a document that are compared at a time
_MANY_UNITS = 64  # of bounded coverage: units that are read at least, if there are so many
_BATCH_BYTES = 4 << 20
_FILTER_BITS = 22

Hashes = npt.NDArray[np.uint64]


class Place(NamedTuple):
    """Where a text is."""

    path: str
    row_group: int | None
    row: int
    """Of the row group, or of the file if it has none; counted from 0."""


@dataclass
class Coverage:
    """What was read of the training text."""

    documents: int = 0
    text_bytes: int = 0
    units: int = 0
    """Files, or row groups of files that have them."""
    complete_units: int = 0
    all_units: int = 0

    def __str__(self) -> str:
        read = f"{self.documents:,} documents of the training split, {self.text_bytes:,} bytes"
        if self.complete_units == self.all_units:
            return f"{read}: all of it"
        return (
            f"{read}: {self.complete_units:,} of {self.all_units:,} files or row groups in full, the beginning of "
            f"{self.units - self.complete_units:,} others; what was not read may hold more"
        )


@dataclass(frozen=True, slots=True)
class ItemOverlap:
    """An item that overlaps with the training text."""

    item: int
    """Position in its task, as `doc_id` in a result of the evaluation."""
    ngrams: int
    """Different n-grams of the item."""
    found: int
    """Those of them that occur in the training text."""
    place: Place
    """Where the first of them was found."""


@dataclass(frozen=True, slots=True)
class TaskOverlap:
    """The overlap of one task."""

    items: int
    too_short: int
    """Items with fewer than n words."""
    ngrams: int
    """Different n-grams, summed over the items."""
    found: int
    overlapping: tuple[ItemOverlap, ...]


@dataclass(frozen=True)
class Overlap:
    """The report."""

    ngram: int
    coverage: Coverage
    tasks: dict[str, TaskOverlap] = field(default_factory=dict)


def words(text: str) -> list[str]:
    """Return the words of a text: runs of letters and digits, without case."""
    return _WORD.findall(text.casefold())


class NgramIndex:
    """The n-grams of the items, and where each was first found.

    Args:
        tasks: the texts of the items of each task.
        ngram: words of an n-gram.

    """

    def __init__(self, tasks: Mapping[str, Sequence[str]], ngram: int) -> None:
        self._ngram = ngram
        split = {task: [words(text) for text in texts] for task, texts in tasks.items()}
        vocabulary = sorted({word for texts in split.values() for text in texts for word in text})
        self._numbers = {word: number for number, word in enumerate(vocabulary, start=1)}
        codes = [hashlib.blake2b(word.encode(), digest_size=16).digest() for word in vocabulary]
        table = np.frombuffer(b"".join([bytes(16), *codes]), dtype=np.uint64).reshape(-1, 2)
        self._tables = (np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1]))
        windows = {task: [self._windows(text) for text in texts] for task, texts in split.items()}
        every = [pair for texts in windows.values() for pair in texts]
        first = np.concatenate([np.empty(0, np.uint64), *(pair[0] for pair in every)])
        second = np.concatenate([np.empty(0, np.uint64), *(pair[1] for pair in every)])
        self._first, chosen = np.unique(first, return_index=True)
        self._second = second[chosen]
        self._filter = np.zeros(1 << _FILTER_BITS, dtype=bool)
        self._filter[self._bits(self._first)] = True
        self._items = {
            task: [np.unique(np.searchsorted(self._first, pair[0])) for pair in texts]
            for task, texts in windows.items()
        }
        self._places: dict[int, Place] = {}

    def look(self, text: str, place: Place) -> None:
        """Note the n-grams of a text that occur in items and were not found before."""
        kept: list[str] = []
        for part in _parts(text):
            found = [*kept, *words(part)]
            kept = found[max(0, len(found) - self._ngram + 1) :]
            first, second = self._windows(found)
            likely = self._filter[self._bits(first)].nonzero()[0]
            if not len(likely):
                continue
            first, second = first[likely], second[likely]
            at = np.minimum(np.searchsorted(self._first, first), len(self._first) - 1)
            equal = (self._first[at] == first) & (self._second[at] == second)
            for number in at[equal].tolist():
                self._places.setdefault(number, place)

    def report(self) -> dict[str, TaskOverlap]:
        """Return what was found so far, by task."""
        return {task: self._task(items) for task, items in self._items.items()}

    def _task(self, items: "Sequence[npt.NDArray[np.intp]]") -> TaskOverlap:
        overlapping = []
        for index, ngrams in enumerate(items):
            if found := [number for number in ngrams.tolist() if number in self._places]:
                place = min(self._places[number] for number in found)
                overlapping.append(ItemOverlap(index, len(ngrams), len(found), place))
        return TaskOverlap(
            items=len(items),
            too_short=sum(not len(ngrams) for ngrams in items),
            ngrams=sum(map(len, items)),
            found=sum(one.found for one in overlapping),
            overlapping=tuple(overlapping),
        )

    def _windows(self, text: Sequence[str]) -> tuple[Hashes, Hashes]:
        """Two hashes of each n-gram that consists of known words."""
        numbers = np.fromiter(map(self._numbers.get, text, repeat(0)), dtype=np.int64, count=len(text))
        count = max(0, len(numbers) - self._ngram + 1)
        unknown = np.concatenate([[0], np.cumsum(numbers == 0)])
        known = unknown[self._ngram : self._ngram + count] == unknown[:count]
        starts = known.nonzero()[0]
        return self._hash(self._tables[0][numbers], starts), self._hash(self._tables[1][numbers], starts)

    def _hash(self, codes: Hashes, starts: "npt.NDArray[np.intp]") -> Hashes:
        """A polynomial in an odd number, modulo 2^64."""
        total = np.zeros(len(starts), dtype=np.uint64)
        for offset in range(self._ngram):
            total = total * np.uint64(0x9E3779B97F4A7C15) + codes[starts + offset]
        return total

    @staticmethod
    def _bits(hashes: Hashes) -> "npt.NDArray[np.int64]":
        return (hashes >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)


def _parts(text: str) -> Iterator[str]:
    """Divide a long text between words."""
    begin = 0
    while len(text) - begin > _PART:
        border = re.compile(r"[\W_]").search(text, begin + _PART)
        end = border.start() if border else len(text)
        yield text[begin:end]
        begin = end
    yield text[begin:]


def measure_overlap(
    config: DataConfig,
    catalog: Catalog,
    tasks: Mapping[str, Sequence[str]],
    *,
    ngram: int = NGRAM,
    max_bytes: int | None = None,
    seed: int = 0,
    progress: Callable[[Coverage], Any] = lambda coverage: None,
) -> Overlap:
    """Look for the items in the training split of the sources.

    Args:
        config: the sources.
        catalog: their files.
        tasks: the texts of the items of each task.
        ngram: words of an n-gram, at least 1.
        max_bytes: text to read at most, from random files and row groups; None: all of it.
        seed: of their choice.
        progress: called after every document.

    Raises:
        DataError: see `read_unit`; or a source holds tokens instead of text.

    """
    require_text(catalog)
    index = NgramIndex(tasks, ngram)
    units = [unit for of_source in undivided_units(config, catalog) for unit in of_source]
    coverage = Coverage(all_units=len(units))
    most = None
    if max_bytes is not None:
        random.Random(seed).shuffle(units)
        most = max(1, max_bytes // max(1, min(_MANY_UNITS, len(units))))
    for unit in units:
        if max_bytes is not None and coverage.text_bytes >= max_bytes:
            break
        coverage.units += 1
        for encoded, look in _documents(unit, most, coverage):
            if not is_validation(encoded, config.validation_fraction):
                coverage.documents += 1
                coverage.text_bytes += len(encoded)
                index.look(*look)
            progress(coverage)
    return Overlap(ngram, coverage, index.report())


def _documents(unit: Unit, most: int | None, coverage: Coverage) -> Iterator[tuple[bytes, tuple[str, Place]]]:
    """Yield the texts of a unit, encoded and as they are, with their places; stop after about `most` bytes."""
    read = 0
    for row, text in read_unit(unit, 0, _BATCH_BYTES):
        if not isinstance(text, str):  # a bad row
            continue
        encoded = text.encode()
        if encoded:
            yield encoded, (text, Place(unit.file.path, unit.row_group, row))
        read += len(encoded)
        if most is not None and read >= most:
            return
    coverage.complete_units += 1
