"""Files of this machine: a file, a folder or a glob."""

import glob
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from pretrain.data.errors import DataError
from pretrain.data.sources.names import Pattern, choose, is_hidden, some
from pretrain.data.units import DataFile

logger = logging.getLogger(__name__)

_NO_DATA = ("/dev", "/proc", "/sys")


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
        matching = [name for name in _walk(pattern.folder, pattern.enters_hidden, pattern.depth) if name in pattern]
        if not matching:
            raise DataError(f"{path}: no such file or folder, and no file matches it as a pattern")
        names = choose(path, sorted(matching), suffixes, hidden=pattern.enters_hidden)
        chosen = [pattern.folder + name for name in names]
    else:
        raise DataError(f"{path}: no such file or folder, and no file matches it as a pattern")
    files = [_checked(name) for name in chosen]
    _warn_of_doubles(path, chosen)
    return files


def open_local(path: str) -> BinaryIO:
    """Open a file of this machine.

    Raises:
        DataError: it cannot be opened, or it is not a regular file.

    """
    _checked(path)
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def _named(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """The base name of a file that the config names itself, which may be hidden, if it can be read."""
    _checked(path)
    base = os.path.basename(path)
    if not base.lower().endswith(suffixes):
        raise DataError(f"{path}: unknown kind of file, expected one of {', '.join(suffixes)}")
    return [base]


def _walk(folder: str, enters_hidden: bool, depth: int | None = None, above: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield the names below a folder, relative to it, of everything that is not a folder.

    Linked folders are followed, except into a folder that they are in. Hidden folders are yielded, not entered.
    """
    here = os.path.realpath(folder or ".")
    try:
        entries = sorted(os.scandir(folder or "."), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    except OSError as error:
        raise DataError(f"{folder}: the folder cannot be read: {error}") from error
    for entry in entries:
        if not entry.is_dir() or (is_hidden(entry.name) and not enters_hidden):
            yield entry.name
        elif depth != 1 and os.path.realpath(entry.path) not in (*above, here):
            below = None if depth is None else depth - 1
            for name in _walk(entry.path, enters_hidden, below, (*above, here)):
                yield f"{entry.name}/{name}"


def _checked(path: str) -> DataFile:
    """A regular file and its size."""
    try:
        found = os.stat(path)
    except OSError as error:
        gone = f", a link to {os.readlink(path)}" if os.path.islink(path) else ""
        raise DataError(f"{path}{gone}: cannot be read: {error}") from error
    if not stat.S_ISREG(found.st_mode) or os.path.realpath(path).startswith(tuple(f"{root}/" for root in _NO_DATA)):
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
