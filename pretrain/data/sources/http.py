"""Files behind HTTP, read by ranges: every request asks for a bounded part, so that no connection stays open idle.

A part that breaks off is continued from the byte where it broke. Each response is checked against the recorded
version of the file.
"""

import functools
import io
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import BinaryIO
from urllib.parse import unquote, urljoin, urlsplit

import httpx2

from pretrain.config.source_path import path_problem
from pretrain.data.errors import DataError
from pretrain.data.sources.retries import TransientError, patience, retrying
from pretrain.data.units import DataFile
from pretrain.processes.redaction import redact

BUFFER_BYTES = 1 << 16
_FIRST_PART = 1 << 16
_LARGEST_PART = 1 << 20
_CONNECTIONS = 16
_REDIRECTS = 10
_TRANSIENT = {408, 409, 421, 423, 425, 429}
_SLOWEST = 256
"""Bytes a second over `silence_seconds`; a slower response counts as stalled."""
_LINK_REFUSED = {400, 401, 403, 404, 410}


@functools.cache
def _client(process: int) -> httpx2.Client:
    # These log addresses and headers, which hold signatures, when the root logger is set to INFO or DEBUG.
    for name in ("httpx2", "httpcore2"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Redirects are followed here, for their headers say which version of the file they lead to.
    limits = httpx2.Limits(max_connections=_CONNECTIONS, max_keepalive_connections=_CONNECTIONS)
    return httpx2.Client(follow_redirects=False, limits=limits, trust_env=True)


def client() -> httpx2.Client:
    """The client of this process, with a bounded number of connections."""
    return _client(os.getpid())


def request_timeout() -> httpx2.Timeout:
    """No more than so many seconds of silence; waiting for a free connection is not silence."""
    return httpx2.Timeout(patience().silence_seconds, pool=None)


def transient(response: httpx2.Response) -> TransientError | None:
    """The failure that a response reports, if it may pass."""
    code = response.status_code
    if code in _TRANSIENT or code >= 500:
        return TransientError(f"the server answered {code}", _retry_after(response.headers))
    return None


def _retry_after(headers: Mapping[str, str]) -> float | None:
    value = headers.get("retry-after", "")
    try:
        return min(float(value), 3600)
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(value)
        return max(0.0, (when - datetime.now(when.tzinfo)).total_seconds())
    except (ValueError, OverflowError):
        return None


@dataclass(frozen=True)
class Address:
    """Where a file is served."""

    url: str
    headers: Callable[[], Mapping[str, str]] = dict
    """Headers for the host of the URL, such as an authorization; no other host gets them."""
    refused: Callable[[httpx2.Response], str] = lambda response: ""
    """What to do about a client error, for messages."""


def parse_url(url: str) -> str:
    """Check the URL of a single file.

    Raises:
        DataError: it holds a secret or a query, which would be stored with the run, or it is not a file's.

    """
    if problem := path_problem(url):
        raise DataError(f"{redact(url)}: {problem}")
    return url


def list_url(url: str, suffixes: tuple[str, ...]) -> list[DataFile]:
    """Describe the one file of a plain URL."""
    parse_url(url)
    if not unquote(urlsplit(url).path).lower().endswith(suffixes):
        raise DataError(f"{url}: unknown kind of file, expected one of {', '.join(suffixes)}")
    return [describe(url, Address(url))]


def describe(path: str, address: Address) -> DataFile:
    """Ask the server for the size and the version of a file."""
    reader = RangeReader(DataFile(path), address)
    reader.part(0, 1)
    return DataFile(path, reader.size, reader.version)


def open_url(data: DataFile, address: Address) -> BinaryIO:
    """Open a file for reading; the stream can seek and holds no connection."""
    if data.bytes is None:
        data = describe(data.path, address)
    if data.bytes is None:
        raise DataError(f"{data.path}: the server does not state the size of the file, so it cannot be read")
    return io.BufferedReader(RemoteStream(RangeReader(data, address), data.bytes), BUFFER_BYTES)


class RemoteStream(io.RawIOBase):
    """A seekable stream over parts of a remote file, which grow while it is read in order.

    Args:
        reader: has a method `part(start, length)`.
        size: of the file, in bytes.

    """

    def __init__(self, reader: "PartReader", size: int) -> None:
        self._reader, self._size = reader, size
        self._position = 0
        self._part, self._start = b"", 0
        self._next_length = _FIRST_PART

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; nothing is requested before the next read."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError("seek before the beginning of the file")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: "memoryview") -> int:  # type: ignore[override]
        """Read up to the end of the part at hand, requesting the next one if there is none."""
        if self._position >= self._size or not len(buffer):
            return 0
        end = self._start + len(self._part)
        if not self._start <= self._position < end:
            in_order = self._position == end and end > 0
            self._next_length = min(4 * self._next_length, _LARGEST_PART) if in_order else _FIRST_PART
            length = min(max(self._next_length, min(len(buffer), _LARGEST_PART)), self._size - self._position)
            self._part, self._start = b"", 0  # before the request, so that two parts are never held
            self._part, self._start = self._reader.part(self._position, length), self._position
        offset = self._position - self._start
        piece = self._part[offset : offset + len(buffer)]
        buffer[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)

    def close(self) -> None:
        """Drop the part at hand."""
        self._part = b""
        super().close()


class PartReader:
    """Reads parts of one remote file."""

    def part(self, start: int, length: int) -> bytes:
        """Return `length` bytes from `start` on.

        Raises:
            DataError: the server refuses, or the file is not in the recorded version.
            DataUnavailableError: the server did not answer for too long.

        """
        raise NotImplementedError


class RangeReader(PartReader):
    """Reads parts of a file by ranges of HTTP.

    The address may redirect to a link that expires. The link is kept for the following parts and asked for again when
    it is refused. Which version of the file is served is told by `X-Linked-Etag` in a redirect of the Hub, or else by
    the etag or the date of the last response.

    Args:
        data: the file; its recorded size and version are checked in every response.
        address: where it is served.

    """

    def __init__(self, data: DataFile, address: Address) -> None:
        self._path, self._address = data.path, address
        self.size, self.version = data.bytes, data.etag
        self._link: str | None = None
        self._link_is_vouched_for = False  # the redirect to it told the version
        self._body_tag: str | None = None  # strong etag of the last body, for If-Range

    def part(self, start: int, length: int) -> bytes:
        """See `PartReader`."""
        received = bytearray()

        def attempt() -> None:
            before = len(received)
            try:
                self._request(start + before, start + length, received)
            except httpx2.InvalidURL as error:
                raise DataError(f"{self._path}: redirected to an address that cannot be read: {error}") from None
            except httpx2.TransportError as error:
                if len(received) == length:
                    return
                raise TransientError(reason(error), progressed=len(received) > before) from None
            if self.size is not None and len(received) < min(length, self.size - start):
                raise TransientError("the response ended early", progressed=len(received) > before)

        retrying(self._path, attempt)
        return bytes(received)

    def _request(self, start: int, end: int, received: bytearray) -> None:
        """Request the bytes from `start` to before `end` and append what arrives."""
        url = self._link or self._address.url
        vouched = self._link is not None and self._link_is_vouched_for
        for _ in range(_REDIRECTS):
            headers = {"Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}"}
            if origin(url) == origin(self._address.url):
                headers |= self._address.headers()
            if self._body_tag:
                headers["If-Range"] = f'"{self._body_tag}"'
            with client().stream("GET", url, headers=headers, timeout=request_timeout()) as response:
                if not response.has_redirect_location:
                    if _is_empty(response) and start == 0 and not self.size:
                        self.size = 0
                        self._check_version(_version(response))
                        return
                    self._refuse(response, url)
                    if not vouched:
                        self._check_served(_version(response))
                    self._check_extent(response, start, vouched)
                    self._append(response, start, end, received)
                    if url != self._address.url:
                        self._link, self._link_is_vouched_for = url, vouched
                    return
                if linked := _tag(response.headers, "x-linked-etag"):
                    self._check_version(linked)
                    vouched = True
                url = joined(url, response.headers["location"])
        raise DataError(f"{self._path}: redirected more than {_REDIRECTS} times")

    def _refuse(self, response: httpx2.Response, url: str) -> None:
        """Raise what a response without the contents means."""
        code = response.status_code
        link = self._link
        if code not in (200, 206):
            self._link = self._body_tag = None
        if problem := transient(response):
            raise problem
        if code in _LINK_REFUSED and (origin(url) != origin(self._address.url) or urlsplit(url).query):
            # A link that worked before has expired, and a new one is asked for at once.
            raise TransientError(f"the link to the file was refused ({code})", 0 if link else None)
        if code in (412, 416):
            raise self._changed(f"the server answered {code}")
        if code not in (200, 206):
            advice = self._address.refused(response) or "check the path"
            raise DataError(f"{self._path}: the server answered {code} {response.reason_phrase}: {advice}")

    def _check_served(self, found: str | None) -> None:
        """Check the version of a response with contents; one without a version may be a page of a proxy."""
        if found is None and self.version is not None:
            raise TransientError("the response does not say which version of the file it holds")
        self._check_version(found)

    def _check_version(self, found: str | None) -> None:
        if found is not None and self.version is None:
            self.version = found
        elif found not in (None, self.version):
            raise self._changed(f"its version is {found!r:.80}, expected {self.version!r:.80}")

    def _check_extent(self, response: httpx2.Response, start: int, vouched: bool) -> None:
        """Check which bytes a response holds, of how many."""
        coding = response.headers.get("content-encoding", "identity").lower()
        own = ("gzip", "x-gzip") if self._path.lower().endswith(".gz") else ()  # what the file is anyway
        if coding not in ("identity", *own):
            raise DataError(f"{self._path}: the server sends it compressed ({coding}) though it was asked not to")
        first, total = _range_of(response)
        if response.status_code == 206 and first != start:
            raise TransientError(f"the server sent bytes from {first} on instead of {start}")
        strong = _strong_tag(response)
        if self._body_tag and strong != self._body_tag and (strong or response.status_code == 200):
            if vouched:  # the same contents may have another tag elsewhere: ask again which version they are
                self._link = self._body_tag = None
                raise TransientError("the link serves another version", 0)
            raise self._changed(f"its version is {strong!r:.80}, expected {self._body_tag!r:.80}")
        self._body_tag = strong
        if total is not None and self.size is not None and total != self.size:
            if response.status_code == 200 and strong is not None and strong == self.version:
                raise TransientError(f"the server announced {total} bytes, expected {self.size}")
            raise self._changed(f"has {total} bytes, expected {self.size}")
        self.size = self.size if total is None else total

    def _append(self, response: httpx2.Response, start: int, end: int, received: bytearray) -> None:
        # A server without ranges sends everything.
        skip = start if response.status_code == 200 else 0
        wanted = end - start
        window, arrived, seconds = time.monotonic(), 0, patience().silence_seconds
        for piece in response.iter_raw():
            arrived += len(piece)
            if (now := time.monotonic()) - window > seconds:
                if arrived < _SLOWEST * seconds:
                    raise TransientError(f"only {arrived} bytes arrived in {now - window:.0f} seconds")
                window, arrived = now, 0
            dropped = min(skip, len(piece))
            skip -= dropped
            piece = piece[dropped : dropped + wanted]
            received += piece
            wanted -= len(piece)
            if not wanted and response.status_code == 200:
                break  # a part is read to its end, so that the connection can be used again

    def _changed(self, what: str) -> DataError:
        return DataError(
            f"{self._path}: {what}: the file has changed since it was recorded; restore it, or start a new run"
        )


def joined(url: str, location: str) -> str:
    """Return the address that a server leads to, which may be relative.

    Raises:
        httpx2.InvalidURL: there is no such address.

    """
    try:
        found = urljoin(url, location)
        origin(found)
        httpx2.URL(found)
    except ValueError as error:
        raise httpx2.InvalidURL(str(error)) from None
    return found


def reason(error: httpx2.RequestError) -> str:
    """What went wrong with a connection."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port: what an authorization is for."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port


def _tag(headers: Mapping[str, str], name: str) -> str | None:
    value = headers.get(name)
    return value.removeprefix("W/").strip('"') if value else None


def _strong_tag(response: httpx2.Response) -> str | None:
    tag = response.headers.get("etag", "")
    return tag.strip('"') if tag and not tag.startswith("W/") else None


def _version(response: httpx2.Response) -> str | None:
    return _tag(response.headers, "etag") or _tag(response.headers, "last-modified")


def _is_empty(response: httpx2.Response) -> bool:
    """Whether a file has no bytes, of which a range can be sent."""
    return response.status_code == 416 and response.headers.get("content-range", "").strip() == "bytes */0"


def _range_of(response: httpx2.Response) -> tuple[int, int | None]:
    """The first byte of a response, and the size of the whole file if the response tells."""
    if response.status_code == 206:
        unit, _, value = response.headers.get("content-range", "").partition(" ")
        span, _, total = value.partition("/")
        first = span.partition("-")[0]
        if unit != "bytes" or not first.isdecimal():
            raise TransientError("the response does not say which bytes it holds")
        return int(first), int(total) if total.isdecimal() else None
    length = response.headers.get("content-length", "")
    return 0, int(length) if length.isdecimal() else None
