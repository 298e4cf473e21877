"""Data sets of the Hub and files over HTTP, from a server on loopback that fails in every way that is known."""

import io
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.data import DataConfig, SourceConfig, TokenizerConfig
from pretrain.config.source_path import path_problem
from pretrain.data import DataError, check_sources, make_catalog
from pretrain.data.errors import DataUnavailableError
from pretrain.data.sources import http, list_files, open_bytes, retries
from pretrain.data.sources.hub import HubPath
from pretrain.data.sources.retries import TransientError, patient, retrying
from pretrain.data.units import DataFile
from pretrain.processes.exit_codes import UNAVAILABLE
from pretrain.processes.redaction import redact
from tests.data.corpus import drain, make_setting, make_texts, rows, write_jsonl, write_parquet
from tests.data.hub_server import FAULTS, Hub, hub_server

pytestmark = pytest.mark.usefixtures("warm")

SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst")
TOKEN = "hf_secretsecretsecret"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with patient(first_wait_seconds=0.005, longest_wait_seconds=0.02, silence_seconds=0.25):
        yield


def connect(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    hub.stall_seconds = 0.6
    return hub


def some_bytes(seed: int, count: int) -> bytes:
    return random.Random(seed).randbytes(count)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    texts = make_texts(5, 400, longest=60)
    write_parquet(folder / "a.parquet", texts[:100], 30)
    write_jsonl(folder / "b.jsonl", texts[100:200])
    write_jsonl(folder / "c.jsonl.gz", texts[200:300])
    (folder / "deep").mkdir()
    write_jsonl(folder / "deep" / "d.jsonl.zst", texts[300:])
    (folder / "README.md").write_text("words")
    return folder


def names(files: list[DataFile]) -> list[str]:
    return [file.path.split("/", 5)[-1] for file in files]


def test_listing_pages_through_the_tree_and_pins_the_commit(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server(corpus) as hub:
        connect(hub, monkeypatch)
        every = ["a.parquet", "b.jsonl", "c.jsonl.gz", "deep/d.jsonl.zst"]
        for path, found in {
            "": every,
            "**": every,
            "*.jsonl*": every[1:3],
            "deep": every[3:],
            "deep/": every[3:],
            "de*p/**/*.zst": every[3:],
            "a.parquet": every[:1],
            "deep/d.jsonl.zst": every[3:],
        }.items():
            files = list_files(hub.path(path), SUFFIXES)
            assert names(files) == found, path
            assert {file.path.split("@")[1].split("/")[0] for file in files} == {hub.refs["main"]}
        sizes = [(corpus / name).stat().st_size for name in every]
        files = list_files(hub.path(), SUFFIXES)
        assert [file.bytes for file in files] == sizes
        assert all(file.etag and file.sha256 == file.etag for file in files if (file.bytes or 0) >= hub.lfs_from)
        assert sum("cursor=" in path for path, _ in hub.requests) > 4
        # The pinned path stands for the same files.
        assert list_files(files[1].path, SUFFIXES) == [files[1]]


def test_partitioned_folders_may_be_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    every = [f"year=202{year}/month={month}/a b.jsonl" for year in range(3) for month in (1, 12)]
    with hub_server(dict.fromkeys(every, b'{"text": "a"}\n')) as hub:
        connect(hub, monkeypatch)
        for pattern, found in {"year=202?/month=1/*": every[::2], "year=202?/month=1?/*": every[1::2]}.items():
            path = hub.path(pattern)
            assert path_problem(path) is None
            assert names(list_files(path, SUFFIXES)) == found
            assert redact(path) == path


def test_revisions_with_slashes_and_the_default_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server({"a.jsonl": b"1\n"}) as hub:
        connect(hub, monkeypatch)
        commit = hub.push({"a.jsonl": b"22\n"}, branch="refs/convert/parquet")
        for revision in ("refs/convert/parquet", "refs%2Fconvert%2Fparquet"):
            [file] = list_files(hub.path("a.jsonl", revision), SUFFIXES)
            assert (file.bytes, file.path) == (3, f"hf://datasets/org/set@{commit}/a.jsonl")
        [file] = list_files("hf://datasets/org/set/a.jsonl", SUFFIXES)
        assert f"@{hub.refs['main']}/" in file.path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("hf://datasets/org/other", "no such repository, or it is private: check the name, and set HF_TOKEN"),
        ("hf://datasets/org/set@gone/a.jsonl", "no such revision"),
        ("hf://datasets/org/set/b.jsonl", "no such file or folder"),
        ("hf://datasets/org/set/none/*.jsonl", "no such file or folder"),
        ("hf://org/set/b.jsonl", "expected hf://datasets/ORG/NAME"),
        ("hf://datasets/set", "expected hf://datasets/ORG/NAME"),
        ("ftp://host/b.jsonl", "unknown kind of URL"),
        ("{endpoint}/plain/org/set/gone.jsonl", "the server answered 404"),
        ("{endpoint}/plain/org/set/a.csv", "unknown kind of file"),
        ("{endpoint}/plain/org/set/*.jsonl", "cannot be listed over HTTP"),
        ("https://user:passw0rd@host/a.jsonl", "a URL with a password"),
        ("https://host/a.jsonl?Signature=passw0rd", "a URL with a password"),
    ],
)
def test_a_path_that_cannot_be_read_is_a_problem_at_once(
    path: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with hub_server({"a.jsonl": b'{"text": "a"}\n'}) as hub:
        connect(hub, monkeypatch)
        path = path.format(endpoint=hub.endpoint)
        with pytest.raises(DataError) as error:
            list_files(path, SUFFIXES)
        assert message in str(error.value)
        assert "passw0rd" not in str(error.value)
        assert len(hub.requests) <= 3  # none of these is tried again


def test_the_token_goes_to_the_hub_alone(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server(corpus, token=TOKEN) as hub:
        connect(hub, monkeypatch)
        with pytest.raises(DataError, match="set HF_TOKEN"):
            list_files(hub.path(), SUFFIXES)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for file in list_files(hub.path(), SUFFIXES):
            with open_bytes(file) as stream:
                assert stream.read() == (corpus / names([file])[0]).read_bytes()
        to_cdn = [headers for path, headers in hub.requests if path.startswith("/cdn/")]
        assert to_cdn
        assert not any("authorization" in headers for headers in to_cdn)


@pytest.mark.parametrize("kind", ["hub", "plain"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_survived_and_what_arrived_is_not_asked_for_again(
    kind: str, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = some_bytes(1, 300_000)
    with hub_server({"a.jsonl": data}) as hub:
        connect(hub, monkeypatch)
        hub.fail(0.4, fault, seed=2)
        [file] = list_files(hub.path("a.jsonl") if kind == "hub" else hub.url("a.jsonl"), SUFFIXES)
        before = len(hub.requests)
        with open_bytes(file) as stream:
            assert stream.read(100) == data[:100]
            stream.seek(-50, io.SEEK_END)
            assert stream.read() == data[-50:]
            stream.seek(1000)
            assert stream.read() == data[1000:]
        if not (fault == "expired" and kind == "plain"):
            assert hub.injected[fault] >= 2
        if fault in ("truncated", "reset in the middle", "stall", "long length", "short length"):
            starts = [headers["range"] for path, headers in hub.requests[before:] if "range" in headers]
            resumed = [start for start in starts if int(start.split("=")[1].split("-")[0]) % 1000 not in (0, 950)]
            assert resumed, "the byte where it broke begins a range"
            if kind == "plain":
                assert all("if-range" in headers for _, headers in hub.requests[before + 2 :])


def test_links_that_expire_are_asked_for_again_without_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    data = some_bytes(2, 5_000_000)
    waits: list[float] = []
    monkeypatch.setattr(retries, "_sleep", waits.append)
    with hub_server({"a.jsonl": data}) as hub:
        connect(hub, monkeypatch)
        hub.link_uses = 2
        [file] = list_files(hub.path("a.jsonl"), SUFFIXES)
        before = len(hub.requests)
        with open_bytes(file) as stream:
            assert stream.read() == data
        resolved = sum("/resolve/" in path for path, _ in hub.requests[before:])
        assert 3 <= resolved <= 6
        assert len(waits) == resolved - 1
        assert max(waits) < 0.01


def test_a_server_without_ranges_is_read_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    data = some_bytes(3, 200_000)
    with hub_server({"a.jsonl": data}) as hub:
        connect(hub, monkeypatch)
        hub.ranges = False
        [file] = list_files(hub.url("a.jsonl"), SUFFIXES)
        with open_bytes(file) as stream:
            stream.seek(150_000)
            assert stream.read() == data[150_000:]


@pytest.mark.parametrize("size", [99, 100_000, 1_000_000])
@pytest.mark.parametrize("change", ["same size", "longer", "shorter"])
@pytest.mark.parametrize("when", ["before", "while open"])
def test_a_plain_file_that_changes_is_noticed(
    size: int, change: str, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = some_bytes(4, size)
    new = {"same size": data[::-1], "longer": data + b"x", "shorter": data[:-1]}[change]
    with hub_server({"a.jsonl": data}) as hub:
        connect(hub, monkeypatch)
        [file] = list_files(hub.url("a.jsonl"), SUFFIXES)
        if when == "before":
            hub.push({"a.jsonl": new})
        elif size < 100_000:
            pytest.skip("is read whole")
        with open_bytes(file) as stream:
            if when == "while open":
                assert stream.read(10) == data[:10]
                hub.push({"a.jsonl": new})
            with pytest.raises(DataError, match=r"a\.jsonl.*the file has changed"):
                stream.read()
        assert hub.requests[-1][0].endswith("a.jsonl")


@pytest.mark.parametrize("size", [50, 500])
def test_a_branch_that_moves_does_not_move_what_was_listed(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data = some_bytes(6, size)
    with hub_server({"a.jsonl": data}) as hub:
        connect(hub, monkeypatch)
        [file] = list_files(hub.path("a.jsonl"), SUFFIXES)
        pushed = hub.push({"a.jsonl": data + b"!"})
        with open_bytes(file) as stream:
            assert stream.read() == data
        # History was rewritten: the commit serves something else, or is gone.
        old = file.path.split("@")[1].split("/")[0]
        hub.commits[old] = {"a.jsonl": data[::-1]}
        with open_bytes(file) as stream, pytest.raises(DataError, match="the file has changed"):
            stream.read()
        del hub.commits[old]
        with open_bytes(file) as stream, pytest.raises(DataError, match="404 Not Found: no such revision"):
            stream.read()
        assert pushed in list_files(hub.path("a.jsonl"), SUFFIXES)[0].path


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_through_faults_equals_the_clean_one(
    corpus: Path, tokenizer: TokenizerConfig, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = make_setting(tokenizer, corpus, lanes=3, epochs=6)
    clean = rows(drain(stream := local.open(), 8))
    stream.close()
    with hub_server(corpus) as hub:
        connect(hub, monkeypatch)
        setting = make_setting(tokenizer, hub.path(), lanes=3, epochs=6)  # type: ignore[arg-type]
        hub.fail(0.2, seed=4)
        catalog = make_catalog(setting.config)
        stream = setting.open(workers=workers, catalog=catalog)
        assert rows(drain(stream, 8)) == clean
        stream.close()
        assert sum(hub.injected.values()) > 10


def test_a_dead_server_is_waited_for_and_given_up_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    data = some_bytes(7, 400_000)
    with hub_server({"a.jsonl": data}) as hub:
        connect(hub, monkeypatch)
        [file] = list_files(hub.path("a.jsonl"), SUFFIXES)
        waits: list[float] = []

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            hub.dead = len(waits) < 6

        monkeypatch.setattr(retries, "_sleep", sleep)
        with open_bytes(file) as stream:
            assert stream.read(1000) == data[:1000]
            hub.dead = True
            assert stream.read() == data[1000:]
            assert len(waits) == 6
        hub.dead = True
        monkeypatch.setattr(retries, "_sleep", waits.append)
        message = r"a\.jsonl: unavailable for .* minutes \(data.retry_minutes"
        with (
            patient(total_seconds=0.05),
            open_bytes(file) as stream,
            pytest.raises(DataUnavailableError, match=message),
        ):
            stream.read()
        assert DataUnavailableError.exit_code == UNAVAILABLE


def test_an_outage_at_the_start_is_not_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_server({"a.jsonl": b"x"}) as hub:
        connect(hub, monkeypatch)
        hub.dead = True
        with pytest.raises(DataUnavailableError):
            check_sources(DataConfig(sources=[SourceConfig(path=hub.path())], retry_minutes=0))


def test_waits_grow_to_a_bound_and_heed_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(retries, "_sleep", waits.append)
    outcomes: Iterator[Any] = iter([*[TransientError("x")] * 9, *[TransientError("x", 7.0)] * 2, "done"])

    def attempt() -> str:
        outcome = next(outcomes)
        if isinstance(outcome, TransientError):
            raise outcome
        return str(outcome)

    with patient(first_wait_seconds=1, longest_wait_seconds=16):
        assert retrying("it", attempt) == "done"
    for wait, bound in zip(waits, [1, 2, 4, 8, 16, 16, 16, 16, 16], strict=False):
        assert bound / 2 <= wait <= bound
    assert all(7 <= wait <= 9 for wait in waits[9:])
    assert len(set(waits)) == len(waits)  # of random length


def test_only_a_pause_without_progress_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(retries.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(retries, "_sleep", lambda seconds: None)

    def attempt(progressed: bool) -> None:
        now[0] += 40
        if now[0] < 1000:
            raise TransientError("x", progressed=progressed)

    with patient(total_seconds=100):
        retrying("it", lambda: attempt(True))
        now[0] = 0
        with pytest.raises(DataUnavailableError):
            retrying("it", lambda: attempt(False))
        assert now[0] <= 160


def test_the_requests_are_bounded_and_connections_are_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    data = some_bytes(8, 8_000_000)
    sizes: list[int] = []
    real = http.RangeReader.part

    def part(self: http.RangeReader, start: int, length: int) -> bytes:
        sizes.append(length)
        return real(self, start, length)

    monkeypatch.setattr(http.RangeReader, "part", part)
    with hub_server({"a.jsonl": data}) as hub:
        connect(hub, monkeypatch)
        [file] = list_files(hub.path("a.jsonl"), SUFFIXES)
        with open_bytes(file) as stream:
            stream.seek(-8, io.SEEK_END)
            stream.read(8)
            assert sum(sizes) <= 1 << 16  # a footer costs no more
            stream.seek(0)
            while stream.read(100_000):
                pass
        assert max(sizes) <= 1 << 20
        assert len(sizes) <= 14
        assert len(hub.connections) <= 4


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("https://me:pw@host/a.jsonl: x", "https://host/a.jsonl: x"),
        ("GET https://cdn/x?X-Amz-Signature=1&a=b failed", "GET https://cdn/x failed"),
        ("('https://cdn/x?sig=1#f', 3)", "('https://cdn/x', 3)"),
        (f"token {TOKEN}.", "token [secret]."),
        ("Authorization: Bearer abcdefghijkl", "Authorization: [secret]"),
        ("hf://datasets/org/set@main/a?.jsonl: x", "hf://datasets/org/set@main/a?.jsonl: x"),
        ("s3://bucket/a?X-Amz-Signature=1", "s3://bucket/a"),
    ],
)
def test_secrets_are_redacted(text: str, redacted: str) -> None:
    assert redact(text) == redacted


def test_no_secret_reaches_a_message_or_the_log(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG", logger="pretrain")
    with hub_server(corpus, token=TOKEN) as hub:
        connect(hub, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        file = list_files(hub.path("a.parquet"), SUFFIXES)[0]
        hub.fail(1.0, "expired", "503", "reset")
        with patient(total_seconds=0.3), open_bytes(file) as stream, pytest.raises(DataUnavailableError) as error:
            stream.read()
        said = f"{error.value!r} {caplog.text} {file!r}"
        assert "secret" not in said.replace("[secret]", "")
        assert "Signature" not in said


def test_the_path_of_a_hub_is_read_back_as_it_is_written() -> None:
    for text in ("hf://datasets/a/b@main/c d/é.jsonl", "hf://datasets/a/b", "hf://datasets/a/b@x/**/*.parquet"):
        assert str(HubPath.parse(text)) == text


@pytest.mark.parametrize(("path", "package"), [("s3://bucket/a", "s3fs"), ("gs://bucket/a", "gcsfs")])
def test_a_missing_extra_is_one_message_with_the_command(
    path: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(DataError, match=rf"needs the package {package}: pip install 'aurora-pretrain\[\w+\]'"):
        list_files(path, SUFFIXES)
