"""The catalog: which files the data of a run consists of, listed, sized and digested once.

Rank 0 makes the catalog and hands it to the other ranks, which then open a file only to read its text. The catalog
also yields the fingerprint, by which the manifest describes the data and a resumed run recognises it.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypedDict

from tokenizers import Tokenizer

from pretrain.config.data import DataConfig, SourceConfig, TokenizerConfig
from pretrain.data.errors import DataError
from pretrain.data.formats import SUFFIXES, TextFile, text_file
from pretrain.data.prepared.check import tokenizer_problem
from pretrain.data.prepared.reading import TokenizerNeeds, TokenSource, token_source
from pretrain.data.sources import list_files, open_bytes, size_of
from pretrain.data.tokenizer import separator_id, vocabulary_rows
from pretrain.data.units import DataFile, TextRecipe, Unit
from pretrain.files import file_sha256

_HASHED_BYTES = 1 << 20
_MAX_NAMES = 64  # a column with more distinct values than this describes rows rather than sources


@dataclass(frozen=True, slots=True)
class CatalogFile:
    """One file."""

    path: str
    """Spelt as in the config."""
    bytes: int
    row_groups: tuple[int, ...] | None
    """Rows of each row group of a parquet file, documents of each unit of a prepared shard, tokens of each unit of a
    `.bin` shard; None for JSON lines, which would have to be read."""
    sha256: str
    """Of the first MiB, the last MiB and the size in decimal digits, in this order."""

    def units(self, recipe: TextRecipe, split_units: int) -> list[Unit]:
        """Return the read units of the file: its row groups, or the file itself, each divided by `split_units`."""
        groups: list[tuple[int | None, int | None]] = [(None, None)]
        if self.row_groups is not None:
            groups = list(enumerate(self.row_groups))
        return [
            Unit(DataFile(self.path, self.bytes), recipe, group, rows, part, split_units)
            for group, rows in groups
            for part in range(split_units)
        ]


@dataclass(frozen=True, slots=True)
class CatalogSource:
    """One source of the config."""

    path: str
    files: tuple[CatalogFile, ...]
    """In the order in which they are numbered for reading: by name."""
    names: tuple[str, ...]
    """The values of a parquet column `source`, sorted; empty if there is none, or more than 64 values."""
    licences: tuple[str, ...]
    """The values of a parquet column `licence` or `license`, likewise; if there are none, the config's `licence`."""
    tokenizer: TokenizerNeeds | None = None
    """The tokenizer that the tokens of prepared data were made with; None: the source is text."""


@dataclass(frozen=True, slots=True)
class Catalog:
    """All sources, in the order of the config. Can be pickled."""

    sources: tuple[CatalogSource, ...]

    def units(self, config: DataConfig) -> tuple[tuple[Unit, ...], ...]:
        """Return the read units of each source, in order.

        Raises:
            ValueError: the catalog was made from other sources.

        """
        if [source.path for source in config.sources] != [source.path for source in self.sources]:
            raise ValueError("the catalog was made from other sources than those of the config")
        return tuple(
            tuple(unit for file in found.files for unit in file.units(text_recipe(source), source.split_units))
            for source, found in zip(config.sources, self.sources, strict=True)
        )


def text_recipe(source: SourceConfig) -> TextRecipe:
    """How a row of a source becomes text."""
    return TextRecipe(source.text_field)


def make_catalog(config: DataConfig) -> Catalog:
    """List the files of all sources and open each of them once.

    Raises:
        DataError: with a line for every source that cannot be listed and every file that cannot be read. The texts
            themselves are not read; `pretrain.data.check.survey` does both.

    """
    found = [catalog_source(source) for source in config.sources]
    if problems := [problem for _, problems in found for problem in problems]:
        raise DataError("\n".join(problems))
    return Catalog(tuple(source for source, _ in found))


Visit = Callable[[CatalogFile, TextFile], None]


