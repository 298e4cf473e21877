"""Sources: which files a path stands for, and opening one of them as a stream of bytes.

Nothing else in this package lists or opens files of data, so another kind of source is added here. Files are read
through what `open_bytes` returns and never by their path.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from pretrain.data.errors import DataError
from pretrain.data.sources.local import list_local, open_local
from pretrain.data.units import DataFile

__all__ = ["is_remote", "list_files", "open_bytes", "size_of"]


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return "://" in path


def list_files(path: str, suffixes: tuple[str, ...]) -> list[DataFile]:
    """List the files that the path of a source stands for, sorted by name, each with what is known of its version.

    Hidden and temporary names, and files of other kinds (a README, say) are skipped in folders and patterns; one line
    of the log counts and names them. See `pretrain.data.sources.names.choose` for what is refused.

    Args:
        path: a file, a folder (searched recursively) or a glob.
        suffixes: the endings of file names that can be read, in lower case; names may have them in any case.

    Raises:
        DataError: nothing matches, a file cannot be read, or a name looks like data of a kind that cannot be read.

    """
    return list_local(path, suffixes)


@contextmanager
def open_bytes(data: DataFile) -> Iterator[BinaryIO]:
    """Open a file for reading; the stream can seek.

    Args:
        data: the file, in the version that the catalog recorded if there is a catalog yet.

    Raises:
        DataError: the file cannot be opened, or it is not in the recorded version.

    """
    with open_local(data.path) as file:
        if data.bytes is not None and (size := size_of(file)) != data.bytes:
            raise DataError(
                f"{data.path}: has {size} bytes, but had {data.bytes} when the run was started: the file has changed; "
                "restore it, or start a new run"
            )
        yield file


def size_of(file: BinaryIO) -> int:
    """Return the size of an open file in bytes; the stream is at its beginning afterwards."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return size
