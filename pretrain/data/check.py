"""Find every fault of the sources before training."""

import logging
from collections import Counter
from collections.abc import Collection, Iterator
from functools import partial

from pretrain.config.data import DataConfig, SourceConfig
from pretrain.config.row_filter import condition_fields, parse_condition
from pretrain.data.bad_rows import BadRow, BadRowBudget
from pretrain.data.catalog import Catalog, CatalogFile, catalog_source, text_recipe
from pretrain.data.formats import TextFile
from pretrain.data.json_fields import named
from pretrain.data.order import Split, is_validation, lane_problem
from pretrain.data.sources.retries import set_retry_minutes
from pretrain.data.units import Unit

logger = logging.getLogger(__name__)

# Files are read in full until this many bytes have been read, and sampled from then on.
FULL_SCAN_BYTES = 512 << 20
_SAMPLE_BYTES = 1 << 20


def check_sources(config: DataConfig) -> list[str]:
    """Read the sources and return every problem, one message each; see `survey`."""
    return survey(config)[1]


def survey(config: DataConfig) -> tuple[Catalog, list[str]]:
    """Read the sources, opening each file once.

    The first 512 MiB of files are read in full. Of files beyond that, only the beginning and the end are read (of
    compressed JSON lines, the beginning), and a warning in the log says so; such files can still raise the same
    `DataError` during training.

    Returns:
        The catalog, and every problem that was found, one message each and at most one per file. If there are
        problems, the catalog is incomplete.

    """
    set_retry_minutes(config.retry_minutes)
    scan = _Scan(config)
    sources, problems = [], []
    for source in config.sources:
        before = (scan.documents.total(), len(scan.sampled))
        found, faults = catalog_source(source, config, partial(scan.file, source))
        if not faults and before == (scan.documents.total(), len(scan.sampled)):
            faults = [_empty(source, scan.fields)]
        scan.fields.clear()
        sources.append(found)
        problems += faults
    catalog = Catalog(tuple(sources))
    if not problems:
        if problem := lane_problem(config, [len(units) for units in catalog.units(config)]):
            problems.append(problem)
        if not scan.sampled:
            problems += _empty_splits(config, scan.documents)
    if scan.sampled:
        logger.warning(
            "the sources are larger than %d MiB: only the beginning and the end were checked of %d files, from %s on",
            FULL_SCAN_BYTES >> 20,
            len(scan.sampled),
            scan.sampled[0],
        )
    if scan.bad.rows and not problems:
        logger.warning(
            "%d bad rows were found, of the %d of data.max_bad_rows; they are skipped:\n%s",
            scan.bad.rows,
            config.max_bad_rows,
            "\n".join(str(bad) for bad in scan.bad.first),
        )
    return catalog, problems


def _empty(source: SourceConfig, fields: Collection[str]) -> str:
    if source.where is None:
        return f"{source.path}: the source is empty, no row holds any text"
    unknown = [field for field in condition_fields(parse_condition(source.where)) if field.split(".")[0] not in fields]
    hint = f"; {unknown[0]!r} is none of its fields: {named(fields, unknown[0], 'fields')}" if unknown else ""
    return f"{source.path}: no row that meets where {source.where!r} holds any text{hint}"


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
    """Reads the texts of open files and counts the documents of each split."""

    def __init__(self, config: DataConfig) -> None:
        self.sampled: list[str] = []
        """Files that were not read in full."""
        self.documents: Counter[Split] = Counter()
        self.bad = BadRowBudget(config.max_bad_rows)
        self.fields: dict[str, None] = {}
        """Fields of the files of a source in which no row met the condition."""
        self._config = config
        self._budget = FULL_SCAN_BYTES

    def file(self, source: SourceConfig, file: CatalogFile, text: TextFile) -> None:
        """Read one file.

        Raises:
            DataError: the file is damaged, or one of its rows holds no valid text.

        """
        units = file.units(text_recipe(source, self._config), split_units=1)
        if file.bytes <= self._budget:
            self._budget -= file.bytes
            texts = _all_texts(text, units)
        else:
            self.sampled.append(file.path)
            texts = _samples(text, units)
        before = self.documents.total()
        for one in texts:
            if isinstance(one, BadRow):
                self.bad.spend(one)
            elif encoded := one.encode():
                held_out = is_validation(encoded, self._config.validation_fraction)
                self.documents["validation" if held_out else "train"] += 1
        if source.where and before == self.documents.total():
            self.fields |= dict.fromkeys(text.field_names())


def _all_texts(text: TextFile, units: list[Unit]) -> Iterator[str | BadRow]:
    return (one for unit in units for _, one in text.rows(unit, 0, _SAMPLE_BYTES))


def _samples(text: TextFile, units: list[Unit]) -> Iterator[str | BadRow]:
    """Texts from the beginning and the end of a file."""
    if not units:
        return
    seen = 0
    for one in _all_texts(text, units[:1]):
        yield one
        seen += 100 + (len(one) if isinstance(one, str) else 0)  # a row has more to it than its text
        if seen > _SAMPLE_BYTES:
            break
    yield from text.last_texts(units, _SAMPLE_BYTES)
