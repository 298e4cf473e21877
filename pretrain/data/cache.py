"""A disk cache of remote files, which the processes of a node share.

A file is copied as a whole when it is first opened, by one process while the others wait, and gets its name once it is
complete and verified. A process that ends in between leaves a part from which the next one continues.

The files of the cache, and those that are being copied, never take more than the size of the cache: a copy begins once
its whole size is reserved, for which the files that were opened least recently are deleted, but none that a process has
open. Where that does not make enough room, the file is read from its server. All of it is decided under locks of the
operating system, which end with the process that holds them:

    <name>         a copy; a process that has it open holds a shared lock
    <name>.part    what has been copied of it so far
    <name>.lock    is locked while it is copied, and holds the size that is reserved for it
    room.lock      is locked while room is made
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from pretrain.data.described import CatalogFile, remote_digest
from pretrain.data.errors import DataError
from pretrain.data.mirror import fetch_file
from pretrain.data.sources import open_bytes
from pretrain.data.units import DataFile


@dataclass(frozen=True, slots=True)
class DiskCache:
    """A folder of copies. Can be pickled."""

    folder: str
    limit_bytes: int

    @contextlib.contextmanager
    def open(self, file: DataFile) -> Iterator[BinaryIO]:
        """Open the copy of a remote file, which is made if there is none and room for it; the stream can seek.

        Raises:
            DataError: the file cannot be copied, or is not in the recorded version; or the folder cannot be written.

        """
        digest = remote_digest(file)
        if file.bytes is None or digest is None:
            raise DataError(f"{file.path}: its size and version are not known, so it cannot be kept in the cache")
        folder = Path(self.folder)
        name = hashlib.sha256(f"{file.path}\n{file.bytes}\n{digest}".encode()).hexdigest()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            opened = _open(folder / name) or self._copy(CatalogFile(file.path, file.bytes, None, digest), folder / name)
        except OSError as error:
            raise DataError(f"{folder}: the cache (data.cache_dir) cannot be used: {error}") from None
        if opened is None:
            with open_bytes(file) as opened:
                yield opened
            return
        with opened:
            yield opened

    def _copy(self, file: CatalogFile, target: Path) -> BinaryIO | None:
        """Copy a file and open the copy; None if there is no room for it."""
        with target.with_suffix(".lock").open("a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if found := _open(target):  # another process was faster
                return found
            if not self._reserve(target.name, file.bytes, lock):
                return None
            fetch_file(file, target)
            return _open(target)

    def _reserve(self, name: str, needed: int, lock: TextIO) -> bool:
        """Make room for a file and reserve it, until the lock of the file is released."""
        with Path(self.folder, "room.lock").open("a") as room:
            fcntl.flock(room, fcntl.LOCK_EX)
            held, unused = self._contents(name)
            for size, path in unused:
                if held + needed <= self.limit_bytes:
                    break
                held -= size if _delete(path) else 0
            if held + needed > self.limit_bytes:
                return False
            lock.truncate(0)
            lock.write(str(needed))
            lock.flush()
            return True

    def _contents(self, name: str) -> tuple[int, list[tuple[int, Path]]]:
        """Return the bytes that are taken or reserved, but for those of `name`; and what may be deleted, oldest first.

        The latter are pairs of a size and a copy or a part.
        """
        taken: dict[str, int] = {}
        used: list[tuple[int, int, Path]] = []
        for entry in os.scandir(self.folder):
            path = Path(entry.path)
            if path.stem == name:
                continue
            with contextlib.suppress(FileNotFoundError):  # a part that has just become a copy: its reservation counts
                if path.suffix == ".lock":
                    taken[path.stem] = max(taken.get(path.stem, 0), _reserved(path))
                else:
                    found = path.stat()
                    taken[path.stem] = max(taken.get(path.stem, 0), found.st_size)
                    used.append((found.st_mtime_ns, found.st_size, path))
        return sum(taken.values()), [(size, path) for _, size, path in sorted(used)]


def _reserved(lock: Path) -> int:
    """What is reserved for a file that is being copied; 0 if it is not, which a process that died leaves."""
    with lock.open() as opened:
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(opened.read() or 0)
    return 0


def _delete(path: Path) -> bool:
    """Delete a copy that no process has open, or a part that no process adds to; return whether that was so."""
    try:
        with (path.with_suffix(".lock") if path.suffix == ".part" else path).open("rb") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except (BlockingIOError, FileNotFoundError):
        return False
    return True


def _open(copy: Path) -> BinaryIO | None:
    """Open a complete copy such that it is not deleted meanwhile, and note that it was used."""
    try:
        opened = copy.open("rb")
    except FileNotFoundError:
        return None
    fcntl.flock(opened, fcntl.LOCK_SH)
    try:
        os.utime(copy)
        if os.path.samestat(os.fstat(opened.fileno()), copy.stat()):
            return opened
    except FileNotFoundError:  # deleted before it was locked
        pass
    opened.close()
    return None


@dataclass(frozen=True, slots=True)
class CachedFile(DataFile):
    """A remote file that is read through a cache."""

    cache: DiskCache | None = None


@contextlib.contextmanager
def open_file(file: DataFile) -> Iterator[BinaryIO]:
    """Open a file, through its cache if it has one; the stream can seek.

    Raises:
        DataError: see `open_bytes` and `DiskCache.open`.

    """
    cache = file.cache if isinstance(file, CachedFile) else None
    with cache.open(file) if cache else open_bytes(file) as opened:
        yield opened
