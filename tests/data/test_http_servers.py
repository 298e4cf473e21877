"""Servers and proxies that answer otherwise than HTTP's rules for ranges and redirects say, or just unusually."""

import gzip
import json
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import quote, unquote, urlsplit

import httpx2
import pytest

from pretrain.data import DataError
from pretrain.data.errors import DataUnavailableError
from pretrain.data.sources import http, list_files, open_bytes, retries
from pretrain.data.sources.retries import patient
from pretrain.data.units import DataFile
from tests.data.hub_server import hub_server

SUFFIXES = (".jsonl",)
DATA = bytes(range(256)) * 2000
TAG = '"v1"'
TOKEN = "hf_secretsecretsecret"

Answer = tuple[int, Mapping[str, str], bytes]
Answers = Callable[[str, Mapping[str, str], int], Answer | None]


class Server:
    """Answers each request by a function of its path, headers and number."""

    def __init__(self, answer: Answers) -> None:
        self.requests: list[tuple[str, dict[str, str]]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                headers = {key.lower(): value for key, value in self.headers.items()}
                outer.requests.append((self.path, headers))
                found = answer(self.path, headers, len(outer.requests)) or whole_or_range(headers)
                code, sent, body = found
                self.send_response(code)
                for key, value in sent.items():
                    self.send_header(key, value)
                chunked = sent.get("Transfer-Encoding") == "chunked"
                if not chunked and "Content-Length" not in sent:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if chunked else body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # type: ignore[method-assign]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.origin = f"http://127.0.0.1:{self._server.server_port}"
        self.url = f"{self.origin}/d/a.jsonl"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def whole_or_range(headers: Mapping[str, str], data: bytes = DATA, tag: str = TAG) -> Answer:
    """As the rules say."""
    asked = headers.get("range", "")
    if not asked or headers.get("if-range", tag) != tag:
        return 200, {"ETag": tag}, data
    first, last = map(int, asked.removeprefix("bytes=").split("-"))
    if first >= len(data):
        return 416, {"Content-Range": f"bytes */{len(data)}"}, b""
    body = data[first : last + 1]
    return 206, {"ETag": tag, "Content-Range": f"bytes {first}-{first + len(body) - 1}/{len(data)}"}, body


@contextmanager
def serving(answer: Answers) -> Iterator[Server]:
    server = Server(answer)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(autouse=True)
def _impatient() -> Iterator[None]:
    with patient(first_wait_seconds=0.001, longest_wait_seconds=0.01, silence_seconds=2, total_seconds=20):
        yield


def read(server: Server) -> bytes:
    """As a run does that has a lock."""
    with open_bytes(DataFile(server.url, len(DATA), "v1")) as stream:
        return stream.read()


PAGE = b"<html>log in" + b" " * len(DATA)
AT_FIRST: dict[str, Answer] = {
    "a page of a proxy": (200, {"Content-Type": "text/html"}, PAGE),
    "a page of unknown length": (200, {"Content-Type": "text/html", "Transfer-Encoding": "chunked"}, PAGE),
    "a page as the range": (206, {"Content-Range": f"bytes 0-65535/{len(DATA)}"}, PAGE[: 1 << 16]),
    "another range": (206, {"ETag": TAG, "Content-Range": f"bytes 5-65535/{len(DATA)}"}, DATA[5 : 1 << 16]),
    "a range without its place": (206, {"ETag": TAG}, DATA[: 1 << 16]),
    "several ranges": (206, {"ETag": TAG, "Content-Type": "multipart/byteranges; boundary=x"}, b"--x\r\n"),
    "nothing": (200, {"ETag": TAG, "Content-Length": "0"}, b""),
    "half a range": (206, {"ETag": TAG, "Content-Range": f"bytes 0-9/{len(DATA)}"}, DATA[:10]),
    "huge headers": (200, {"ETag": TAG, "X-Junk": "x" * 300_000}, DATA),
    "headers that are none": (200, {"ETag": TAG, "Content-Length": "many"}, b""),
    "too early": (425, {}, b""),
    "a retry date": (503, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, b""),
    "a retry date that is none": (429, {"Retry-After": "soon"}, b""),
}


@pytest.mark.parametrize("case", AT_FIRST)
def test_an_answer_that_cannot_be_right_is_asked_for_again(case: str) -> None:
    with serving(lambda path, headers, number: AT_FIRST[case] if number == 1 else None) as server:
        assert read(server) == DATA
        assert len(server.requests) > 1


def test_the_whole_file_in_answer_to_a_range_is_cut_out_of_it() -> None:
    with serving(lambda path, headers, number: (200, {"ETag": TAG}, DATA)) as server:
        assert read(server) == DATA
    chunked = {"ETag": TAG, "Transfer-Encoding": "chunked"}
    with serving(lambda path, headers, number: (200, chunked, DATA)) as server:
        assert read(server) == DATA


def test_more_than_was_asked_for_is_cut_off() -> None:
    def answer(path: str, headers: Mapping[str, str], number: int) -> Answer:
        first = int(headers["range"].removeprefix("bytes=").split("-")[0])
        span = f"bytes {first}-{len(DATA) - 1}/{len(DATA)}"
        return 206, {"ETag": TAG, "Content-Range": span}, DATA[first:]

    with serving(answer) as server:
        assert read(server) == DATA


def test_a_server_that_compresses_what_it_sends_is_refused_by_name() -> None:
    packed = gzip.compress(DATA)
    with (
        serving(lambda path, headers, number: (200, {"ETag": TAG, "Content-Encoding": "gzip"}, packed)) as server,
        pytest.raises(DataError, match=r"a\.jsonl: the server sends it compressed \(gzip\)"),
    ):
        read(server)


def test_a_server_may_say_that_a_compressed_file_is_compressed() -> None:
    data = gzip.compress(DATA)

    def answer(path: str, headers: Mapping[str, str], number: int) -> Answer:
        code, sent, body = whole_or_range(headers, data)
        return code, {**sent, "Content-Encoding": "x-gzip" if number % 2 else "gzip"}, body

    with serving(answer) as server, open_bytes(DataFile(f"{server.url}.gz", len(data), "v1")) as stream:
        assert stream.read() == data


@pytest.mark.parametrize("length", ["unknown", "known"])
def test_a_file_whose_size_is_not_known_is_not_taken_for_empty(length: str) -> None:
    sent = {"ETag": TAG} | ({"Transfer-Encoding": "chunked"} if length == "unknown" else {})
    with serving(lambda path, headers, number: (200, sent, DATA)) as server:
        [file] = list_files(server.url, SUFFIXES)
        assert file.bytes == (None if length == "unknown" else len(DATA))
        if length == "unknown":
            with pytest.raises(DataError, match="does not state the size"), open_bytes(file):
                pass


@pytest.mark.parametrize("ranges", [True, False])
def test_an_empty_file_is_empty(ranges: bool) -> None:
    def answer(path: str, headers: Mapping[str, str], number: int) -> Answer:
        return (416, {"ETag": TAG, "Content-Range": "bytes */0"}, b"") if ranges else (200, {"ETag": TAG}, b"")

    with serving(answer) as server:
        [file] = list_files(server.url, SUFFIXES)
        assert file == DataFile(server.url, 0, "v1")
        with open_bytes(file) as stream:
            assert stream.read() == b""


def test_a_file_that_has_become_empty_has_changed() -> None:
    with (
        serving(lambda path, headers, number: (416, {"ETag": TAG, "Content-Range": "bytes */0"}, b"")) as server,
        pytest.raises(DataError, match="the file has changed"),
    ):
        read(server)


def test_redirects_in_a_circle_end() -> None:
    with (
        serving(lambda path, headers, number: (302, {"Location": "/d/a.jsonl"}, b"")) as server,
        pytest.raises(DataError, match=r"a\.jsonl: redirected more than 10 times"),
    ):
        read(server)


def test_relative_redirects_are_followed() -> None:
    def answer(path: str, headers: Mapping[str, str], number: int) -> Answer | None:
        return (307, {"Location": "../e/b?x=1"}, b"") if path == "/d/a.jsonl" else None

    with serving(answer) as server:
        assert read(server) == DATA
        assert server.requests[-1][0] == "/e/b?x=1"


def test_the_token_goes_to_the_host_of_the_hub_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where its files or the next page of a listing are redirected to."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    commit = "a" * 40
    tree = [{"type": "file", "oid": "b" * 40, "size": len(DATA), "path": "d/a.jsonl"}]

    def elsewhere(path: str, headers: Mapping[str, str], number: int) -> Answer | None:
        return (200, {}, json.dumps(tree).encode()) if "tree" in path else None

    with serving(elsewhere) as other:

        def answer(path: str, headers: Mapping[str, str], number: int) -> Answer | None:
            if "/tree/" in path:
                if "listed" in path:
                    return 302, {"Location": f"{other.origin}/tree"}, b""
                return 200, {"Link": f'<{other.origin}/tree?cursor=1>; rel="next"'}, b"[]"
            linked = f'"{"b" * 40}"'
            return 302, {"Location": f"{other.origin}/signed?X-Amz-Signature=1", "X-Linked-Etag": linked}, b""

        with serving(answer) as hub:
            monkeypatch.setenv("HF_ENDPOINT", hub.origin)
            [file] = list_files(f"hf://datasets/org/set@{commit}/d/**", SUFFIXES)
            with pytest.raises(DataError, match="no such file or folder"):
                list_files(f"hf://datasets/org/set@{commit}/listed/**", SUFFIXES)
            with open_bytes(file) as stream:
                assert stream.read() == DATA
            assert all(headers.get("authorization") == f"Bearer {TOKEN}" for _, headers in hub.requests)
    assert len(other.requests) >= 4
    assert all("authorization" not in headers for _, headers in other.requests)


@pytest.mark.parametrize("next_page", ["?cursor={}", "/api/datasets/org/set/tree/COMMIT?cursor={}", "HERE?cursor={}"])
@pytest.mark.parametrize("loops", [False, True])
def test_pages_may_be_relative_and_do_not_run_in_circles(
    next_page: str, loops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "a" * 40

    def answer(path: str, headers: Mapping[str, str], number: int) -> Answer:
        parts = urlsplit(path)
        page = int(parts.query.partition("cursor=")[2] or 0)
        following = (page + 1) % 3
        entries = [
            {"type": "directory", "oid": "b" * 40, "size": 0, "path": f"{page}.jsonl"},
            {"type": "file", "oid": "b" * 40, "size": 3, "path": f"d/{page}.jsonl", "xetHash": "f" * 64},
        ]
        here = f"http://{headers['host']}{parts.path}"
        link = next_page.replace("COMMIT", commit).replace("HERE", here).format(following)
        sent = {"Link": f'<{link}>; rel="next"'} if following or loops else {}
        return 200, sent, json.dumps(entries).encode()

    with serving(answer) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.origin)
        path = f"hf://datasets/org/set@{commit}/**"
        if loops:
            with pytest.raises(DataError, match="do not end"):
                list_files(path, SUFFIXES)
        else:
            assert [file.path.rpartition("/d/")[2] for file in list_files(path, SUFFIXES)] == [
                "0.jsonl",
                "1.jsonl",
                "2.jsonl",
            ]


@pytest.mark.parametrize("slow", ["always", "at first"])
def test_a_trickle_is_a_stall(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then keeps a connection open for ever; it counts neither as an answer nor as progress."""
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    clock = SimpleNamespace(monotonic=lambda: now, sleep=sleep)
    monkeypatch.setattr(http, "time", clock)
    monkeypatch.setattr(retries, "time", clock)
    real = http.httpx2.Response.iter_raw
    responses = 0

    def iter_raw(self: httpx2.Response) -> Iterator[bytes]:
        nonlocal now, responses
        responses += 1
        body = b"".join(real(self))
        slowly = 60 if slow == "always" or responses <= 3 else 0
        for index in range(slowly):
            now += 1
            yield body[index : index + 1]
        yield body[slowly:]

    monkeypatch.setattr(http.httpx2.Response, "iter_raw", iter_raw)
    with serving(lambda path, headers, number: None) as server, patient(silence_seconds=30, total_seconds=300):
        if slow == "always":
            with pytest.raises(DataUnavailableError, match="bytes arrived in"):
                read(server)
            assert now < 1000
        else:
            assert read(server) == DATA
            assert len(server.requests) > 3


NAMES = ["a b", "é/ü", "a%20b", "a#b", "a?b=c", "a+b", "a&b;c", "日本", "a%b"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [10, 1000])
def test_names_are_names(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data, name = DATA[:size], f"{name}.jsonl"
    with hub_server({name: data, "a.jsonl": b"other"}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        files = [file for file in list_files(hub.path(), SUFFIXES) if file.path.endswith("/" + name)]
        assert len(files) == 1
        with open_bytes(files[0]) as stream:
            assert stream.read() == data
        url = hub.url(quote(name))
        [file] = list_files(url, SUFFIXES)
        assert unquote(file.path) == hub.url(name)
        with open_bytes(file) as stream:
            assert stream.read() == data


def test_ipv6_hosts_are_read() -> None:
    assert http.parse_url("http://[::1]:80/d/a.jsonl") == "http://[::1]:80/d/a.jsonl"
    assert http.origin("http://[::1]:80/d") == ("http", "::1", 80)


def test_the_clients_log_no_address(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """At INFO they log addresses with their signatures, at DEBUG headers as well."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with hub_server({"a.jsonl": DATA}, token=TOKEN) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.fail(0.3, "503", "expired", "reset")
        [file] = list_files(hub.path(), SUFFIXES)
        with open_bytes(file) as stream:
            assert stream.read() == DATA
        assert any("Signature" in path for path, _ in hub.requests)
    assert "Signature" not in caplog.text
    assert TOKEN not in caplog.text


LISTINGS: dict[str, tuple[Answer, str]] = {
    "redirects in a circle": ((302, {"Location": "/api/again"}, b""), "lead in a circle"),
    "a body that is not compressed": ((200, {"Content-Encoding": "gzip"}, b"[]"), "unavailable"),
    "an object": ((200, {}, b'{"error": "busy"}'), "the Hub's answer is a JSON dict, expected a list"),
    "names": ((200, {}, b'["a.jsonl"]'), "the Hub's listing cannot be read"),
    "no path": ((200, {}, b'[{"type": "file"}]'), "the Hub's listing cannot be read"),
    "endless brackets": ((200, {}, b"[" * 1_000_000), "the Hub's answer is not whole"),
    "a next page without a host": ((200, {"Link": '<http://[x>; rel="next"'}, b"[]"), "has no valid address"),
    "a next page without a port": ((200, {"Link": '<http://h:x/>; rel="next"'}, b"[]"), "has no valid address"),
}


@pytest.mark.parametrize("case", LISTINGS)
def test_a_listing_that_cannot_be_right_is_one_error(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answer, message = LISTINGS[case]
    with serving(lambda path, headers, number: answer) as server, patient(total_seconds=0.05):
        monkeypatch.setenv("HF_ENDPOINT", server.origin)
        with pytest.raises(DataError, match=message):
            list_files(f"hf://datasets/org/set@{'a' * 40}", SUFFIXES)


def test_a_listing_may_be_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    body = gzip.compress(json.dumps([{"type": "file", "oid": "b" * 40, "size": 3, "path": "a.jsonl"}]).encode())
    with serving(lambda path, headers, number: (200, {"Content-Encoding": "gzip"}, body)) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.origin)
        [file] = list_files(f"hf://datasets/org/set@{'a' * 40}", SUFFIXES)
        assert file.bytes == 3


@pytest.mark.parametrize("location", ["http://[x/", "http://h:x/", "http://\x7f/"])
def test_a_redirect_to_no_address_is_one_error(location: str) -> None:
    with (
        serving(lambda path, headers, number: (302, {"Location": location}, b"")) as server,
        pytest.raises(DataError, match=r"a\.jsonl: redirected to an address that cannot be read"),
    ):
        read(server)


@pytest.mark.parametrize("after", ["nan", "-3", "Wed, 21 Oct 99999999999 07:28:00 GMT", "1e999", "\u00b2"])
def test_a_wait_that_makes_no_sense_is_an_ordinary_wait(after: str) -> None:
    def answer(path: str, headers: Mapping[str, str], number: int) -> Answer | None:
        return (429, {"Retry-After": after}, b"") if number == 1 else None

    with serving(answer) as server, patient(total_seconds=0.5):
        assert read(server) == DATA
