"""The catalog: which files the data of a run consists of, listed, sized and digested once.

Local files are opened for that; what is known of remote ones comes from a lock (`pretrain.data.lock`). Rank 0
makes the catalog and hands it to the other ranks, which then open a file only to read its text. The catalog also yields
the fingerprint, by which the manifest describes the data and a resumed run recognises it.
"""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NotRequired, TypedDict

from tokenizers import Tokenizer

from pretrain.config.data import DataConfig, SourceConfig, TokenizerConfig, is_remote
from pretrain.data.cache import CachedFile, DiskCache
from pretrain.data.described import CatalogFile, CatalogSource, remote_file
from pretrain.data.errors import DataError, DataUnavailableError
from pretrain.data.formats import SUFFIXES, TextFile, text_file
from pretrain.data.lock import Lock, lock_of
from pretrain.data.mirror import mirror_name
from pretrain.data.prepared.check import tokenizer_problem
from pretrain.data.prepared.reading import TokenSource, cached_shards, token_source
from pretrain.data.resolve import Journal, resolve_source
from pretrain.data.sources import list_files, open_bytes, size_of
from pretrain.data.sources.retries import set_retry_minutes
from pretrain.data.tokenizer import separator_id, vocabulary_rows
from pretrain.data.units import DataFile, TextRecipe, Unit
from pretrain.files import file_sha256
from pretrain.processes.redaction import redact

_HASHED_BYTES = 1 << 20
_MAX_NAMES = 64  # a column with more distinct values than this describes rows rather than sources


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
            tuple(source_units(source, found, config))
            for source, found in zip(config.sources, self.sources, strict=True)
        )

    def count_units(self, config: DataConfig) -> list[int]:
        """Return the number of read units of each source."""
        return [
            sum(1 if file.row_groups is None else len(file.row_groups) for file in found.files) * source.split_units
            for source, found in zip(config.sources, self.sources, strict=True)
        ]


def source_units(source: SourceConfig, found: CatalogSource, config: DataConfig) -> Iterator[Unit]:
    """Yield the read units of one source, in order."""
    recipe = text_recipe(source, config)  # one object for all units, which are handed to workers together
    place = _places(found, config)
    for file in found.files:
        yield from file.units(place(file), recipe, source.split_units)


def text_recipe(source: SourceConfig, config: DataConfig) -> TextRecipe:
    """Return which rows of a source are read, and how they become text."""
    return TextRecipe(source.text_field, source.where, config.max_document_mib << 20, config.max_zstd_window_mib << 20)


Locked = Mapping[str, CatalogSource]
"""The remote sources of a config by path, from `pretrain.data.lock.locked_sources`."""


def make_catalog(config: DataConfig, locked: Locked | None = None) -> Catalog:
    """List the files of all local sources and open each of them once.

    Args:
        config: the sources.
        locked: what is known of the remote ones; those that are absent are resolved here.

    Raises:
        DataError: with a line for every source that cannot be listed and every file that cannot be read. The texts
            themselves are not read; `pretrain.data.check.survey` does both.

    """
    set_retry_minutes(config.retry_minutes)
    found = [catalog_source(source, config, locked) for source in config.sources]
    if problems := [problem for _, problems in found for problem in problems]:
        raise DataError("\n".join(problems))
    return Catalog(tuple(source for source, _ in found))


def resolve_sources(config: DataConfig, journal: Path | None = None, say: Callable[[str], None] | None = None) -> Lock:
    """List the files of all remote sources, read the footers of the parquet files, pin the revisions.

    Args:
        config: the sources.
        journal: a file for what was found so far, from which an interrupted attempt continues. It is left in place:
            delete it once the lock is saved.
        say: prints a line for each source.

    Raises:
        DataError: with a line for every source and file that cannot be read.

    """
    set_retry_minutes(config.retry_minutes)
    found: dict[str, CatalogSource] = {}
    problems: list[str] = []
    with Journal(journal) as notes:
        for source in config.sources:
            if not is_remote(source.path) or source.path in found:
                continue
            try:
                resolved = resolve_source(source.path, text_recipe(source, config), notes, config.max_bad_rows)
            except DataUnavailableError:
                raise
            except DataError as error:
                problems.append(str(error))
                continue
            found[source.path] = resolved
            if say:
                say(f"{redact(resolved.pinned)}: {len(resolved.files):,} files, {resolved.bytes:,} bytes")
    if problems:
        raise DataError("\n".join(problems))
    return lock_of(found.values())


Visit = Callable[[CatalogFile, TextFile], None]


def catalog_source(
    source: SourceConfig, config: DataConfig, locked: Locked | None = None, visit: Visit | None = None
) -> tuple[CatalogSource, list[str]]:
    """Describe one source; return what was found and every problem, at most one per file.

    A server that does not answer is not a problem of the source but raises `DataUnavailableError`.

    Args:
        source: the source.
        config: the section that it is part of.
        locked: what is known of the remote sources.
        visit: called with each file of a local source while it is open. A `DataError` that it raises counts as a
            problem of the file.

    """
    if is_remote(source.path):
        return _remote_source(source, config, locked or {})
    try:
        if tokens := token_source(source.path):
            return _prepared(source, config, tokens)
    except DataError as error:
        return CatalogSource(source.path, (), (), ()), [str(error)]
    files: list[CatalogFile] = []
    names: set[str] = set()
    licences: set[str] = set()
    problems: list[str] = []
    try:
        listed = list_files(source.path, SUFFIXES)
    except DataError as error:
        listed, problems = [], [str(error)]
    for found in listed:
        path = found.path
        try:
            with open_bytes(found) as file:
                size, digest = _digest(file, path)
                text = text_file(file, path, text_recipe(source, config))
                names |= text.values("source", _MAX_NAMES)
                licences |= text.values("licence", _MAX_NAMES) | text.values("license", _MAX_NAMES)
                files.append(CatalogFile(path, size, text.row_groups(), digest))
                if visit:
                    visit(files[-1], text)
        except DataUnavailableError:
            raise
        except DataError as error:
            problems.append(str(error))
    licences = _few(licences) or ({source.licence} if source.licence else set())
    return CatalogSource(source.path, tuple(files), tuple(sorted(_few(names))), tuple(sorted(licences))), problems


