"""Writing files and folders that are complete or absent, whatever happens in between."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

NO_DATA = ("/dev", "/proc", "/sys")
"""Folders of the kernel, whose files have no fixed contents; `/dev/shm` is memory that is used as a disk."""

_PARTIAL_DIGITS = 8
_PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)


def may_pass(error: OSError) -> bool:
    """Whether an error of a disk may be over at the next try, such as a full one; others stay until somebody acts."""
    return error.errno is None or error.errno in _PASSING


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_folder(partial: Path, final: Path) -> None:
    """Rename the complete folder `partial` to `final`; a folder of that name is deleted only after the rename.

    The files in `partial` must be synced already.

    Raises:
        OSError: it could not be renamed; what `final` held is still there.
    """
    sync(partial)
    replaced = final.with_name(final.name + ".old")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    try:
        partial.rename(final)
    except OSError:
        if replaced.exists():
            replaced.rename(final)
        raise
    sync(final.parent)
    delete(replaced, as_far_as_possible=True)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file that takes the place of `path` in one rename, once it is written and synced.

    Several processes may do so at the same time. If the block raises, `path` stays as it was.
    """
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex[:_PARTIAL_DIGITS]}.tmp")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def partial_files(folder: Path, name: str = "*") -> list[Path]:
    """Return the files that `replacing` has not given their name: processes were killed, or are writing them.

    Args:
        folder: of the files; need not exist.
        name: a pattern that their names match.
    """
    return sorted(folder.glob(f"{name}.{'[0-9a-f]' * _PARTIAL_DIGITS}.tmp"))


def replace_text(path: Path, text: str) -> None:
    """Write a text file in the place of an earlier one, in one rename."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def irregular(path: str | os.PathLike[str]) -> bool:
    """Return whether an existing file is something else than a file with fixed contents, such as a device or a pipe.

    A pipe may block for ever, and `/dev/zero` and some files of `/proc` have no end.

    Raises:
        OSError: there is no such file, or it cannot be looked at.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        return True
    real = os.path.realpath(path)
    return real.startswith(tuple(f"{root}/" for root in NO_DATA)) and not real.startswith("/dev/shm/")


def read_limited(path: Path, most: int = 64 << 20) -> bytes:
    """Return the contents of a regular file of at most `most` bytes.

    Raises:
        OSError: it cannot be read, is not a regular file, or is larger.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder")
    if irregular(path):
        raise OSError(f"{path} is not a regular file")
    with path.open("rb") as file:
        contents = file.read(most + 1)
    if len(contents) > most:
        raise OSError(f"{path} is larger than the {most >> 20} MiB that such a file may have")
    return contents


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def delete(path: Path, *, as_far_as_possible: bool = False) -> None:
    """Delete a folder with all that it holds, a file, or a symbolic link, whose target stays.

    Raises:
        OSError: it cannot be deleted, unless `as_far_as_possible`.
    """
    with contextlib.suppress(OSError) if as_far_as_possible else contextlib.nullcontext():
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif as_far_as_possible:
            shutil.rmtree(path, ignore_errors=True)
        else:
            shutil.rmtree(path)


def set_aside(path: Path) -> None:
    """Move a file or folder into ``discarded/`` next to it, in the place of an earlier one of that name."""
    target = path.parent / "discarded" / path.name
    target.parent.mkdir(exist_ok=True)
    if target.is_dir():
        delete(target)
    path.replace(target)


def named_path(word: str) -> tuple[str | None, Path]:
    """Split NAME=PATH; without a name, and for a path that exists as it is, the name is None."""
    label, separator, path = word.partition("=")
    if not separator or not label or not path or exists(word):
        return None, Path(word)
    return label, Path(path)


def exists(path: str | os.PathLike[str]) -> bool:
    """Return whether there is such a file or folder; False for what cannot be the name of one."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long, in a folder that may not be read, or with a null character
        return False


def at_home(path: str | os.PathLike[str]) -> Path:
    """Replace ~ by the home folder; a path with ~ and an unknown user stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def now() -> str:
    """The time in UTC, ISO 8601 to the second, as our files have it."""
    return datetime.now(UTC).isoformat(timespec="seconds")
