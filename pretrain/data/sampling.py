"""A bounded sample of the text of a source, spread over all of its files.

Data is often ordered: the first files by name may all be about one subject. So the rows or bytes of a source are laid
end to end and divided into equal strata, and a window is read at a random place of each. How close a window can get to
a random place depends on the format:

- Files with row groups (parquet): any row, if the row groups are small; otherwise the beginning of a row group, since
  the rows before a row have to be decoded.
- Plain JSON lines: the first whole line after a random byte.
- Compressed files and JSON arrays: the beginning of a random file, since nothing else can be read on its own.

A small source is read in full instead.
"""

import io
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import BinaryIO

from pretrain.config.data import DataConfig
from pretrain.data.bad_rows import BadRow
from pretrain.data.cache import open_file
from pretrain.data.catalog import Catalog
from pretrain.data.errors import DataError
from pretrain.data.formats import TextFile, text_file
from pretrain.data.units import DataFile, Unit

_PLAIN = (".jsonl", ".ndjson")
_LARGE_ROW_GROUP = 16 << 20
_MAX_EXPANSION = 8  # text bytes per file byte that a bounded read allows for
_MAX_LINE_BYTES = 64 << 20
_MAX_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Sample:
    """Consecutive documents from one place of a source."""

    weight: float
    """The weight of a row or byte of this sample relative to those of the other samples of the same kind."""
    size: int
    """Rows of the files (see `Stratum.unit`) or bytes of the files that were read."""
    texts: tuple[str, ...]
    """The texts of those rows, empty ones included; bad rows have none."""


@dataclass(frozen=True, slots=True)
class Stratum:
    """The files of a source that are sampled in the same way."""

    how: str
    """A description of how, for people."""
    size: int
    """Rows or bytes in all."""
    samples: tuple[Sample, ...]
    whole: bool
    """Whether the samples cover the whole source."""


@dataclass(frozen=True, slots=True)
class _Place:
    """A window before it is read: `size` rows or bytes from `start` on, counted along all files of its kind."""

    start: int
    size: int
    hits: int = 1
    """Strata that this window stands for."""


def undivided_units(config: DataConfig, catalog: Catalog) -> tuple[tuple[Unit, ...], ...]:
    """Return the read units of each source without regard to `split_units`: files and row groups."""
    sources = tuple(source.model_copy(update={"split_units": 1}) for source in config.sources)
    return catalog.units(config.model_copy(update={"sources": sources}))


def sample_source(units: Sequence[Unit], read_bytes: int, windows: int, seed: int) -> tuple[list[Stratum], list[str]]:
    """Read about `read_bytes` of a source's text, or all of it if there is no more than that.

    Args:
        units: the read units of the source, none of them divided, in the order of the files.
        read_bytes: text to read, in bytes. Documents are never divided, so one window may exceed its part.
        windows: places to read at, at most, per kind of file.
        seed: of the choice of places.

    Returns:
        What was read, one stratum per kind of file, and a message for each window that could not be read.

    """
    opened = _Files()
    total = _bytes(units)
    try:
        if total <= read_bytes and (whole := _whole(opened, units, read_bytes, windows)):
            return [whole], opened.problems
        kinds: dict[str, list[Unit]] = {}
        for unit in units:
            kinds.setdefault(_kind(unit), []).append(unit)
        strata: list[Stratum] = []
        problems: list[str] = []
        for kind, members in sorted(kinds.items()):
            part = _bytes(members) / max(1, total)
            line = _LINES[kind](opened, members, max(1, int(read_bytes * part)), windows)
            if line.size:
                strata.append(_sampled(line, random.Random(f"{seed} {kind}"), problems))
        return strata, [*opened.problems, *problems]
    finally:
        opened.close()


def _sampled(line: "_Rows | _Lines | _Heads", chooser: random.Random, problems: list[str]) -> Stratum:
    samples = []
    for place in line.places(chooser):
        try:
            size, texts = line.read(place)
        except DataError as error:
            problems.append(str(error))
            continue
        if size:
            samples.append(Sample(place.hits / size, size, tuple(texts)))
    return Stratum(line.how, line.size, tuple(samples), whole=False)


def _bytes(units: Sequence[Unit]) -> int:
    """The size of the files of these units."""
    return sum({unit.file.path: unit.file.bytes or 0 for unit in units}.values())


def _kind(unit: Unit) -> str:
    if unit.row_group is not None:
        return "rows"
    return "lines" if unit.file.path.lower().endswith(_PLAIN) else "heads"


