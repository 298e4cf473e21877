"""A mirror: the files of a lock in a folder, for machines without internet, and how they get there."""

import base64
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, BinaryIO

from pretrain.data.described import CatalogFile, remote_file
from pretrain.data.errors import DataError, DataUnavailableError
from pretrain.data.sources import open_bytes
from pretrain.data.sources.retries import stopping
from pretrain.data.units import DataFile
from pretrain.files import sync

CONCURRENT = 8
"""Files that are copied at the same time."""
_BLOCK_BYTES = 1 << 20
_MOST_PROBLEMS = 20
# Names that do not begin with a dot, with single slashes between them: the usual case.
_PLAIN = re.compile(r"[^/.\0][^/\0]*(?:/[^/.\0][^/\0]*)*")


def mirror_path(folder: Path, url: str) -> Path:
    """Return the same as `mirror_name` as a path."""
    return Path(mirror_name(folder, url))


def mirror_name(folder: Path, url: str) -> str:
    """Return where the file of a URL lies in a mirror: ``<folder>/<scheme>/<host and path>``.

    A string, which takes a fifth of the time of a path: a lock may hold 100,000 files.

    The query of a URL, which may hold a signature, is left out but for a digest.

    Raises:
        DataError: the URL would lead out of the folder.

    """
    scheme, _, rest = url.partition("://")
    # In the name of a file on the Hub or in a bucket, `?` is a letter.
    rest, query, text = rest.partition("?") if scheme.lower() in ("http", "https") else (rest, "", "")
    if _PLAIN.fullmatch(rest) and scheme and not query:
        return f"{folder}/{scheme.lower()}/{rest}"
    parts = rest.split("/")
    if not scheme or any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise DataError(f"{url.partition('?')[0]}: cannot be mirrored, since it is not a plain path")
    if query:
        parts.insert(-1, hashlib.sha256(text.encode()).hexdigest()[:16])
    return os.path.join(folder, scheme.lower(), *parts)


def missing_files(files: Sequence[CatalogFile], folder: Path) -> list[CatalogFile]:
    """Return the files that a mirror lacks, or has in another size."""
    return [file for file in files if _size(mirror_name(folder, file.path)) != file.bytes]


def check_mirror(files: Sequence[CatalogFile], folder: Path) -> None:
    """Check that a mirror holds every file in the right size; their contents were verified when they were copied.

    Raises:
        DataError: it does not.

    """
    if missing := missing_files(files, folder):
        raise DataError(
            f"{folder}: the mirror lacks {len(missing)} of {len(files)} files, or has them in another size; the first "
            f"is {missing[0].path}: run `aurora data fetch` with this config again, or remove data.mirror"
        )


def fetch(files: Sequence[CatalogFile], folder: Path, progress: Callable[[int], object] = int) -> None:
    """Copy the files that `missing_files` names into a mirror.

    An interrupted copy continues at the byte where it stopped. A file gets its name once its contents are verified.

    Args:
        files: the files, as the lock has them.
        folder: the mirror.
        progress: called with the number of bytes that were copied, by several threads.

    Raises:
        DataError: there is not enough space, a file cannot be read, or one is not what the lock says.

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        needed = sum(file.bytes - (_size(_partial(mirror_path(folder, file.path))) or 0) for file in files)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error}") from None
    if needed > free:
        raise DataError(f"{folder}: {needed:,} bytes are needed, but only {free:,} are free")
    stop = threading.Event()
    problems = []
    with ThreadPoolExecutor(CONCURRENT) as pool:
        tasks = [pool.submit(fetch_file, file, mirror_path(folder, file.path), progress, stop) for file in files]
        try:
            for task in as_completed(tasks):
                try:
                    task.result()
                except DataUnavailableError:
                    raise
                except DataError as error:
                    problems.append(str(error))
        except BaseException:
            stop.set()
            with stopping():  # an interrupt must not wait as long as a server may
                pool.shutdown(cancel_futures=True)
            raise
    if len(problems) > _MOST_PROBLEMS:
        problems[_MOST_PROBLEMS:] = [f"{folder}: and {len(problems) - _MOST_PROBLEMS} more files could not be copied"]
    if problems:
        raise DataError("\n".join(problems))


def fetch_file(
    file: CatalogFile, target: Path, progress: Callable[[int], object] = int, stop: threading.Event | None = None
) -> None:
    """Copy one file, continuing a partial copy next to the target, and verify it.

    Args:
        file: the file, as the lock has it.
        target: where to.
        progress: called with the number of bytes that were copied.
        stop: ends the copy early, without the target, once it is set.

    Raises:
        DataError: it cannot be copied, or is not what the lock says; a partial copy that is wrong is deleted.

    """
    partial = _partial(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if (_size(partial) or 0) > file.bytes:
            partial.unlink()
        with partial.open("ab+") as copy, open_bytes(remote_file(file)) as source:
            begin = copy.seek(0, 2)
            source.seek(begin)
            progress(begin)
            while block := source.read(_BLOCK_BYTES):
                if stop and stop.is_set():
                    return
                copy.write(block)
                progress(len(block))
            copy.seek(0)
            problem = _problem(file, copy)
        if problem:
            partial.unlink()
            raise DataError(f"{file.path}: {problem}: run `aurora data resolve` again if the change is intended")
        sync(partial)
        partial.replace(target)
    except OSError as error:
        raise DataError(f"{file.path}: cannot be copied to {target}: {error}") from None


def _problem(file: CatalogFile, copy: BinaryIO) -> str | None:
    """What is wrong with a copy, by the hash if the lock has one and by the size otherwise."""
    size = copy.seek(0, 2)
    if size != file.bytes:
        return f"has {size} bytes, but {file.bytes} in the lock"
    stated = remote_file(file)
    digest, expected = _hash(stated, size)
    if digest is None:
        return None
    copy.seek(0)
    for block in _blocks(copy):
        digest.update(block)
    return None if digest.hexdigest() == expected else f"has {digest.name} {digest.hexdigest()}, expected {expected}"


def _hash(file: DataFile, size: int) -> tuple[Any, str | None]:
    """A hash object, and what it has to come to; None if nothing is known of the contents."""
    if file.sha256:
        return hashlib.sha256(), file.sha256
    if file.path.startswith("hf://") and re.fullmatch("[0-9a-f]{40}", file.etag or ""):  # the id of a git blob
        return hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False), file.etag
    if file.path.startswith("gs://") and re.fullmatch("[A-Za-z0-9+/]{22}==", file.etag or ""):
        return hashlib.md5(usedforsecurity=False), base64.b64decode(file.etag or "").hex()
    # The etag of an object in S3 is its MD5 only if it was neither uploaded in parts nor encrypted with a key of KMS.
    return None, None


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        yield block


def _partial(target: Path) -> Path:
    return target.with_name(target.name + ".part")


def _size(path: Path | str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None
