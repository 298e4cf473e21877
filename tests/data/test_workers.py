"""Worker processes: the same stream, clear errors, and no process left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.config.data import TokenizerConfig
from pretrain.data import DataError, TokenStream
from pretrain.data.workers import WorkerReader
from tests.data.corpus import Setting, drain, make_setting, make_texts, rows, write_jsonl, write_parquet

SCRIPT = """
import sys
from pretrain.config.data import DataConfig, SourceConfig, TokenizerConfig
from pretrain.data import TokenStream

def main(path, tokenizer, workers, wait):
    config = DataConfig(sources=[SourceConfig(path=path)], lanes=2, workers=workers, validation_fraction=0.0)
    stream = TokenStream(config, TokenizerConfig(path=tokenizer), 8)
    stream.next_batch(3)
    if workers:
        print(*(reader._process.pid for reader in stream._readers), flush=True)
    if wait:
        sys.stdin.read()

main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "wait")
"""


@pytest.fixture
def setting(tmp_path: Path, tokenizer: TokenizerConfig) -> Setting:
    path = write_parquet(tmp_path / "a.parquet", make_texts(4, 60), 5)
    return make_setting(tokenizer, path, lanes=3, sequence_length=9, epochs=2)


def workers_of(stream: TokenStream) -> list[subprocess.Popen[bytes]]:
    return [reader._process for reader in stream._readers if isinstance(reader, WorkerReader)]


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended but was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def wait_until_dead(pid: int) -> None:
    deadline = time.monotonic() + 60
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def test_two_processes_give_the_stream_of_none(setting: Setting) -> None:
    """Signals that a scheduler sends to a whole job do not stop them: that is the trainer's decision."""
    expected = drain(setting.open(), 4)
    stream = setting.open(workers=2)
    first = drain(stream, 4, limit=3)
    processes = workers_of(stream)
    assert len(processes) == 2
    for process in processes:
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGHUP)
    state = stream.state()
    batches = first + drain(stream, 4)
    assert [batch.sha256() for batch in batches] == [batch.sha256() for batch in expected]
    assert rows(drain(setting.open(state=state), 4)) == rows(expected[3:])
    stream.close()
    stream.close()
    assert all(process.poll() is not None for process in processes)
    with pytest.raises(RuntimeError, match="closed"):
        stream.next_batch(1)


@pytest.mark.usefixtures("warm")
def test_an_error_in_a_worker_is_raised_as_it_was(tmp_path: Path, tokenizer: TokenizerConfig) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ["the sea"] * 2000)
    path.write_bytes(path.read_bytes() + b'{"text": 7}\n')
    setting = make_setting(tokenizer, path, lanes=1, epochs=1)
    stream = setting.open(workers=1)
    with pytest.raises(DataError) as error:
        drain(stream, 16)
    with pytest.raises(DataError) as inline:
        drain(setting.open(), 16)
    assert str(error.value) == str(inline.value)
    assert str(error.value).startswith(f"{path}: line 2001: 'text' holds int, expected a string; 1 bad row so far")
    stream.close()


def test_a_worker_that_dies_is_reported(setting: Setting) -> None:
    endless = Setting(setting.config, setting.tokenizer, setting.sequence_length, epochs=None)
    stream = endless.open(workers=1)
    [process] = workers_of(stream)
    process.kill()
    with pytest.raises(RuntimeError, match=rf"process {process.pid}\) ended unexpectedly: signal 9"):
        drain(stream, 16)
    stream.close()


def test_workers_end_with_the_trainer_however_it_ends(setting: Setting) -> None:
    command = [sys.executable, "-c", SCRIPT, setting.config.sources[0].path, setting.tokenizer.path, "1", "wait"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as trainer:
        assert trainer.stdout is not None
        worker = int(trainer.stdout.readline())
        assert alive(worker)
        os.kill(trainer.pid, signal.SIGKILL)
    wait_until_dead(worker)


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.long), "1"])
def test_a_stream_that_nobody_closed_ends_without_noise(setting: Setting, workers: str) -> None:
    command = [sys.executable, "-c", SCRIPT, setting.config.sources[0].path, setting.tokenizer.path, workers, "go"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert result.stderr == ""
    for pid in result.stdout.split():
        wait_until_dead(int(pid))
