"""Resolving remote sources: list their files, read the footers of the parquet files, pin the revision.

The work is divided such that an interruption loses little: every footer that was read goes into a journal, from which
the next attempt takes those whose file has not changed.
"""

import json
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import IO, BinaryIO, Self

from pretrain.data.bad_rows import BadRow
from pretrain.data.described import CatalogFile, CatalogSource, remote_digest
from pretrain.data.errors import DataError, DataUnavailableError
from pretrain.data.formats import SUFFIXES, text_file
from pretrain.data.lock import locked_source
from pretrain.data.prepared import speedrun
from pretrain.data.prepared.remote import described_source, listed_suffixes, prepared_source
from pretrain.data.sources import list_files, open_bytes
from pretrain.data.sources.hub import HubPath, licences_of
from pretrain.data.sources.retries import stopping
from pretrain.data.units import DataFile, TextRecipe, Unit

CONCURRENT = 16
"""Footers that are read at the same time."""
_MOST_PROBLEMS = 20
_MOST_TRIED = 100
"""Bad rows at the beginning of a source, whatever `data.max_bad_rows` allows: more mean that it has no such field."""


class Journal(AbstractContextManager["Journal"]):
    """The footers that an interrupted attempt has read: a file of JSON lines, or nothing.

    Args:
        path: the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known = dict(_journal_entries(path)) if path else {}
        self._file: IO[str] | None = None
        self._guard = threading.Lock()

    def __enter__(self) -> Self:
        if self._path:
            try:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                torn = self._path.exists() and not self._path.read_bytes().endswith(b"\n")
                self._file = self._path.open("a", encoding="utf-8")
                self._file.write("\n" if torn else "")
            except OSError as error:
                raise DataError(f"{self._path}: cannot be written: {error}") from None
        return self

    def __exit__(self, *_: object) -> None:
        if self._file:
            self._file.close()

    def row_groups(self, path: str, digest: str) -> tuple[int, ...] | None:
        """Return what an earlier attempt found in this version of a file."""
        return self._known.get((path, digest))

    def add(self, path: str, digest: str, row_groups: Sequence[int]) -> None:
        """Note the footer of a file. May be called by several threads."""
        if self._file:
            with self._guard:
                self._file.write(json.dumps([path, digest, list(row_groups)]) + "\n")
                self._file.flush()


def _journal_entries(path: Path) -> Iterator[tuple[tuple[str, str], tuple[int, ...]]]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            name, digest, groups = json.loads(line)
            yield (name, digest), tuple(map(int, groups))
        except (ValueError, TypeError):
            continue  # torn by the interruption


def resolve_source(
    path: str, recipe: TextRecipe, journal: Journal | None = None, max_bad_rows: int = 0
) -> CatalogSource:
    """List the files of a remote source and read the footers of the parquet files.

    Args:
        path: its path as in the config.
        recipe: how a row becomes text.
        journal: what an earlier attempt has found, and where this one notes what it finds.
        max_bad_rows: the bad rows that may be skipped.

    Raises:
        DataError: it cannot be listed, or with a line for every file that cannot be read (the first 20).

    """
    journal = journal or Journal(None)
    listed = list_files(path, listed_suffixes(path, SUFFIXES))
    pinned, revision = _pinned(path, listed)
    if prepared := prepared_source(path, listed):
        return described_source(path, pinned, revision, _licences(pinned), *prepared)
    _look_at_first(listed, recipe, max_bad_rows)
    files: list[CatalogFile] = []
    problems: list[str] = []
    with ThreadPoolExecutor(CONCURRENT) as pool:
        for found in _bounded(pool, listed, recipe, journal):
            if isinstance(found, str):
                problems.append(found)
            else:
                files.append(found)
    if len(problems) > _MOST_PROBLEMS:
        problems[_MOST_PROBLEMS:] = [f"{path}: and {len(problems) - _MOST_PROBLEMS} more files that cannot be read"]
    if problems:
        raise DataError("\n".join(problems))
    source = locked_source(path, pinned, files, revision, _licences(pinned))
    return replace(source, tokenizer=speedrun.NEEDS) if files[0].path.endswith(speedrun.SUFFIX) else source


def _licences(pinned: str) -> tuple[str, ...]:
    return licences_of(pinned) if pinned.startswith("hf://") else ()


def _bounded(
    pool: ThreadPoolExecutor, listed: Sequence[DataFile], recipe: TextRecipe, journal: Journal
) -> Iterator[CatalogFile | str]:
    """Yield a description of every file, or what is wrong with it; few tasks wait at any time."""
    waiting: set[Future[CatalogFile | str]] = set()
    rest = iter(listed)
    try:
        while True:
            new = islice(rest, 2 * CONCURRENT - len(waiting))
            waiting |= {pool.submit(_describe, file, recipe, journal) for file in new}
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    finally:
        for future in waiting:
            future.cancel()
        with stopping():  # an interrupt must not wait as long as a server may
            wait(waiting)


def _describe(file: DataFile, recipe: TextRecipe, journal: Journal) -> CatalogFile | str:
    digest = remote_digest(file)
    if file.bytes is None or digest is None:
        return f"{file.path}: the server states neither a size nor a version (ETag), so it cannot be locked"
    groups = None
    if _has_row_groups(file.path):
        groups = journal.row_groups(file.path, digest)
        if groups is None:
            try:
                with open_bytes(file) as opened:
                    groups = _read_row_groups(opened, file.path, recipe)
            except DataUnavailableError:
                raise
            except DataError as error:
                return str(error)
            journal.add(file.path, digest, groups or ())
    return CatalogFile(file.path, file.bytes, groups, digest)


def _has_row_groups(path: str) -> bool:
    return path.lower().endswith((".parquet", speedrun.SUFFIX))


def _read_row_groups(opened: BinaryIO, path: str, recipe: TextRecipe) -> tuple[int, ...] | None:
    if path.lower().endswith(speedrun.SUFFIX):
        return speedrun.unit_tokens(opened, path)
    return text_file(opened, path, recipe).row_groups()


def _look_at_first(listed: Sequence[DataFile], recipe: TextRecipe, max_bad_rows: int) -> None:
    """Read a good row of the first file without a footer, to find a wrong `text_field` here rather than in training."""
    first = next((file for file in listed if not _has_row_groups(file.path)), None)
    if first is None:
        return
    unit, bad = Unit(first, recipe, None, None, 0, 1), list[BadRow]()
    with open_bytes(first) as opened:
        for _, text in text_file(opened, first.path, recipe).rows(unit, 0, 1 << 16):
            if not isinstance(text, BadRow):
                return
            bad.append(text)
            if len(bad) > min(max_bad_rows, _MOST_TRIED):
                raise DataError(str(bad[0]))


def _pinned(path: str, listed: Sequence[DataFile]) -> tuple[str, str | None]:
    """Return the path with the commit at which its files were listed, and the commit; other stores have none."""
    if not path.startswith("hf://") or not listed:
        return path, None
    commit = HubPath.parse(listed[0].path).revision
    return str(replace(HubPath.parse(path), revision=commit)), commit
