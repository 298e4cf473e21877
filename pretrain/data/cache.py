"""A disk cache of remote files, which the processes of a node share.

A file is copied as a whole when it is first opened, by one process while the others wait, and gets its name once it is
complete and verified. A process that ends in between leaves a part from which the next one continues. When the cache
is over its size, the files that were opened least recently are deleted; a process that has one open keeps reading it.
"""

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

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
        """Open the copy of a remote file, which is made if there is none; the stream can seek.

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
        with opened:
            yield opened

    def _copy(self, file: CatalogFile, target: Path) -> BinaryIO:
        with target.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # released when this process ends, for whatever reason
            if found := _open(target):  # another process was faster
                return found
            self._make_room(file.bytes)
            fetch_file(file, target)
            opened = target.open("rb")  # before another process may delete it
        return opened

    def _make_room(self, needed: int) -> None:
        """Delete the files that were opened least recently until `needed` bytes fit; a larger file fits alone."""
        copies = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # another process makes room as well
                if not entry.name.endswith(".lock"):
                    stat = entry.stat()
                    copies.append((stat.st_mtime_ns, stat.st_size, entry.path))
        held = sum(size for _, size, _ in copies)
        for _, size, path in sorted(copies):
            if held + needed <= self.limit_bytes:
                return
            if not path.endswith(".part"):
                Path(path).unlink(missing_ok=True)
                held -= size


def _open(copy: Path) -> BinaryIO | None:
    """Open a complete copy and note that it was used."""
    try:
        opened = copy.open("rb")
    except FileNotFoundError:
        return None
    with contextlib.suppress(FileNotFoundError):
        os.utime(copy)
    return opened


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
