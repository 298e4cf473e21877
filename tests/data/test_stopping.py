"""A request to stop ends the waits for servers that do not answer, and nothing else."""

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.config.data import TokenizerConfig
from pretrain.data import TokenBatch, TokenStream, compression, make_catalog, reading
from pretrain.data.errors import ReadingStoppedError
from pretrain.data.sources import http, retries
from pretrain.data.sources.retries import TransientError, patient, retrying, stopping
from pretrain.processes.exit_codes import STOPPED
from pretrain.processes.signals import StopRequests, stop_requests
from tests.data.corpus import drain, make_setting, make_texts, rows, write_jsonl
from tests.data.hub_server import hub_server

pytestmark = pytest.mark.usefixtures("warm")

HOURS = 10_000.0


@pytest.fixture(autouse=True)
def _waits_of_hours() -> Iterator[None]:
    with patient(first_wait_seconds=HOURS, longest_wait_seconds=HOURS, total_seconds=10 * HOURS, silence_seconds=2):
        yield


class Failing:
    """Fails a number of times; counts its calls."""

    def __init__(self, times: int, asked: float | None = None) -> None:
        self.times, self.asked, self.calls = times, asked, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise TransientError("down", self.asked)
        return "contents"


@pytest.mark.parametrize("asked", [None, HOURS])
def test_a_stop_ends_the_waits_that_have_begun_and_those_to_come(asked: float | None) -> None:
    requests, waits = StopRequests(), threading.Event()
    raised: list[Exception] = []
    attempt = Failing(10, asked)

    def read() -> None:
        try:
            retrying("https://host/a.jsonl", attempt)
        except Exception as error:
            raised.append(error)

    def look() -> bool:
        waits.set()  # called while a thread waits
        return bool(requests)

    with stopping(look):
        thread = threading.Thread(target=read)
        thread.start()
        assert waits.wait(60)
        requests.count += 1
        thread.join(60)
        assert not thread.is_alive()
        [error] = raised
        assert isinstance(error, ReadingStoppedError)
        assert error.exit_code == STOPPED
        assert "https://host/a.jsonl: not read, because a stop was requested" in str(error)
        assert attempt.calls == 2
        with pytest.raises(ReadingStoppedError):
            retrying("x", Failing(2))


def test_after_a_stop_what_is_left_is_still_read() -> None:
    """Single failures included: they are common while a server is well."""
    with stopping():
        assert retrying("x", Failing(0)) == "contents"
        assert retrying("x", Failing(1, HOURS)) == "contents"


def test_a_stop_ends_with_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    with stopping(), stopping(lambda: False):
        pass
    assert not retries.stop_requested()
    monkeypatch.setattr(retries, "_sleep", waits.append)
    assert retrying("x", Failing(3)) == "contents"
    assert len(waits) == 3


def test_a_signal_that_interrupts_a_wait_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = StopRequests()
    sleep = retries.time.sleep

    def signalled(seconds: float) -> None:
        signal.raise_signal(signal.SIGTERM)
        sleep(min(seconds, 0.01))

    monkeypatch.setattr(retries.time, "sleep", signalled)
    with (
        stop_requests(requests, None, first_only=True),
        stopping(lambda: bool(requests)),
        pytest.raises(ReadingStoppedError),
    ):
        retrying("x", Failing(10))
    assert requests.count == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_whose_server_is_dead_stops_and_continues_later(
    workers: int, tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of a small file, much is still to be read after two batches. A worker reads far ahead: it begins without a server.
    for part in ("_FIRST_PART", "_LARGEST_PART", "BUFFER_BYTES"):
        monkeypatch.setattr(http, part, 2048)
    monkeypatch.setattr(compression, "_BUFFER_BYTES", 2048)
    monkeypatch.setattr(reading, "REFILL_BYTES", 1 << 13)
    texts = make_texts(3, 400, longest=60)
    with hub_server({"a.jsonl": write_jsonl(tmp_path / "a.jsonl", texts).read_bytes()}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        setting = make_setting(tokenizer, hub.path("a.jsonl"), lanes=1)  # type: ignore[arg-type]
        catalog = make_catalog(setting.config)
        hub.dead = workers > 0
        stream = setting.open(workers=workers, catalog=catalog)
        found = [] if hub.dead else drain(stream, 16, limit=2)
        hub.dead = True
        with pytest.raises(ReadingStoppedError), stopping():
            drain_into(found, stream)
        state = stream.state()
        stream.close()
        hub.dead = False
        resumed = setting.open(catalog=catalog, state=state)
        found += drain(resumed, 16, limit=2)
        whole = setting.open(catalog=catalog)
        assert rows(found) == rows(drain(whole, 16, limit=len(found)))
        resumed.close(), whole.close()


def drain_into(found: list[TokenBatch], stream: TokenStream) -> None:
    while True:
        found.append(stream.next_batch(16))
