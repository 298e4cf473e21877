"""The catalog: which files the data of a run consists of, listed, sized and digested once.

Rank 0 makes the catalog and hands it to the other ranks, which then open a file only to read its text. The catalog
also yields the fingerprint, by which the manifest describes the data and a resumed run recognises it.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO, TypedDict

from pretrain.config.data import DataConfig, SourceConfig
from pretrain.data.errors import DataError, DataUnavailableError
from pretrain.data.formats import SUFFIXES, TextFile, text_file
from pretrain.data.sources import list_files, open_bytes, size_of
from pretrain.data.sources.retries import set_retry_minutes
from pretrain.data.units import DataFile, TextRecipe, Unit

_HASHED_BYTES = 1 << 20
_MAX_NAMES = 64  # a column with more distinct values than this describes rows rather than sources


@dataclass(frozen=True, slots=True)
class CatalogFile:
    """One file."""

    path: str
    """Spelt as in the config."""
    bytes: int
    row_groups: tuple[int, ...] | None
    """Rows of each row group of a parquet file; None for JSON, which would have to be read."""
    sha256: str
    """Of the first MiB, the last MiB and the size in decimal digits, in this order."""
    etag: str | None = None
    """What the server of a remote file calls this version of it."""

    def units(self, recipe: TextRecipe, split_units: int) -> list[Unit]:
        """Return the read units of the file: its row groups, or the file itself, each divided by `split_units`."""
        groups: list[tuple[int | None, int | None]] = [(None, None)]
        if self.row_groups is not None:
            groups = list(enumerate(self.row_groups))
        return [
            Unit(DataFile(self.path, self.bytes, self.etag), recipe, group, rows, part, split_units)
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
            tuple(unit for file in found.files for unit in file.units(text_recipe(source, config), source.split_units))
            for source, found in zip(config.sources, self.sources, strict=True)
        )


def text_recipe(source: SourceConfig, config: DataConfig) -> TextRecipe:
    """Return which rows of a source are read, and how they become text."""
    return TextRecipe(source.text_field, source.where, config.max_document_mib << 20, config.max_zstd_window_mib << 20)


def make_catalog(config: DataConfig) -> Catalog:
    """List the files of all sources and open each of them once.

    Raises:
        DataError: with a line for every source that cannot be listed and every file that cannot be read. The texts
            themselves are not read; `pretrain.data.check.survey` does both.

    """
    set_retry_minutes(config.retry_minutes)
    found = [catalog_source(source, config) for source in config.sources]
    if problems := [problem for _, problems in found for problem in problems]:
        raise DataError("\n".join(problems))
    return Catalog(tuple(source for source, _ in found))


Visit = Callable[[CatalogFile, TextFile], None]


def catalog_source(
    source: SourceConfig, config: DataConfig, visit: Visit | None = None
) -> tuple[CatalogSource, list[str]]:
    """Describe one source; return what was found and every problem, at most one per file.

    A server that does not answer is not a problem of the source but raises `DataUnavailableError`.

    Args:
        source: the source.
        config: the section that it is part of.
        visit: called with each file while it is open. A `DataError` that it raises counts as a problem of the file.

    """
    files: list[CatalogFile] = []
    names: set[str] = set()
    licences: set[str] = set()
    problems: list[str] = []
    try:
        listed = list_files(source.path, SUFFIXES)
    except DataUnavailableError:
        raise
    except DataError as error:
        listed, problems = [], [str(error)]
    for data in listed:
        path = data.path
        try:
            with open_bytes(data) as file:
                size, digest = _digest(file, path)
                text = text_file(file, path, text_recipe(source, config))
                names |= text.values("source", _MAX_NAMES)
                licences |= text.values("licence", _MAX_NAMES) | text.values("license", _MAX_NAMES)
                files.append(CatalogFile(path, size, text.row_groups(), digest, data.etag))
                if visit:
                    visit(files[-1], text)
        except DataUnavailableError:
            raise
        except DataError as error:
            problems.append(str(error))
    licences = _few(licences) or ({source.licence} if source.licence else set())
    return CatalogSource(source.path, tuple(files), tuple(sorted(_few(names))), tuple(sorted(licences))), problems


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
