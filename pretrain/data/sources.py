"""Sources: which files a path stands for, and opening one of them as a stream of bytes.

Nothing else in this package lists or opens files of data, so another kind of source (an object store, a hub) is added
here. Files are read through what `open_bytes` returns and never by their path.
"""

import glob
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pretrain.data.errors import DataError
from pretrain.data.units import DataFile


def list_files(path: str, suffixes: tuple[str, ...]) -> list[DataFile]:
    """List the files that the path of a source stands for, sorted by name and spelt as the config spells the path.

    Files of other kinds (a README, say) are skipped in a folder. Those that a path or a glob names must be readable.

    Args:
        path: a file, a folder (searched recursively) or a glob.
        suffixes: the endings of file names that can be read.

    Raises:
        DataError: nothing matches, or a file has none of the suffixes.

    """
    kinds = ", ".join(suffixes)
    folder = Path(path)
    if folder.is_dir():
        files = [str(file) for file in sorted(folder.rglob("*")) if file.is_file() and file.name.endswith(suffixes)]
        if not files:
            raise DataError(f"{path}: the folder holds no file of a kind that can be read ({kinds})")
        return [DataFile(name) for name in files]
    if folder.exists():
        files = [path]
    else:
        files = [name for name in sorted(glob.glob(path, recursive=True)) if Path(name).is_file()]
    if not files:
        raise DataError(f"{path}: no such file or folder, and no file matches it as a pattern")
    if unknown := [name for name in files if not name.endswith(suffixes)]:
        raise DataError(f"{', '.join(unknown)}: unknown kind of file, expected one of {kinds}")
    return [DataFile(name) for name in files]


@contextmanager
def open_bytes(data: DataFile) -> Iterator[BinaryIO]:
    """Open a file for reading; the stream can seek.

    Args:
        data: the file, in the version that the catalog recorded if there is a catalog yet.

    Raises:
        DataError: the file cannot be opened, or it is not in the recorded version.

    """
    try:
        file = open(data.path, "rb")  # noqa: SIM115
    except OSError as error:
        raise DataError(f"{data.path}: cannot be read: {error}") from error
    with file:
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
