"""Data sets of the Hugging Face Hub, `hf://datasets/ORG/NAME@REVISION/PATH`, and files of models, `hf://ORG/NAME@...`.

The server is that of HF_ENDPOINT and the token that of HF_TOKEN, as for every program of the Hub. Requests, headers
and errors are those of huggingface_hub, but not its retries: they give up after a minute, and its listing would begin
again with the first page.
"""

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote, unquote

import httpx2
from huggingface_hub import constants, hf_hub_url
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import build_hf_headers

from pretrain.data.errors import DataError
from pretrain.data.sources.http import (
    Address,
    client,
    describe,
    joined,
    open_url,
    origin,
    reason,
    request_timeout,
    transient,
)
from pretrain.data.sources.names import Pattern, choose
from pretrain.data.sources.retries import TransientError, retrying
from pretrain.data.units import DataFile
from pretrain.processes.redaction import redact

T = TypeVar("T")

_PATH = re.compile(
    r"hf://(?P<kind>datasets/)?(?P<repository>[^/@]+/[^/@]+)(?:@(?P<revision>refs/(?:convert|pr)/[^/]+|[^/]+))?(?:/(?P<path>.*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubPath:
    """A path on the Hub, taken apart."""

    repository: str
    revision: str | None
    """None: the default branch."""
    path: str
    """A file, a folder or a glob in the repository; empty: all of it."""
    kind: str = "datasets"
    """`datasets` or `models`, as the Hub's API calls them."""

    @classmethod
    def parse(cls, url: str) -> "HubPath":
        """Take a path apart.

        Raises:
            DataError: it is not of the form that is expected.

        """
        found = _PATH.fullmatch(url)
        if not found:
            raise _unexpected(url)
        revision = found["revision"]
        path = (found["path"] or "").strip("/")
        kind = "datasets" if found["kind"] else "models"
        return cls(found["repository"], unquote(revision) if revision else None, path, kind)

    def __str__(self) -> str:
        revision = f"@{quote(self.revision, safe='')}" if self.revision else ""
        kind = "datasets/" if self.kind == "datasets" else ""
        return f"hf://{kind}{self.repository}{revision}" + (f"/{self.path}" if self.path else "")


def _unexpected(url: str) -> DataError:
    return DataError(
        f"{redact(url)}: expected hf://datasets/ORG/NAME@REVISION/PATH, PATH being a file, a folder or a glob"
    )


def is_commit(revision: str) -> bool:
    """Return whether a revision is a commit, which cannot move."""
    return _COMMIT.fullmatch(revision) is not None


def list_hub(url: str, suffixes: tuple[str, ...]) -> list[DataFile]:
    """List the files of a path on the Hub; their paths name the commit that the revision stands for now."""
    asked = HubPath.parse(url)
    if asked.kind != "datasets":
        raise _unexpected(url)
    pinned = HubPath(asked.repository, commit_of(asked), asked.path)
    found = {file.path: file for file in _files(pinned)}
    if not found:
        raise DataError(f"{url}: no such file or folder at this revision, and no file matches it as a pattern")
    if list(found) == [pinned.path]:
        root, names, hidden = "", [pinned.path], True
    else:
        pattern = Pattern(pinned.path) if glob.has_magic(pinned.path) else None
        root = pattern.folder if pattern else f"{pinned.path}/" if pinned.path else ""
        names = sorted(name.removeprefix(root) for name in found)
        hidden = pattern is not None and pattern.enters_hidden
    chosen = [root + name for name in choose(url, names, suffixes, hidden=hidden)]
    return [_data_file(pinned, found[name]) for name in chosen]


def commit_of(path: HubPath) -> str:
    """The commit that a revision stands for; a commit stands for itself."""
    if path.revision and is_commit(path.revision):
        return path.revision
    revision = f"/revision/{quote(path.revision, safe='')}" if path.revision else ""
    commit = _get(path, f"{_endpoint()}/api/{path.kind}/{path.repository}{revision}", dict)[0].get("sha")
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise DataError(f"{path}: the Hub does not say which commit this revision is")
    return commit


def licences_of(url: str) -> tuple[str, ...]:
    """The licences that the card of a data set states; none if there is no card."""
    path = HubPath.parse(url)
    revision = f"/revision/{quote(path.revision, safe='')}" if path.revision else ""
    card = _get(path, f"{_endpoint()}/api/datasets/{path.repository}{revision}", dict)[0].get("cardData")
    stated = card.get("license") if isinstance(card, dict) else None
    return tuple(map(str, stated if isinstance(stated, list) else [stated] if stated else []))


def open_hub(data: DataFile) -> BinaryIO:
    """Open a file of the Hub by its pinned path."""
    return open_url(data, _address(HubPath.parse(data.path)))


def describe_hub(path: HubPath) -> DataFile:
    """Ask the Hub for the size and the version of a file, without listing its folder."""
    found = describe(str(path), _address(path))
    is_sha256 = found.etag is not None and re.fullmatch(r"[0-9a-f]{64}", found.etag)
    return DataFile(found.path, found.bytes, found.etag, found.etag if is_sha256 else None)


def _address(path: HubPath) -> Address:
    kind = path.kind.removesuffix("s")
    url = hf_hub_url(path.repository, path.path, repo_type=kind, revision=path.revision or "main", endpoint=_endpoint())
    return Address(url, build_hf_headers, _advice)


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")


def _data_file(pinned: HubPath, file: RepoFile) -> DataFile:
    path = str(HubPath(pinned.repository, pinned.revision, file.path))
    if file.lfs is not None:
        return DataFile(path, file.lfs.size, file.lfs.sha256, file.lfs.sha256)
    return DataFile(path, file.size, file.blob_id)


def _files(pinned: HubPath) -> Iterator[RepoFile]:
    """The files that a path may stand for: itself, those below it, or those that match it."""
    if glob.has_magic(pinned.path):
        pattern = Pattern(pinned.path)
        recursive = pattern.depth != 1
        for file in _tree(pinned, pattern.folder.rstrip("/"), recursive) or ():
            if file.path.removeprefix(pattern.folder) in pattern:
                yield file
        return
    if pinned.path:
        folder = pinned.path.rpartition("/")[0]
        if "." in pinned.path.rpartition("/")[2]:
            same = [file for file in _tree(pinned, folder, recursive=False) if file.path == pinned.path]
            if same:
                yield from same
                return
    yield from _tree(pinned, pinned.path, recursive=True)


def _tree(pinned: HubPath, folder: str, recursive: bool) -> Iterator[RepoFile]:
    """List a folder, page by page; each page is retried by itself. Nothing if there is no such folder."""
    below = f"/{quote(folder, safe='')}" if folder else ""
    url = f"{_endpoint()}/api/datasets/{pinned.repository}/tree/{pinned.revision}{below}"
    query: dict[str, Any] | None = {"recursive": recursive, "expand": False}
    seen: set[str] = set()
    while url:
        entries, following = _get(pinned, url, list, query, missing_is_empty=bool(folder))
        try:
            files = [RepoFile(**entry) for entry in entries if entry.get("type") == "file"]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{pinned}: the Hub's listing cannot be read: {error!r}") from None
        yield from (file for file in files if not folder or file.path.startswith(f"{folder}/"))
        if following in seen:
            raise DataError(f"{pinned}: the pages of the Hub's listing do not end: one leads back to an earlier one")
        seen.add(following)
        url, query = following, None


def _get(
    path: HubPath, url: str, kind: type, query: dict[str, Any] | None = None, *, missing_is_empty: bool = False
) -> Any:
    """Request JSON of a kind from the Hub; return it, and the address of the next page or an empty string."""

    # A page may lead to another host, which must not get the token.
    headers = build_hf_headers() if origin(url) == origin(_endpoint()) else build_hf_headers(token=False)

    def attempt() -> tuple[Any, str]:
        try:
            response = client().get(
                url, params=query, headers=headers, timeout=request_timeout(), follow_redirects=True
            )
        except httpx2.TooManyRedirects:
            raise DataError(f"{path}: the Hub's answers lead in a circle") from None
        except httpx2.RequestError as error:  # also a body that cannot be decompressed
            raise TransientError(reason(error)) from None
        if problem := transient(response):
            raise problem
        if response.status_code == 404 and missing_is_empty and _error_code(response) == "EntryNotFound":
            return [], ""
        if response.status_code != 200:
            raise DataError(f"{path}: the Hub answered {response.status_code}: {_advice(response)}")
        try:
            found = response.json(), _next_page(response)
        except httpx2.InvalidURL as error:
            raise DataError(f"{path}: the next page of the Hub's listing has no valid address: {error}") from None
        except (ValueError, RecursionError):
            raise TransientError("the Hub's answer is not whole") from None
        if not isinstance(found[0], kind):  # the page of a proxy, say
            raise TransientError(f"the Hub's answer is a JSON {type(found[0]).__name__}, expected a {kind.__name__}")
        return found

    return retrying(str(path), attempt)


def _next_page(response: httpx2.Response) -> str:
    following = response.links.get("next", {}).get("url", "")
    return joined(str(response.url), following) if following else ""


def _error_code(response: httpx2.Response) -> str:
    return response.headers.get("X-Error-Code", "")


def _advice(response: httpx2.Response) -> str:
    """What to do about a refusal of the Hub."""
    code, status = _error_code(response), response.status_code
    if code == "GatedRepo" or status == 403:
        return "access is restricted: accept the terms on its page on the Hub, and set HF_TOKEN"
    if status == 401 or code == "RepoNotFound":
        return "no such repository, or it is private: check the name, and set HF_TOKEN to a token that may read it"
    if code == "RevisionNotFound":
        return "no such revision: it may have been removed; choose another one"
    return "no such file at this revision" if status == 404 else "check the path"
