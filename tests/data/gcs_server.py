"""A server on loopback that speaks what gcsfs uses of the JSON API of Google Cloud Storage."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class Storage:
    """One bucket `data`; tests change it while it runs."""

    def __init__(self) -> None:
        self.objects: dict[str, tuple[bytes, int]] = {}
        """Contents and generation, by name."""
        self.generation = 1_000_000
        self.page = 2
        self.dead = False
        self.answers: list[int] = []
        """Codes that the next requests are answered with."""
        self.requests: list[str] = []
        self.endpoint = ""

    def put(self, name: str, data: bytes) -> None:
        """Write an object."""
        self.generation += 1
        self.objects[name] = (data, self.generation)

    def about(self, name: str) -> dict[str, Any]:
        """The resource of an object; like the real one, its etag changes with its metadata."""
        data, generation = self.objects[name]
        return {
            "kind": "storage#object",
            "bucket": "data",
            "name": name,
            "size": str(len(data)),
            "generation": str(generation),
            "metageneration": "1",
            "etag": base64.b64encode(str(generation).encode()).decode(),
            "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
        }


@contextmanager
def gcs_server() -> Iterator[Storage]:
    """Serve a bucket."""
    storage = Storage()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"storage": storage}))
    server.daemon_threads = True
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    storage.endpoint = f"http://127.0.0.1:{server.server_port}"
    try:
        yield storage
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    storage: Storage
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # a body that waits for the headers to be acknowledged costs 40 ms a request

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        storage = self.storage
        storage.requests.append(self.path)
        if storage.dead:
            self.close_connection = True
            return
        if storage.answers:
            self._send(storage.answers.pop(0), b'{"error": {"message": "as the test wants"}}')
            return
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        names = [unquote(part) for part in parts.path.strip("/").split("/")]
        media = names[0] == "download"
        bucket, *rest = names[names.index("b") + 1 :]
        if bucket != "data":
            self._send(404, b"{}")
        elif not rest:
            self._json({"kind": "storage#bucket", "name": bucket})
        elif len(rest) == 1:
            self._list(query)
        else:
            name = "/".join(rest[1:])
            generation = query.get("generation")
            if name not in storage.objects or generation not in (None, str(storage.objects[name][1])):
                self._send(404, b"{}")
            elif media:
                self._media(storage.objects[name][0])
            else:
                self._json(storage.about(name))

    def _list(self, query: dict[str, str]) -> None:
        names = sorted(name for name in self.storage.objects if name.startswith(query.get("prefix", "")))
        first = int(query.get("pageToken", 0))
        size = min(self.storage.page, int(query.get("maxResults", 1000)))
        items = [self.storage.about(name) for name in names[first : first + size]]
        found: dict[str, Any] = {"kind": "storage#objects", "items": items}
        if first + size < len(names):
            found["nextPageToken"] = str(first + size)
        self._json(found)

    def _media(self, data: bytes) -> None:
        asked = self.headers.get("Range")
        if not asked:
            self._send(200, data)
            return
        first, _, last = asked.removeprefix("bytes=").partition("-")
        body = data[int(first) : int(last) + 1 if last else None]
        self._send(206, body, {"Content-Range": f"bytes {first}-{int(first) + len(body) - 1}/{len(data)}"})

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
