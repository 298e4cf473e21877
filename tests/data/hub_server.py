"""A Hub on loopback that misbehaves as the real one does.

It speaks the parts of the Hub's API that reading data sets needs (repository info, tree listing in pages, resolve with
a redirect to a CDN whose signed links expire, ranges, etags), serves the same files over plain HTTP at
`/plain/ORG/NAME/PATH`, and injects faults by a seeded plan. The CDN listens on a port of its own: what reaches it must
not carry the token.

    with hub_server({"a.jsonl": b"..."}) as hub:
        hub.endpoint                       # for HF_ENDPOINT
        hub.path("a.jsonl")                # hf://datasets/org/set@main/a.jsonl
"""

import hashlib
import json
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

FAULTS = (
    "408",
    "429",
    "429 with Retry-After",
    "500",
    "502",
    "503",
    "504",
    "reset",
    "reset in the middle",
    "truncated",
    "stall",
    "short length",
    "long length",
    "expired",
    "empty",
)


class Hub:
    """The state of the server; tests change it while it runs."""

    def __init__(
        self, files: Mapping[str, bytes], repository: str, page: int, lfs_from: int, token: str | None
    ) -> None:
        self.repository, self.page, self.lfs_from, self.token = repository, page, lfs_from, token
        self.commits: dict[str, dict[str, bytes]] = {}
        self.refs: dict[str, str] = {}
        self.push(files)
        self.endpoint = self.cdn = ""
        self.dead = False
        """Every connection is reset."""
        self.refused = 0
        """Requests while it was dead."""
        self.fault_share, self.faults = 0.0, FAULTS
        self.stall_seconds = 3.0
        self.link_uses: int | None = None
        """How often a signed link works; None: for ever."""
        self.ranges = True
        """Whether the server knows ranges."""
        self.connections: set[tuple[str, int]] = set()
        """The clients' ends of all connections."""
        self.injected: Counter[str] = Counter()
        self.requests: list[tuple[str, dict[str, str]]] = []
        """(path with query, headers in lower case) of every request, CDN included."""
        self._links: dict[str, int] = {}
        self._random = random.Random(0)
        self._lock = threading.Lock()

    def push(self, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Commit these files as the new state of a branch; return the commit."""
        content = "".join(f"{name}{hashlib.sha256(data).hexdigest()}" for name, data in sorted(files.items()))
        commit = hashlib.sha1(f"{len(self.commits)}{content}".encode()).hexdigest()
        self.commits[commit] = dict(files)
        self.refs[branch] = commit
        return commit

    def has(self, repository: str) -> bool:
        """Whether a repository is served; `*` stands for any, which the commit tells apart."""
        return self.repository in (repository, "*")

    def path(self, name: str = "", revision: str = "main") -> str:
        """A path as a config names it."""
        return f"hf://datasets/{self.repository}@{revision}/{name}"

    def url(self, name: str) -> str:
        """The plain URL of a file."""
        return f"{self.endpoint}/plain/{self.repository}/{name}"

    def fail(self, share: float, *faults: str, seed: int = 0) -> None:
        """Inject faults into a share of the requests from now on."""
        self.fault_share, self.faults, self._random = share, faults or FAULTS, random.Random(seed)

    def draw(self) -> str | None:
        """The fault of the next request."""
        with self._lock:
            fault = self._random.choice(self.faults) if self._random.random() < self.fault_share else None
            if fault:
                self.injected[fault] += 1
            return fault

    def files_at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit of a revision and its files."""
        commit = self.refs.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None

    def sign(self, target: str) -> str:
        """A link of the CDN."""
        with self._lock:
            signature = f"s{len(self._links)}secret"
            self._links[signature] = 0
        return f"{self.cdn}/cdn/{quote(target)}?X-Amz-Signature={signature}&Expires=3600"

    def uses(self, signature: str) -> bool:
        """Count a use of a signed link; whether it is still valid."""
        with self._lock:
            if signature not in self._links:
                return False
            self._links[signature] += 1
            return self.link_uses is None or self._links[signature] <= self.link_uses


def blob_id(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@contextmanager
def hub_server(
    files: Mapping[str, bytes] | Path,
    repository: str = "org/set",
    *,
    page: int = 2,
    lfs_from: int = 100,
    token: str | None = None,
    port: int = 0,
) -> Iterator[Hub]:
    """Serve one data set.

    Args:
        files: by path, or a folder.
        repository: its name.
        page: entries of a page of the listing.
        lfs_from: files of at least so many bytes are redirected to the CDN, as those in LFS are.
        token: if given, nothing is served without it.
        port: of the API; 0: a free one.

    """
    if isinstance(files, Path):
        folder = files
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub = Hub(files, repository, page, lfs_from, token)
    servers = []
    for number in (port, 0):
        handler = type("Handler", (_Handler,), {"hub": hub})
        server = _Server(("127.0.0.1", number), handler)
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients break off connections; that is not news."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body that waits for the headers to be acknowledged costs 40 ms a request

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.hub
        hub.requests.append((self.path, {key.lower(): value for key, value in self.headers.items()}))
        hub.connections.add(self.client_address)
        if hub.dead:
            hub.refused += 1
            return self._reset()
        if self.path.startswith("/control/"):
            return self._control(self.path.removeprefix("/control/"))
        self.fault = hub.draw()
        parts = urlsplit(self.path)
        names = [unquote(part) for part in parts.path.strip("/").split("/")]
        if self._early_fault(is_cdn=names[0] == "cdn"):
            return None
        if names[0] == "cdn":
            return self._cdn(names[1:], parse_qs(parts.query))
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self._error(401, "RepoNotFound")
        if names[0] == "plain":
            _, files = hub.files_at("main") or ("", {})
            name = "/".join(names[3:])
            return self._file(files[name], f'"{blob_id(files[name])}"') if name in files else self._error(404, "")
        if names[0] == "api" and hub.has("/".join(names[2:4])):
            return self._api(names[4:], parse_qs(parts.query))
        if names[0] == "datasets" and hub.has("/".join(names[1:3])) and names[3] == "resolve":
            return self._resolve(names[4], "/".join(names[5:]))
        if hub.has("/".join(names[:2])) and names[2] == "resolve":  # of a model, whose tokenizer is read
            return self._resolve(names[3], "/".join(names[4:]))
        return self._error(401, "RepoNotFound")

    def _control(self, command: str) -> None:
        """What a process of a test may ask for.

        `dead`, `dead?seconds=30`, or `rewrite`, after which all files differ in a byte.
        """
        command, _, query = command.partition("?")
        if command == "dead":
            self.hub.dead = True
            if query:
                timer = threading.Timer(float(query.removeprefix("seconds=")), setattr, (self.hub, "dead", False))
                timer.daemon = True
                timer.start()
        elif command == "rewrite":
            for files in self.hub.commits.values():
                files |= {name: data[:-1] + b" " for name, data in files.items()}
        self.fault = None
        self._send(200, b"", {})

    def _api(self, names: list[str], query: dict[str, list[str]]) -> None:
        if not names or names[0] == "revision":
            found = self.hub.files_at(names[1] if names else "main")
            if not found:
                return self._error(404, "RevisionNotFound")
            about = {"id": self.hub.repository, "sha": found[0], "private": False, "gated": False, "tags": []}
            about["cardData"] = {"license": "odc-by"}
            return self._send(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
        found = self.hub.files_at(names[1])
        if not found:
            return self._error(404, "RevisionNotFound")
        folder = "/".join(names[2:])
        entries = self._entries(found[1], folder, query.get("recursive", ["false"])[0].lower() == "true")
        if folder and not entries:
            return self._error(404, "EntryNotFound")
        first = int(query.get("cursor", ["0"])[0])
        headers = {"Content-Type": "application/json"}
        if first + self.hub.page < len(entries):
            recursive = query.get("recursive", ["false"])[0]
            here = f"{self.hub.endpoint}{urlsplit(self.path).path}"
            headers["Link"] = f'<{here}?recursive={recursive}&cursor={first + self.hub.page}>; rel="next"'
        return self._send(200, json.dumps(entries[first : first + self.hub.page]).encode(), headers)

    def _entries(self, files: Mapping[str, bytes], folder: str, recursive: bool) -> list[dict[str, Any]]:
        root = f"{folder}/" if folder else ""
        found: dict[str, dict[str, Any]] = {}
        for name, data in sorted(files.items()):
            below = name.removeprefix(root).split("/")
            if not name.startswith(root):
                continue
            for depth in range(1, len(below) if recursive else min(2, len(below))):
                path = root + "/".join(below[:depth])
                found[path] = {"type": "directory", "oid": blob_id(path.encode()), "size": 0, "path": path}
            if recursive or len(below) == 1:
                entry = {"type": "file", "oid": blob_id(data), "size": len(data), "path": name}
                if len(data) >= self.hub.lfs_from:
                    entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
                found[name] = entry
        return list(found.values())

    def _resolve(self, revision: str, name: str) -> None:
        found = self.hub.files_at(revision)
        if not found:
            return self._error(404, "RevisionNotFound")
        commit, files = found
        if name not in files:
            return self._error(404, "EntryNotFound")
        data = files[name]
        headers = {"X-Repo-Commit": commit}
        if len(data) < self.hub.lfs_from:
            return self._file(data, f'"{blob_id(data)}"', headers)
        headers["X-Linked-Size"] = str(len(data))
        headers["X-Linked-Etag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        headers["Location"] = self.hub.sign(f"{commit}/{name}")
        return self._send(302, b"", headers)

    def _cdn(self, names: list[str], query: dict[str, list[str]]) -> None:
        if not self.hub.uses(query.get("X-Amz-Signature", [""])[0]):
            return self._error(403, "")
        data = self.hub.commits[names[0]]["/".join(names[1:])]
        return self._file(data, f'"{hashlib.md5(data).hexdigest()}-2"')

    def _file(self, data: bytes, etag: str, headers: Mapping[str, str] | None = None) -> None:
        sent = {"ETag": etag, "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **(headers or {})}
        asked = self.headers.get("Range", "")
        if self.headers.get("If-Match", etag) != etag:
            return self._send(412, b"", sent)
        if not self.hub.ranges or not asked.startswith("bytes=") or self.headers.get("If-Range", etag) != etag:
            return self._send(200, data, sent)
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, len(data) - int(last))
        end = min(int(last) + 1, len(data)) if first and last else len(data)
        if start >= len(data):
            return self._send(416, b"", {**sent, "Content-Range": f"bytes */{len(data)}"})
        sent["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        return self._send(206, data[start:end], sent)

    def _early_fault(self, is_cdn: bool) -> bool:
        """Do a fault that needs no content; whether that was one."""
        fault = self.fault or ""
        if fault == "reset":
            self._reset()
        elif fault == "expired":
            if not is_cdn:
                return False
            self._error(403, "")
        elif fault[:3].isdigit():
            self._send(int(fault[:3]), b"busy", {"Retry-After": "0.01"} if "Retry-After" in fault else {})
        else:
            return False
        return True

    def _error(self, code: int, kind: str) -> None:
        self._send(code, b"", {"X-Error-Code": kind, "X-Error-Message": kind} if kind else {})

    def _send(self, code: int, body: bytes, headers: Mapping[str, str]) -> None:
        late = self.fault if code in (200, 206) and self.command != "HEAD" and body else None
        length, sent = len(body), body
        if late == "short length":
            length = max(0, len(body) - 7)
            sent = body[:length]
        elif late == "long length":
            length += 7
        elif late in ("truncated", "stall", "reset in the middle"):
            sent = body[: len(body) // 2]
        elif late == "empty":
            sent = b""
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(sent)
        if late:
            self.wfile.flush()
            self.close_connection = True
            if late == "stall":
                time.sleep(self.hub.stall_seconds)
            if late == "reset in the middle":
                self._reset()

    def _reset(self) -> None:
        """End the connection with a reset."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
