"""All faults of the sources at once, before training."""

import logging
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from pretrain.config.data import DataConfig, SourceConfig
from pretrain.data.errors import DataError
from pretrain.data.formats import Unit, parse_line, read_unit
from pretrain.data.order import Split, is_validation, lane_problem
from pretrain.data.sources import file_units, source_files

logger = logging.getLogger(__name__)

# Files are read to their end until so many bytes of them were; of each file after that, only samples.
FULL_SCAN_BYTES = 512 << 20
_SAMPLE_BYTES = 1 << 20
_SAMPLE_ROWS = 1024


def check_sources(config: DataConfig) -> list[str]:
    """Read the sources and return every problem, one message each; of a file, the first. Empty: none was found.

    The first 512 MiB of files are read in full. Of files beyond that only the beginning and the end are (of
    compressed JSON lines the beginning), which a warning in the log says; such files can still raise the same
    `DataError` during training.
    """
    scan = _Scan(config.validation_fraction)
    counts = [scan.source(source) for source in config.sources]
    if not scan.problems:
        if problem := lane_problem(config, counts):
            scan.problems.append(problem)
        if not scan.sampled:
            scan.problems += _empty_splits(config, scan.documents)
    if scan.sampled:
        logger.warning(
            "the sources are larger than %d MiB: only the beginning and the end were checked of %d files, from %s on",
            FULL_SCAN_BYTES >> 20,
            len(scan.sampled),
            scan.sampled[0],
        )
    return scan.problems


def _empty_splits(config: DataConfig, documents: "Counter[Split]") -> Iterator[str]:
    fraction = config.validation_fraction
    if not documents["train"]:
        yield f"every document is in the validation split: data.validation_fraction is {fraction}, lower it"
    elif fraction and not documents["validation"]:
        yield (
            f"none of the {documents['train']} documents is in the validation split: data.validation_fraction is "
            f"{fraction}; raise it, add documents, or set it to 0 and train without validation"
        )


class _Scan:
    """What was found so far."""

    def __init__(self, validation_fraction: float) -> None:
        self.problems: list[str] = []
        self.sampled: list[str] = []
        self.documents: Counter[Split] = Counter()
        self._fraction = validation_fraction
        self._budget = FULL_SCAN_BYTES

    def source(self, source: SourceConfig) -> int:
        """Look at all files of a source; return how many units it has."""
        units = 0
        before = (self.documents.total(), len(self.problems), len(self.sampled))
        try:
            files = source_files(source)
        except DataError as error:
            self.problems.append(str(error))
            return 0
        for path in files:
            try:
                units += len(file_units(path, source))
                self._file(path, source)
            except DataError as error:
                self.problems.append(str(error))
        if before == (self.documents.total(), len(self.problems), len(self.sampled)):
            self.problems.append(f"{source.path}: the source is empty, no row holds any text")
        return units

    def _file(self, path: str, source: SourceConfig) -> None:
        # Missing rights show here already; a file that vanished since it was listed, too.
        try:
            size = Path(path).stat().st_size
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        units = file_units(path, source.model_copy(update={"split_units": 1}))
        if size <= self._budget:
            self._budget -= size
            texts: Iterator[str] = chain.from_iterable(_texts(unit, 0) for unit in units)
        else:
            self.sampled.append(path)
            texts = _samples(units, size)
        for text in texts:
            if encoded := text.encode():
                self.documents["validation" if is_validation(encoded, self._fraction) else "train"] += 1


def _texts(unit: Unit, first_row: int) -> Iterator[str]:
    return (text for _, text in read_unit(unit, first_row, _SAMPLE_BYTES))


def _samples(units: list[Unit], size: int) -> Iterator[str]:
    """Texts from the beginning and the end of a file."""
    if not units:
        return
    seen = 0
    for text in _texts(units[0], 0):
        yield text
        seen += len(text)
        if seen > _SAMPLE_BYTES:
            break
    last = units[-1]
    if last.rows is not None:
        yield from _texts(last, max(0, last.rows - _SAMPLE_ROWS))
    elif last.path.endswith(".jsonl"):
        yield from _last_lines(last, size)


def _last_lines(unit: Unit, size: int) -> Iterator[str]:
    start = max(0, size - _SAMPLE_BYTES)
    with open(unit.path, "rb") as file:
        file.seek(start)
        if start:
            start += len(file.readline())  # most likely the end of a line
        for line in file:
            text = parse_line(line, f"{unit.path}: the line at byte {start}", unit.text_field)
            start += len(line)
            if text is not None:
                yield text
