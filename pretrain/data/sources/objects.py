"""Object stores, by fsspec: `s3://BUCKET/PATH` and `gs://BUCKET/PATH`.

Credentials and servers come from the environment, as s3fs and gcsfs document it (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS and so on).
"""

import functools
import glob
import io
import logging
import os
import re
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar

from pretrain.data.errors import DataError
from pretrain.data.sources.http import BUFFER_BYTES, PartReader, RemoteStream
from pretrain.data.sources.names import Pattern, choose
from pretrain.data.sources.retries import TransientError, patience, retrying
from pretrain.data.units import DataFile
from pretrain.processes.redaction import redact

T = TypeVar("T")

# Libraries whose errors, other than those told apart below, are about the network.
_NETWORK = {"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "requests", "urllib3"}
_CHANGED = "the file has changed since it was recorded; restore it, or start a new run"
# They log addresses and headers, which hold signatures, when the root logger is set to DEBUG.
_LOGGERS = ("aiobotocore", "botocore", "fsspec", "gcsfs", "google", "s3fs", "urllib3")
_EXTRAS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}


def list_objects(url: str, suffixes: tuple[str, ...]) -> list[DataFile]:
    """List an object, a folder or a glob of a bucket."""
    scheme, _, path = url.partition("://")
    if "@" in path.partition("/")[0] or re.search(r"\?[^/]*=", path):
        raise DataError(f"{redact(url)}: credentials do not belong into a path: set them in the environment")
    system = _system(scheme, os.getpid())
    path = path.rstrip("/")
    if glob.has_magic(path):
        pattern = Pattern(path)
        folder, depth = pattern.folder.rstrip("/"), pattern.depth
    else:
        pattern, folder, depth = None, path, None
    found = _call(url, lambda: system.find(folder, maxdepth=depth, detail=True, refresh=True))
    names = {name: about for name, about in found.items() if about.get("type") != "directory"}
    if list(names) == [path]:
        root, wanted = path.rpartition("/")[0] + "/", [path.rpartition("/")[2]]
        chosen = choose(url, wanted, suffixes, hidden=True)
    else:
        root = f"{folder}/"
        wanted = sorted(name.removeprefix(root) for name in names)
        if pattern is not None:
            wanted = [name for name in wanted if name in pattern]
        if not wanted:
            raise DataError(f"{url}: no such object or folder, and no object matches it as a pattern")
        chosen = choose(url, wanted, suffixes, hidden=pattern is not None and pattern.enters_hidden)
    return [_data_file(f"{scheme}://{root}{name}", names[root + name]) for name in chosen]


def open_object(data: DataFile) -> BinaryIO:
    """Open an object in its recorded version; the stream can seek and holds no connection."""
    scheme, _, path = data.path.partition("://")
    system = _system(scheme, os.getpid())
    found = _call(data.path, lambda: system.info(path, refresh=True))
    about = _data_file(data.path, found)
    if (data.bytes, data.etag) != (None, None) and (about.bytes, about.etag) != (data.bytes, data.etag or about.etag):
        raise DataError(
            f"{data.path}: has {about.bytes} bytes in version {about.etag}, expected {data.bytes} in {data.etag}: "
            f"{_CHANGED}"
        )
    return io.BufferedReader(
        RemoteStream(_ObjectReader(system, about, found.get("generation")), about.bytes or 0), BUFFER_BYTES
    )


class _ObjectReader(PartReader):
    """Reads parts of an object."""

    def __init__(self, system: Any, data: DataFile, generation: str | None) -> None:
        self._system, self._data = system, data
        # S3 refuses with 412 what is not this version, and GCS with 404.
        self._condition: dict[str, str] = {}
        if data.path.startswith("s3://"):
            self._condition = {"IfMatch": f'"{data.etag}"'} if data.etag else {}
        elif generation:
            self._condition = {"generation": generation}

    def part(self, start: int, length: int) -> bytes:
        """See `PartReader`."""
        path = self._data.path.partition("://")[2]
        end = min(start + length, self._data.bytes or 0)
        received = bytearray()

        def attempt() -> None:
            before = len(received)
            received.extend(_cat(self._system, path, start + before, end, self._condition))
            if len(received) < end - start:
                raise TransientError("the response ended early", progressed=len(received) > before)

        _call(self._data.path, attempt)
        return bytes(received[: end - start])


