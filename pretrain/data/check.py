"""Find every fault of the sources before training."""

import logging
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from functools import partial
from itertools import islice

from pretrain.config.data import DataConfig, SourceConfig
from pretrain.config.row_filter import condition_fields, parse_condition
from pretrain.data.bad_rows import BadRow, BadRowBudget
from pretrain.data.catalog import Catalog, Locked, catalog_source, source_units, text_recipe
from pretrain.data.described import CatalogFile, CatalogSource
from pretrain.data.errors import DataError
from pretrain.data.formats import TextFile, read_unit
from pretrain.data.json_fields import named as named_fields
from pretrain.data.order import lane_problem
from pretrain.data.prepared.check import check_shard
from pretrain.data.sources.retries import set_retry_minutes
from pretrain.data.split import Split, are_validation, is_validation
from pretrain.data.text_count import TextCount
from pretrain.data.tokenizer import DocumentEncoder
from pretrain.data.tokenizer_checks import lost_characters
from pretrain.data.units import DataFile, Unit

logger = logging.getLogger(__name__)

# Files are read in full until this many bytes have been read, and sampled from then on.
FULL_SCAN_BYTES = 512 << 20
_SAMPLE_BYTES = 1 << 20
# Text of each source that is tokenized to see whether that works.
_TRIED_BYTES = 1 << 18
# Of a remote source, rows and units that are read for that at most.
_TRIED_ROWS, _TRIED_UNITS = 10_000, 64


def check_sources(config: DataConfig) -> list[str]:
    """Read the sources and return every problem, one message each; see `survey`."""
    return survey(config)[1]


def survey(
    config: DataConfig,
    locked: Locked | None = None,
    encoder: DocumentEncoder | None = None,
    *,
    online: bool = True,
    counts: dict[int, TextCount] | None = None,
) -> tuple[Catalog, list[str]]:
    """Read the local sources, opening each file once; of remote ones, only the first texts and what the lock says.

    The first 512 MiB of files are read in full. Of files beyond that, only the beginning and the end are read (of
    compressed JSON lines, the beginning), and a warning in the log says so; such files can still raise the same
    `DataError` during training.

    Args:
        config: the sources.
        locked: what is known of the remote ones; those that are absent are resolved here, and of those without files
            (`pretrain.data.lock.unresolved`) nothing is checked.
        encoder: the tokenizer, which is tried on the first texts of each source; None: not tried.
        online: whether the first texts of remote sources are read for it.
        counts: receives what was counted of each source that was read in full, by its index.

    Returns:
        The catalog, and every problem that was found, one message each and at most one per file. If there are
        problems, the catalog is incomplete.

    """
    set_retry_minutes(config.retry_minutes)
    scan = _Scan(config)
    sources, problems, remote = [], [], 0
    for index, source in enumerate(config.sources):
        before = (scan.documents.total(), len(scan.sampled))
        scan.begin_source()
        found, faults = catalog_source(source, config, locked, partial(scan.file, source))
        remote += found.pinned is not None
        readable = found.pinned is None or (online and found.tokenizer is None)
        if encoder and not faults and readable:
            faults += _unencodable(scan.first_texts or _remote_texts(source, found, config), encoder)
        if found.tokenizer and found.pinned is None:  # copies of remote shards were checked when they were made
            faults += scan.shards(found.files)
        if not faults and found.pinned is None and before == (scan.documents.total(), len(scan.sampled)):
            faults = [_empty(source, scan.fields, scan.first_bad)]
        elif counts is not None and scan.count.documents and before[1] == len(scan.sampled):
            counts[index] = scan.count
        scan.fields.clear()
        sources.append(found)
        problems += faults
    catalog = Catalog(tuple(sources))
    if not problems:
        known = all(source.files for source in sources)
        if known and (problem := lane_problem(config, catalog.count_units(config))):
            problems.append(problem)
        if not scan.sampled and not remote:
            problems += _empty_splits(config, scan.documents)
    if scan.sampled:
        logger.warning(
            "the sources are larger than %d MiB: only the beginning and the end were checked of %d files, from %s on",
            FULL_SCAN_BYTES >> 20,
            len(scan.sampled),
            scan.sampled[0],
        )
    _warn_of_shared_files(config, sources)
    if scan.bad.rows and not problems:
        logger.warning(
            "%d bad rows were found, of the %d of data.max_bad_rows; they are skipped:\n%s",
            scan.bad.rows,
            config.max_bad_rows,
            "\n".join(str(bad) for bad in scan.bad.first),
        )
    return catalog, problems


