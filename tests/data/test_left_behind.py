"""What a stream leaves behind when it ends, however it ends: no thread, no open file, and nobody who waits for it."""

import gc
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.data import TokenizerConfig
from pretrain.data import DataError, DocumentEncoder, TokenStream, make_catalog, prefetch, reading, validation_sample
from pretrain.data.errors import ReadingStoppedError
from pretrain.data.prefetch import Prefetcher
from pretrain.data.sources.retries import TransientError, patient, retrying
from pretrain.engine.ranks import Ranks
from tests.data.corpus import Setting, drain, forked, make_setting, make_texts, write_jsonl, write_parquet


@pytest.fixture(params=["concatenate", "best_fit"])
def setting(
    request: pytest.FixtureRequest, tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> Setting:
    """Several files on three lanes, more than is read ahead."""
    monkeypatch.setattr(reading, "REFILL_BYTES", 2000)
    paths = [write_parquet(tmp_path / f"{name}.parquet", make_texts(3, 400), 100) for name in "ab"]
    paths.append(write_jsonl(tmp_path / "c.jsonl.gz", make_texts(4, 400)))
    return make_setting(tokenizer, *paths, lanes=3, epochs=None, packing=request.param)


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    """What is left must not wait for the collector, which comes when it likes."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def our_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("tokenizer", "prefetch"))]


def open_files(folder: Path) -> list[str]:
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            path = os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:  # that of the listing itself
            continue
        found += [path] if path.startswith(str(folder)) else []
    return found


def wait_until_nothing_is_left(folder: Path) -> None:
    """A thread of the tokenizer ends after the call that it is in."""
    deadline = time.monotonic() + 30
    while our_threads() or open_files(folder):
        assert time.monotonic() < deadline, (our_threads(), open_files(folder))
        time.sleep(0.01)


def begun(setting: Setting, tmp_path: Path) -> TokenStream:
    """A stream in the middle of its files."""
    stream = setting.open()
    stream.next_batch(4)
    assert our_threads()
    assert open_files(tmp_path)
    return stream


def test_a_closed_stream_leaves_nothing(setting: Setting, tmp_path: Path) -> None:
    stream = begun(setting, tmp_path)
    for _ in range(2):
        stream.close()
        wait_until_nothing_is_left(tmp_path)
    with pytest.raises(RuntimeError, match="closed"):
        stream.next_batch(4)


def test_a_dropped_stream_leaves_nothing(setting: Setting, tmp_path: Path) -> None:
    stream = begun(setting, tmp_path)
    del stream
    wait_until_nothing_is_left(tmp_path)


def test_a_prefetched_stream_that_is_closed_leaves_nothing(setting: Setting, tmp_path: Path) -> None:
    batches = Prefetcher(setting.open(), 4, 100, Ranks(), Ranks())
    batches.next_batch()
    assert open_files(tmp_path)
    for _ in range(2):
        batches.close()
        wait_until_nothing_is_left(tmp_path)


def test_a_prefetched_stream_that_is_closed_while_it_reads_leaves_nothing(
    setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "_COMPLETE_SECONDS", 0.0)
    reads, closed = threading.Event(), threading.Event()
    encode, close = DocumentEncoder.encode, TokenStream.close

    def slow(encoder: DocumentEncoder, texts: Sequence[str]) -> Any:
        reads.set()
        closed.wait(30)
        return encode(encoder, texts)

    def noted(stream: TokenStream) -> None:
        close(stream)
        closed.set()

    monkeypatch.setattr(DocumentEncoder, "encode", slow)
    monkeypatch.setattr(TokenStream, "close", noted)
    batches = Prefetcher(setting.open(), 4, 100, Ranks(), Ranks())
    assert reads.wait(30)
    batches.close()
    wait_until_nothing_is_left(tmp_path)


def test_a_stream_that_fails_leaves_no_thread(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", make_texts(3, 50))
    path.write_bytes(path.read_bytes() + b"{\n")
    failing = make_setting(tokenizer, path, lanes=1, epochs=1).open()
    with pytest.raises(DataError, match="line 51"):
        drain(failing, 4)
    wait_until_nothing_is_left(tmp_path)


@pytest.mark.skipif(not hasattr(threading, "_maintain_shutdown_locks"), reason="this Python starts threads in C")
def test_a_stream_may_be_collected_inside_a_thread_that_is_just_starting(setting: Setting) -> None:
    """The starting thread holds a lock that joining any thread takes, and whoever starts it waits for it."""

    def collect_while_a_thread_starts() -> None:
        signal.alarm(60)
        stream = setting.open()
        stream.next_batch(4)
        cycle: list[object] = [stream]
        cycle.append(cycle)
        gone = weakref.ref(stream)
        del stream, cycle
        real, starter, inside = threading._maintain_shutdown_locks, threading.get_ident(), []  # type: ignore[attr-defined]

        def collect() -> None:
            if threading.get_ident() != starter and not inside:
                inside.append(gone() is not None)
                gc.collect()
            real()

        threading._maintain_shutdown_locks = collect  # type: ignore[attr-defined]
        thread = threading.Thread(target=int)
        thread.start()
        thread.join()
        assert inside == [True]
        assert gone() is None

    assert forked(collect_while_a_thread_starts) == 0


def test_a_validation_sample_that_is_complete_waits_for_nothing_that_was_read_ahead(
    tmp_path: Path, tokenizer: TokenizerConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(6):
        write_jsonl(tmp_path / f"{number}.jsonl", make_texts(number, 40))
    setting = make_setting(tokenizer, tmp_path, validation_fraction=0.5, lanes=1)
    [units] = make_catalog(setting.config).units(setting.config)
    real, ends, waiting = validation_sample._read_beginning, [], threading.Event()

    def read(unit: object, *rest: object) -> object:
        if unit is units[0]:
            waiting.wait(30)
            return real(unit, *rest)  # type: ignore[arg-type]
        try:
            return retrying("server", fail)
        except DataError as error:
            ends.append(type(error))
            raise

    def fail() -> None:
        waiting.set()
        raise TransientError("busy")

    monkeypatch.setattr(validation_sample, "_read_beginning", read)
    encoder = DocumentEncoder.load(setting.tokenizer)
    budget = validation_sample.BadRowBudget(0)
    source = validation_sample._Source(list(enumerate(units)), 5, 1 << 20, 0.5, encoder, budget)
    with patient(total_seconds=20, first_wait_seconds=0.01, longest_wait_seconds=0.05):
        found = source.draw()
    assert found.tokens >= 5
    assert found.units_read == 1
    assert set(ends) == {ReadingStoppedError}