def _cat(system: Any, path: str, start: int, end: int, condition: dict[str, str]) -> bytes:
    if "IfMatch" not in condition:
        try:
            return bytes(system.cat_file(path, start=start, end=end, **condition))
        except FileNotFoundError:
            raise DataError(f"gs://{path}: {_CHANGED}") from None
    bucket, _, key = path.partition("/")
    response = system.call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **condition)
    from fsspec.asyn import sync

    return bytes(sync(system.loop, response["Body"].read))


@functools.cache
def _system(scheme: str, process: int) -> Any:
    """The file system of a kind of store, for this process: its threads do not survive a fork."""
    import fsspec

    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.WARNING)
    package, extra = _EXTRAS[scheme]
    try:
        # Retries are ours alone, and listings are never taken from a cache.
        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        seconds = patience().silence_seconds
        if scheme == "s3":
            config = {"retries": {"total_max_attempts": 1}, "read_timeout": seconds, "connect_timeout": seconds}
            options |= {"config_kwargs": config}
        system = fsspec.filesystem(scheme, **options)
        if scheme == "gs":
            from aiohttp import ClientTimeout

            system.requests_timeout = ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
            # The undecorated method: the decorator retries.
            system._request = type(system)._request.__wrapped__.__get__(system)
    except ImportError as error:
        raise DataError(
            f"{scheme}:// needs the package {package}: pip install 'aurora-pretrain[{extra}]' ({error})"
        ) from None
    if hasattr(system, "retries"):
        system.retries = 1
    return system


def _call(url: str, work: Callable[[], T]) -> T:
    """Call a store; what may pass is retried, and what is refused is an error that names the path."""

    def attempt() -> T:
        try:
            return work()
        except (TransientError, DataError):
            raise
        except FileNotFoundError:
            raise DataError(f"{url}: no such object or bucket") from None
        except Exception as error:
            if isinstance(error, PermissionError) or str(error).startswith("Forbidden"):  # gcsfs has no type for it
                raise DataError(
                    f"{url}: access is refused: set the credentials in the environment ({redact(error)[:200]})"
                ) from None
            code = 412 if isinstance(error, FileExistsError) else _status(error)
            if code == 412:
                raise DataError(f"{url}: {_CHANGED}") from None
            if code is not None and 400 <= code < 500 and code not in (408, 409, 425, 429):
                raise DataError(f"{url}: the server answered {code}: {redact(error)[:200]}") from None
            if type(error).__name__ in ("NoCredentialsError", "DefaultCredentialsError"):
                raise DataError(f"{url}: no credentials: set them in the environment") from None
            if not isinstance(error, OSError) and type(error).__module__.partition(".")[0] not in _NETWORK:
                raise
            raise TransientError(f"{type(error).__name__}: {redact(error)[:200]}") from None

    return retrying(url, attempt)


def _status(error: BaseException | None) -> int | None:
    """The status that a store answered, from the error or from what caused it."""
    while error is not None:
        response = getattr(error, "response", None)
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        else:
            status = getattr(error, "status", None) or getattr(error, "code", None)
        if isinstance(status, int):
            return status
        error = error.__cause__
    return None


def _data_file(path: str, about: dict[str, Any]) -> DataFile:
    # The etag of GCS changes with the metadata.
    tag = about.get("md5Hash") or about.get("ETag") or about.get("etag")
    return DataFile(path, about.get("size"), tag.strip('"') if isinstance(tag, str) else None)