def _empty(source: SourceConfig, fields: Collection[str], bad: BadRow | None) -> str:
    if source.where is None:
        if bad is not None:
            return f"{source.path}: no row holds any text that can be used, the first problem: {bad}"
        return f"{source.path}: the source is empty, no row holds any text"
    named = condition_fields(parse_condition(source.where))
    unknown = [field for field in named if field not in fields and field.split(".")[0] not in fields]
    hint = f"; {unknown[0]!r} is none of its fields: {named_fields(fields, unknown[0], 'fields')}" if unknown else ""
    return f"{source.path}: no row that meets where {source.where!r} holds any text{hint}"


def _warn_of_shared_files(config: DataConfig, sources: Iterable[CatalogSource]) -> None:
    """Say which sources read the same files: each of their documents comes once for each of them."""
    readers: dict[tuple[str, str | None], str] = {}
    shared: Counter[tuple[str, str]] = Counter()
    for name, source, found in zip(config.names, config.sources, sources, strict=True):
        for file in found.files:
            place = file.path if found.pinned is not None else os.path.realpath(file.path)
            first = readers.setdefault((place, source.where), name)
            if first != name:
                shared[first, name] += 1
    for (first, name), files in shared.items():
        logger.warning("the sources %s and %s both read %d files, whose documents come twice", first, name, files)


def _unencodable(texts: list[str], encoder: DocumentEncoder) -> list[str]:
    """Encode the first texts of a source; return the problem if that fails.

    A warning in the log names characters that the tokenizer would leave out.
    """
    try:
        encoded = encoder.encode(texts)
    except DataError as error:
        return [str(error)]
    if any(text.strip() for text in texts) and all(len(tokens) == 1 for tokens in encoded):
        return [
            f"tokenizer.path {encoder.path}: gives no token for any of the first texts of a source, for example for "
            f"{next(text for text in texts if text.strip())[:80]!r}: it was made for other text"
        ]
    if lost := lost_characters(encoder.tokenizer, texts):
        logger.warning(
            "tokenizer.path %s has no token for %d characters of the sources, not even one for unknown characters, and "
            "leaves them out, for example %s",
            encoder.path,
            len(lost),
            " ".join(lost[:10]),
        )
    return []


def _remote_texts(source: SourceConfig, found: CatalogSource, config: DataConfig) -> list[str]:
    """About the first 256 KiB of text of a remote source; none of a local one, whose files are read anyway.

    Less if the first rows hold no more, because few or none of them meet the condition of the source.
    """
    texts: list[str] = []
    if found.pinned is None:
        return texts
    size = rows = 0
    for unit in islice(source_units(source, found, config), _TRIED_UNITS):
        for _, text in read_unit(unit, 0, _TRIED_BYTES):
            rows += 1
            if text and isinstance(text, str):
                texts.append(text[:_TRIED_BYTES])
                size += len(texts[-1])
            if size >= _TRIED_BYTES or rows >= _TRIED_ROWS:
                return texts
    return texts


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
        self.begin_source()

    def begin_source(self) -> None:
        """Expect the files of another source."""
        self.first_texts: list[str] = []
        """About the first 256 KiB of text of the source, to try the tokenizer on."""
        self.first_bad: BadRow | None = None
        """The first bad row of the source."""
        self._untried = _TRIED_BYTES
        self.count = TextCount()
        """Of the texts of the source that were read."""

    def file(self, source: SourceConfig, file: CatalogFile, text: TextFile) -> None:
        """Read one file.

        Raises:
            DataError: the file is damaged, or one of its rows holds no valid text.

        """
        units = file.units(DataFile(file.path, file.bytes), text_recipe(source, self._config), split_units=1)
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
                self.first_bad = self.first_bad or one
                continue
            if self._untried > 0:
                self.first_texts.append(one[:_TRIED_BYTES])
                self._untried -= len(self.first_texts[-1])
            if encoded := one.encode():
                held_out = is_validation(encoded, self._config.validation_fraction)
                self.documents["validation" if held_out else "train"] += 1
                self.count.add(one, len(encoded))
        if source.where and before == self.documents.total():
            self.fields |= dict.fromkeys(text.field_names())

    def shards(self, files: Iterable[CatalogFile]) -> list[str]:
        """Check the shards of a source of prepared data; return every problem."""
        problems = []
        for file in files:
            in_full = file.bytes <= self._budget
            if in_full:
                self._budget -= file.bytes
            try:
                hashes = check_shard(file.path, in_full)
            except DataError as error:
                problems.append(str(error))
                continue
            if not in_full or hashes is None:
                self.sampled.append(file.path)
            if hashes is not None:
                validation = int(are_validation(hashes, self._config.validation_fraction).sum())
                self.documents += Counter({"validation": validation, "train": len(hashes) - validation})
        return problems


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
