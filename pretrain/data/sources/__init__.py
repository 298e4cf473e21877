"""Sources: which files a path stands for, and opening one of them as a stream of bytes.

Nothing else in this package lists or opens files of data, so another kind of source is added here. Files are read
through what `open_bytes` returns and never by their path.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

from pretrain.data.errors import DataError
from pretrain.data.sources.http import Address, list_url, open_url
from pretrain.data.sources.hub import list_hub, open_hub
from pretrain.data.sources.local import list_local, open_local
from pretrain.data.sources.objects import list_objects, open_object
from pretrain.data.units import DataFile
from pretrain.processes.redaction import redact

__all__ = ["list_files", "open_bytes", "size_of"]


def list_files(path: str, suffixes: tuple[str, ...]) -> list[DataFile]:
    """List the files that the path of a source stands for, sorted by name, each with what is known of its version.

    Hidden and temporary names, and files of other kinds (a README, say) are skipped in folders and patterns; one line
    of the log counts and names them. See `pretrain.data.sources.names.choose` for what is refused.

    Args:
        path: a file, a folder (searched recursively) or a glob: of this machine, of a data set on the Hub
            (`hf://datasets/ORG/NAME@REVISION/PATH`) or of an object store (`s3://BUCKET/PATH`, `gs://BUCKET/PATH`); or
            the URL of a file (`https://HOST/PATH`). The revision of a listed file of the Hub is a commit.
        suffixes: the endings of file names that can be read, in lower case; names may have them in any case.

    Raises:
        DataError: nothing matches, a file cannot be read, or a name looks like data of a kind that cannot be read.
        DataUnavailableError: a server did not answer for longer than `data.retry_minutes`.

    """
    match _scheme(path):
        case "":
            return list_local(path, suffixes)
        case "hf":
            return list_hub(path, suffixes)
        case "http" | "https":
            return list_url(path, suffixes)
        case "s3" | "gs":
            return list_objects(path, suffixes)
    raise DataError(f"{redact(path)}: unknown kind of URL, expected hf://, https://, http://, s3:// or gs://")


@contextmanager
def open_bytes(data: DataFile) -> Iterator[BinaryIO]:
    """Open a file for reading; the stream can seek.

    Args:
        data: the file, in the version that the catalog recorded if there is a catalog yet.

    Raises:
        DataError: the file cannot be opened, or it is not in the recorded version. Reading a remote file may raise it
            as well, and `DataUnavailableError`.

    """
    with _open(data) as file:
        if data.bytes is not None and (size := size_of(file)) != data.bytes:
            raise DataError(
                f"{data.path}: has {size} bytes, but had {data.bytes} when the run was started: the file has changed; "
                "restore it, or start a new run"
            )
        yield file


def _scheme(path: str) -> str:
    scheme, mark, _ = path.partition("://")
    return scheme.lower() if mark else ""


def _open(data: DataFile) -> BinaryIO:
    match _scheme(data.path):
        case "":
            return open_local(data.path)
        case "hf":
            return open_hub(data)
        case "http" | "https":
            return open_url(data, Address(data.path))
    return open_object(data)


def size_of(file: BinaryIO) -> int:
    """Return the size of an open file in bytes; the stream is at its beginning afterwards."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    return size