def _remote_source(source: SourceConfig, config: DataConfig, locked: Locked) -> tuple[CatalogSource, list[str]]:
    found = locked.get(source.path)
    try:
        recipe = text_recipe(source, config)
        found = found or resolve_source(source.path, recipe, max_bad_rows=config.max_bad_rows)
    except DataUnavailableError:
        raise
    except DataError as error:
        return CatalogSource(source.path, (), (), ()), str(error).splitlines()
    if not found.licences and source.licence:
        found = replace(found, licences=(source.licence,))
    return found, _token_problems(source, config, found) if found.tokenizer else []


def _token_problems(source: SourceConfig, config: DataConfig, found: CatalogSource) -> list[str]:
    """What keeps a source from being read as prepared data."""
    problems = []
    if source.text_field != SourceConfig.model_fields["text_field"].default:
        problems.append(f"{source.path}: holds tokens, not text: text_field has no effect, remove it")
    if found.pinned is not None and config.mirror is None and config.cache_dir is None:
        problems.append(
            f"{redact(source.path)}: prepared data is mapped into memory, so it has to be on this machine: set "
            "data.cache_dir to a folder on a local disk, or copy it with `aurora data fetch` and set data.mirror"
        )
    return problems


def _places(source: CatalogSource, config: DataConfig) -> Callable[[CatalogFile], DataFile]:
    """Return what says where the bytes of a file come from: never part of a run's identity."""
    if source.pinned is None:
        return lambda file: DataFile(file.path, file.bytes)
    if config.mirror is not None:
        mirror = Path(config.mirror)
        return lambda file: DataFile(mirror_name(mirror, file.path), file.bytes)
    if config.cache_dir is None:
        return remote_file
    cache = DiskCache(config.cache_dir, int(config.cache_gib * (1 << 30)))

    def cached(file: CatalogFile) -> CachedFile:
        remote = remote_file(file)
        return CachedFile(remote.path, remote.bytes, remote.etag, remote.sha256, cache)

    if source.tokenizer is None:
        return cached
    shards = {file.path: file for file in cached_shards([cached(file) for file in source.files])}
    return lambda file: shards[file.path]


def _prepared(source: SourceConfig, config: DataConfig, found: TokenSource) -> tuple[CatalogSource, list[str]]:
    """Describe a source of prepared data."""
    files = tuple(CatalogFile(file.path, file.bytes, file.units, file.sha256) for file in found.files)
    licences = found.licences or ((source.licence,) if source.licence else ())
    described = CatalogSource(source.path, files, found.names, licences, tokenizer=found.tokenizer, origin=found.origin)
    return described, _token_problems(source, config, described)


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


def require_text(catalog: Catalog) -> None:
    """Refuse prepared data where only text will do.

    Raises:
        DataError: with a line for each source that holds tokens.

    """
    if tokens := [source.path for source in catalog.sources if source.tokenizer is not None]:
        cure = "holds tokens, not text: name the source that it was prepared from"
        raise DataError("\n".join(f"{path}: {cure}" for path in tokens))


class FileFingerprint(TypedDict):
    """One file; the fields are those of `CatalogFile`."""

    path: str
    bytes: int
    rows: int | None
    """Rows of a parquet file; None for JSON lines."""
    sha256: str


class LockedFingerprint(TypedDict):
    """What stands for the files of a remote source, which may be 100,000; the run folder's lock lists them."""

    pinned: str
    revision: str | None
    files: int
    rows: int | None
    """None if there are files whose rows have not been counted."""
    sha256: str
    """`CatalogSource.contents`."""


class SourceFingerprint(TypedDict):
    """One source of the config; the fields are those of `CatalogSource`."""

    path: str
    sources: list[str]
    licences: list[str]
    bytes: int
    files: NotRequired[list[FileFingerprint]]
    """Of a local source."""
    locked: NotRequired[LockedFingerprint]
    """Of a remote source."""
    origin: NotRequired[dict[str, Any]]
    """Of a prepared folder: `pretrain.data.prepared.layout.Origin`, the source of text that it was made from."""


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
    described = SourceFingerprint(
        path=redact(source.path), sources=list(source.names), licences=list(source.licences), bytes=source.bytes
    )
    if source.origin is not None:
        described["origin"] = asdict(source.origin) | {"path": redact(source.origin.path)}
    if source.pinned is not None:
        rows = [_rows(file) for file in source.files]
        described["locked"] = LockedFingerprint(
            pinned=source.pinned,
            revision=source.revision,
            files=len(source.files),
            rows=None if None in rows else sum(filter(None, rows)),
            sha256=source.contents,
        )
    else:
        described["files"] = [
            FileFingerprint(path=file.path, bytes=file.bytes, rows=_rows(file), sha256=file.digest)
            for file in source.files
        ]
    return described


def _rows(file: CatalogFile) -> int | None:
    return None if file.row_groups is None else sum(file.row_groups)
