"""Files of this machine: a file, a folder or a glob."""

import errno
import functools
import glob
import logging
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pretrain.data.errors import DataError
from pretrain.data.sources.names import Pattern, choose, is_hidden, some
from pretrain.data.units import DataFile
from pretrain.files import NO_DATA, irregular

logger = logging.getLogger(__name__)

# A folder may be linked to from several others, but folders full of links to one another have no end in practice.
_MOST_VISITS = 100


def list_local(path: str, suffixes: tuple[str, ...]) -> list[DataFile]:
    """List a file, a folder or a glob; see `pretrain.data.sources.list_files`."""
    if os.path.isdir(path):
        root, found = path, list(_walk(path, enters_hidden=False))
        names = [str(name) for name in sorted(map(Path, found))]
        chosen = [str(Path(root, name)) for name in choose(path, names, suffixes)]
    elif os.path.lexists(path):
        chosen = [os.path.join(os.path.dirname(path), name) for name in _named(path, suffixes)]
    elif glob.has_magic(path):
        pattern = Pattern(path)
        walked = _walk(pattern.folder, pattern.enters_hidden, pattern.depth)
        matching = [name for name in walked if name.rstrip("/") in pattern]
        if folders := [name for name in matching if name.lower().endswith(tuple(f"{end}/" for end in suffixes))]:
            raise DataError(
                f"{path}: {some(sorted(folders))}: is a folder, whose files the pattern does not match: write "
                f"{path}/* to read those, or name the folder as a source"
            )
        matching = [name for name in matching if not name.endswith("/")]
        if not matching:
            raise DataError(f"{path}: no such file or folder, and no file matches it as a pattern")
        names = choose(path, sorted(matching), suffixes, hidden=pattern.enters_hidden)
        chosen = [pattern.folder + name for name in names]
    else:
        raise DataError(f"{path}: no such file or folder, and no file matches it as a pattern")
    files = [regular_file(name) for name in chosen]
    _warn_of_doubles(path, chosen)
    return files


def open_local(path: str) -> BinaryIO:
    """Open a file of this machine.

    Raises:
        DataError: it cannot be opened, or it is not a regular file.

    """
    regular_file(path)
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _named(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """The base name of a file that the config names itself, which may be hidden, if it can be read."""
    regular_file(path)
    base = os.path.basename(path)
    if not base.lower().endswith(suffixes):
        raise DataError(f"{path}: unknown kind of file, expected one of {', '.join(suffixes)}")
    return [base]


def _walk(folder: str, enters_hidden: bool, depth: int | None = None) -> Iterator[str]:
    """Yield the names below a folder, relative to it, of everything that is not a folder; in any order.

    Linked folders are followed, except into a folder that they are in. Hidden folders are yielded, not entered. Folders
    `depth` parts below are not entered either, and yielded with a `/` behind the name.
    """
    visits: Counter[tuple[int, int]] = Counter()
    todo: list[tuple[str, int | None, frozenset[tuple[int, int]]]] = [("", depth, frozenset())]
    while todo:
        below, levels, above = todo.pop()
        place = os.path.join(folder, below)
        here = _identity(place)
        if here is None or here in above:
            continue
        if here[0] in _kernel_devices():
            raise DataError(
                f"{folder}: {os.path.realpath(place)} belongs to the kernel and is not a folder of data: name the "
                "folders that hold data"
            )
        visits[here] += 1
        if visits[here] > _MOST_VISITS:
            raise DataError(
                f"{folder}: links lead into {os.path.realpath(place)} more than {_MOST_VISITS} times: remove them, or "
                "name the files to be read by a pattern"
            )
        for entry in _entries(place):
            name = below + entry.name
            if not _is_folder(entry) or (is_hidden(entry.name) and not enters_hidden):
                yield name
            elif levels == 1:
                yield f"{name}/"
            else:
                todo.append((f"{name}/", None if levels is None else levels - 1, above | {here}))


@functools.cache
def _kernel_devices() -> frozenset[int]:
    """The file systems of `NO_DATA`, where they are mounted."""
    found = {os.stat(root).st_dev for root in NO_DATA if os.path.isdir(root)}
    return frozenset(found - {os.stat("/").st_dev})


def _identity(folder: str) -> tuple[int, int] | None:
    """What tells a folder from all others, under whatever name; None if it is gone."""
    try:
        found = os.stat(folder or ".")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{folder}: the folder cannot be read: {error}") from error
    return found.st_dev, found.st_ino


def _entries(folder: str) -> "list[os.DirEntry[str]]":
    try:
        return list(os.scandir(folder or "."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{folder}: the folder cannot be read: {error}") from error


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself, which is reported if its name is that of a file of data
            return False
        raise DataError(f"{entry.path}: cannot be read: {error}") from error


def regular_file(path: str) -> DataFile:
    """Return a file and its size.

    Raises:
        DataError: it cannot be read, or is something else: a device or a pipe, which might never end.

    """
    try:
        found = os.stat(path)
    except OSError as error:
        gone = f", a link to {os.readlink(path)}" if os.path.islink(path) else ""
        raise DataError(f"{path}{gone}: cannot be read: {error}") from error
    if irregular(path):
        raise DataError(f"{path}: is not a regular file, so its contents are not fixed: copy the data into a file")
    return DataFile(path, found.st_size)


def _warn_of_doubles(source: str, files: list[str]) -> None:
    """Say which files are the same one under two names, which is read twice then."""
    seen: dict[str, str] = {}
    doubles = []
    for file in files:
        first = seen.setdefault(os.path.realpath(file), file)
        if first != file:
            doubles.append(f"{file} is {first}")
    if doubles:
        logger.warning("%s: %d links are to files that are read anyway: %s", source, len(doubles), some(doubles))