def catalog_source(source: SourceConfig, visit: Visit | None = None) -> tuple[CatalogSource, list[str]]:
    """Describe one source; return what was found and every problem, at most one per file.

    Args:
        source: the source.
        visit: called with each file while it is open. A `DataError` that it raises counts as a problem of the file.

    """
    try:
        if tokens := token_source(source.path):
            return _prepared(source, tokens)
    except DataError as error:
        return CatalogSource(source.path, (), (), ()), [str(error)]
    files: list[CatalogFile] = []
    names: set[str] = set()
    licences: set[str] = set()
    problems: list[str] = []
    try:
        paths = list_files(source.path, SUFFIXES)
    except DataError as error:
        paths, problems = [], [str(error)]
    for path in paths:
        try:
            with open_bytes(DataFile(path)) as file:
                size, digest = _digest(file, path)
                text = text_file(file, path, text_recipe(source))
                names |= text.values("source", _MAX_NAMES)
                licences |= text.values("licence", _MAX_NAMES) | text.values("license", _MAX_NAMES)
                files.append(CatalogFile(path, size, text.row_groups(), digest))
                if visit:
                    visit(files[-1], text)
        except DataError as error:
            problems.append(str(error))
    licences = _few(licences) or ({source.licence} if source.licence else set())
    return CatalogSource(source.path, tuple(files), tuple(sorted(_few(names))), tuple(sorted(licences))), problems


def _prepared(source: SourceConfig, found: TokenSource) -> tuple[CatalogSource, list[str]]:
    """Describe a source of prepared data."""
    files = tuple(CatalogFile(file.path, file.bytes, file.units, file.sha256) for file in found.files)
    licences = found.licences or ((source.licence,) if source.licence else ())
    problems = []
    if source.text_field != SourceConfig.model_fields["text_field"].default:
        problems.append(f"{source.path}: holds tokens, not text: text_field has no effect, remove it")
    return CatalogSource(source.path, files, found.names, licences, found.tokenizer), problems


def _few(values: set[str]) -> set[str]:
    return values if len(values) <= _MAX_NAMES else set()


def _digest(file: BinaryIO, path: str) -> tuple[int, str]:
    try:
        size = size_of(file)
        digest = hashlib.sha256(file.read(_HASHED_BYTES))
        file.seek(max(0, size - _HASHED_BYTES), io.SEEK_SET)
        digest.update(file.read(_HASHED_BYTES))
        file.seek(0)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    digest.update(str(size).encode())
    return size, digest.hexdigest()


def tokenizer_problems(catalog: Catalog, tokenizer: Tokenizer, config: TokenizerConfig) -> list[str]:
    """Return a line for each source of prepared data whose tokens were made with another tokenizer."""
    if not any(source.tokenizer for source in catalog.sources):
        return []
    sha256 = file_sha256(Path(config.path))
    eos_id, rows = separator_id(tokenizer, config), vocabulary_rows(tokenizer)
    found = (
        tokenizer_problem(source.path, source.tokenizer, config.path, sha256, eos_id, rows)
        for source in catalog.sources
        if source.tokenizer
    )
    return [problem for problem in found if problem]


class FileFingerprint(TypedDict):
    """One file; the fields are those of `CatalogFile`."""

    path: str
    bytes: int
    rows: int | None
    """Rows of a parquet file; None for JSON lines."""
    sha256: str


class SourceFingerprint(TypedDict):
    """One source of the config; the fields are those of `CatalogSource`."""

    path: str
    sources: list[str]
    licences: list[str]
    bytes: int
    files: list[FileFingerprint]


class DataFingerprint(TypedDict):
    """All sources, in the order of the config, as the manifest of a run holds them."""

    bytes: int
    sources: list[SourceFingerprint]


def fingerprint(config: DataConfig, catalog: Catalog | None = None) -> DataFingerprint:
    """Describe the data as JSON; equal on every machine as long as the files and their paths are.

    Args:
        config: the sources.
        catalog: their catalog; made here if there is none.

    Raises:
        DataError: a file is missing or damaged.

    """
    sources = [_source_fingerprint(source) for source in (catalog or make_catalog(config)).sources]
    return DataFingerprint(bytes=sum(source["bytes"] for source in sources), sources=sources)


def _source_fingerprint(source: CatalogSource) -> SourceFingerprint:
    return SourceFingerprint(
        path=source.path,
        sources=list(source.names),
        licences=list(source.licences),
        bytes=sum(file.bytes for file in source.files),
        files=[
            FileFingerprint(
                path=file.path,
                bytes=file.bytes,
                rows=None if file.row_groups is None else sum(file.row_groups),
                sha256=file.sha256,
            )
            for file in source.files
        ],
    )