def _whole(opened: "_Files", units: Sequence[Unit], read_bytes: int, windows: int) -> Stratum | None:
    """All texts of small files, in samples of about equal size; None if they expand to too much or are damaged."""
    samples: list[Sample] = []
    texts: list[str] = []
    total = waiting = 0
    most = max(1, _bytes(units) // windows)
    try:
        for text in _all_texts(opened, units):
            texts.append(text)
            waiting += len(text)
            if waiting >= most:
                samples.append(Sample(1.0, len(texts), tuple(texts)))
                total, waiting, texts = total + waiting, 0, []
                if total > _MAX_EXPANSION * read_bytes:
                    return None
    except DataError as error:
        if not _bytes(units):  # there is no place to read at, where it would be found again
            opened.problems.append(str(error))
        return None
    if texts:
        samples.append(Sample(1.0, len(texts), tuple(texts)))
    return Stratum("all of it was read", sum(sample.size for sample in samples), tuple(samples), whole=True)


def _all_texts(opened: "_Files", units: Sequence[Unit]) -> Iterator[str]:
    for unit in units:
        for _, text in opened.text_of(unit).rows(unit, 0, 1 << 20):
            if isinstance(text, BadRow):
                opened.problems.append(str(text))
            else:
                yield text


class _Files:
    """Opens files, keeping the last one open: windows are read in the order of the files."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        """What is wrong with rows that were read."""
        self._opened = ExitStack()
        self._current: tuple[DataFile, BinaryIO] | None = None
        self._text: TextFile | None = None

    def bytes_of(self, file: DataFile) -> BinaryIO:
        """Return the open file."""
        if self._current is None or self._current[0] != file:
            self.close()
            self._current = (file, self._opened.enter_context(open_file(file)))
        return self._current[1]

    def text_of(self, unit: Unit) -> TextFile:
        """Return the rows of the file of a unit."""
        opened = self.bytes_of(unit.file)
        if self._text is None:
            self._text = text_file(opened, unit.file.path, unit.recipe)
        return self._text

    def close(self) -> None:
        """Close the file that is open."""
        self._current = self._text = None
        self._opened.close()


class _Line:
    """Rows or bytes of several parts laid end to end."""

    how = ""

    def __init__(self, files: _Files, lengths: Sequence[int], windows: int) -> None:
        self._opened = files
        self._ends = list(accumulate(lengths))
        self.size = self._ends[-1] if self._ends else 0
        self._windows = max(1, min(windows, self.size))

    def part(self, position: int) -> tuple[int, int]:
        """Return the part that holds a position, and the position within it."""
        index = bisect_right(self._ends, position)
        return index, position - (self._ends[index - 1] if index else 0)

    def strata(self, chooser: random.Random, window: int) -> Iterator[_Place]:
        """Yield a window at a random place of each of the equal strata; windows do not overlap."""
        for index in range(self._windows):
            begin, end = (self.size * edge // self._windows for edge in (index, index + 1))
            size = min(window, end - begin)
            yield _Place(chooser.randint(begin, end - size), size)

    def at_beginnings(self, places: Iterator[_Place]) -> list[_Place]:
        """Move each window to the beginning of the part that it lies in; several in one part become one."""
        hits: dict[int, _Place] = {}
        for place in places:
            index, offset = self.part(place.start)
            earlier = hits.get(index)
            hits[index] = replace(place, start=place.start - offset, hits=1 if earlier is None else earlier.hits + 1)
        return list(hits.values())


class _Rows(_Line):
    """Files with row groups: windows of rows."""

    def __init__(self, opened: _Files, units: Sequence[Unit], read_bytes: int, windows: int) -> None:
        self._units = units
        super().__init__(opened, [unit.rows or 0 for unit in units], windows)
        size = _bytes(units)
        self._from_beginning = size > _LARGE_ROW_GROUP * len(self._units)
        self._window_bytes = max(1, read_bytes // self._windows)
        # Text takes about twice the space of a compressed file.
        self._window = max(1, min(_MAX_ROWS, self._window_bytes * self.size // max(1, 2 * size)))
        place = "the beginning of random row groups" if self._from_beginning else "random places of the files"
        self.how = f"sampled: {self._window:,} rows at {{}} {place}"

    def places(self, chooser: random.Random) -> list[_Place]:
        places = self.strata(chooser, self._window)
        found = self.at_beginnings(places) if self._from_beginning else list(places)
        self.how = self.how.format(len(found))
        return found

    def read(self, place: _Place) -> tuple[int, list[str]]:
        """Read the rows of a window, which may begin in one row group and end in the next."""
        texts: list[str] = []
        room = _MAX_EXPANSION * self._window_bytes
        position, end = place.start, place.start + place.size
        while position < end:
            index, first = self.part(position)
            unit = self._units[index]
            last = min(unit.rows or 0, first + end - position)
            for row, text in self._opened.text_of(unit).rows(unit, first, 1 << 20):
                if row >= last:
                    break
                if isinstance(text, BadRow):
                    self._opened.problems.append(str(text))
                    continue
                texts.append(text)
                room -= len(text)
                if room < 0 and row + 1 < last:
                    return position - first + row + 1 - place.start, texts
            position += last - first
            if self._from_beginning:  # the next row group is another part
                break
        return position - place.start, texts


class _Lines(_Line):
    """Plain JSON lines: windows of bytes, moved to whole lines."""

    def __init__(self, opened: _Files, units: Sequence[Unit], read_bytes: int, windows: int) -> None:
        self._units = units
        super().__init__(opened, [unit.file.bytes or 0 for unit in units], windows)
        self._window = max(1 << 12, read_bytes // self._windows)

    def places(self, chooser: random.Random) -> list[_Place]:
        found = list(self.strata(chooser, self._window))
        self.how = f"sampled: about {self._window >> 10:,} KiB at {len(found)} random places of the files"
        return found

    def read(self, place: _Place) -> tuple[int, list[str]]:
        """Read the lines that begin in a window."""
        index, offset = self.part(place.start)
        unit = self._units[index]
        data = _whole_lines(self._opened.bytes_of(unit.file), offset, place.size)
        try:
            return len(data), _texts(data, unit, self._opened.problems)
        except DataError as error:
            raise DataError(f"{error} (lines counted from a random place near byte {offset})") from error


class _Heads(_Line):
    """Files that can be read from the beginning only."""

    def __init__(self, opened: _Files, units: Sequence[Unit], read_bytes: int, windows: int) -> None:
        self._units = units
        super().__init__(opened, [unit.file.bytes or 0 for unit in units], 2 * min(windows, len(units)))
        self._window = max(1 << 16, read_bytes // self._windows // 4)  # compressed text is a quarter of the text

    def places(self, chooser: random.Random) -> list[_Place]:
        found = self.at_beginnings(self.strata(chooser, self._window))
        self.how = (
            f"sampled: the first {self._window >> 10:,} KiB of {len(found)} random files of {len(self._units)}: their "
            "format allows no other place"
        )
        return found

    def read(self, place: _Place) -> tuple[int, list[str]]:
        """Read the beginning of a file."""
        unit = self._units[self.part(place.start)[0]]
        opened = self._opened.bytes_of(unit.file)
        opened.seek(0)
        data = opened.read(self._window)
        return len(data), _texts(data, unit, None if len(data) < (unit.file.bytes or 0) else self._opened.problems)


_LINES: dict[str, type[_Rows] | type[_Lines] | type[_Heads]] = {"rows": _Rows, "lines": _Lines, "heads": _Heads}


def _texts(data: bytes, unit: Unit, problems: list[str] | None) -> list[str]:
    """The texts of a part of a file; `problems` is for its bad rows.

    Without `problems`, the part was cut anywhere, and an error or a bad row is treated as its end.

    Raises:
        DataError: the part is damaged.

    """
    texts: list[str] = []
    try:
        for _, text in text_file(io.BytesIO(data), unit.file.path, unit.recipe).rows(unit, 0, 1 << 20):
            if isinstance(text, str):
                texts.append(text)
            elif problems is not None:
                problems.append(f"{text} (counted within the sample)")
    except DataError:
        if problems is not None:
            raise
    return texts


def _whole_lines(opened: BinaryIO, start: int, count: int) -> bytes:
    """The whole lines that begin in `count` bytes from `start` on, and the rest of the last of them.

    Of a longer line, at most 64 MiB are searched for its end; without one there is nothing to return.
    """
    opened.seek(max(0, start - 1))
    if start:
        opened.readline(_MAX_LINE_BYTES)  # a line begins at `start` if the byte before it ends one
    lines = [opened.readline(_MAX_LINE_BYTES)]
    size = len(lines[0])
    while lines[-1].endswith(b"\n") and size < count:
        lines.append(opened.readline(_MAX_LINE_BYTES))
        size += len(lines[-1])
    return b"".join(lines if len(lines[-1]) < _MAX_LINE_BYTES else lines[:-1])
