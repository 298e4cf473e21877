"""A run whose data fails in the middle saves what it has trained, and continues when the data is back."""

from __future__ import annotations

import os
import signal
import sys
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.store import CheckpointReader, list_checkpoints
from pretrain.config import Config, parse_config
from pretrain.data import DataError, TokenStream, compression, reading
from pretrain.data.sources import http, retries
from pretrain.data.sources.retries import patience, set_patience
from pretrain.launch import train
from pretrain.processes.exit_codes import BAD_INPUT, STOPPED, UNAVAILABLE
from pretrain.processes.failures import report
from pretrain.run.folder import RunFolder
from pretrain.training.trainer import Trainer
from pretrain.training.validation import Validator
from tests.conftest import TINY, merged
from tests.data.corpus import make_texts, write_jsonl
from tests.data.hub_server import Hub, hub_server
from tests.distributed.ranks import run_ranks

FAILS_AT = 3


def attempt(
    config: dict[str, Any], endpoint: str, command: str | None, stop_at: int, signalled: bool = False
) -> tuple[int, str]:
    """Train; after step 3, rank 0 sends the server a command. Returns the exit code and the error.

    Args:
        config: of the run.
        endpoint: of the server.
        command: for the server.
        stop_at: the last step.
        signalled: a rank whose wait for the server would take hours gets a SIGTERM when it begins.

    """
    os.environ["HF_ENDPOINT"] = endpoint
    # Of a small file, much is still to be read after three steps.
    http._FIRST_PART = http._LARGEST_PART = http.BUFFER_BYTES = 2048
    compression._BUFFER_BYTES = 2048
    reading.REFILL_BYTES = 1 << 11
    set_patience(type(patience())(first_wait_seconds=0.01, longest_wait_seconds=0.05, silence_seconds=2))
    reported = Trainer.report

    def and_command(self: Trainer, record: dict[str, Any], context: Any) -> None:
        reported(self, record, context)
        if command and self.state.step == FAILS_AT and self.engine.rank == 0:
            urllib.request.urlopen(f"{endpoint}/control/{command}").read()

    Trainer.report = and_command  # type: ignore[method-assign]
    sleep = retries._sleep
    if signalled:
        set_patience(replace(patience(), first_wait_seconds=1e5, longest_wait_seconds=1e5))

        def and_signal(seconds: float) -> None:
            if not retries.stop_requested():  # a second signal ends the process
                os.kill(os.getpid(), signal.SIGTERM)
            sleep(seconds)

        retries._sleep = and_signal
    try:
        return train(parse_config(config), stop_at=stop_at), ""
    except Exception as error:
        return report(error), f"{type(error).__name__}: {error}"
    finally:
        Trainer.report, retries._sleep = reported, sleep  # type: ignore[method-assign]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, bytes]:
    return {"d/a.jsonl": write_jsonl(tmp_path / "a.jsonl", make_texts(9, 900, longest=60)).read_bytes()}


def make(root: Path, hub: Hub, name: str, **data: Any) -> dict[str, Any]:
    return merged(
        TINY,
        {
            "run.root": str(root / "runs"),
            "run.name": name,
            "data.sources": [{"path": hub.path("d/*.jsonl"), "split_units": 2}],
            "data.lanes": 2,
            "data.retry_minutes": 0.005,
            "train.total_tokens": 768 * 12,
            **{f"data.{key}": value for key, value in data.items()},
        },
    )


def saved(config: Config) -> list[int]:
    return [CheckpointReader(path).index["step"] for path in list_checkpoints(config.run_folder / "checkpoints")]


def record(config: Config) -> list[tuple[int, str]]:
    metrics = RunFolder(config.run_folder).metrics.read()
    return [(line["step"], line["batch_sha256"]) for line in metrics]


@pytest.mark.parametrize(
    ("ranks", "command", "code", "said"),
    [
        (1, "dead", UNAVAILABLE, "unavailable"),
        pytest.param(2, "dead", UNAVAILABLE, "unavailable", marks=pytest.mark.long),
        pytest.param(1, "rewrite", BAD_INPUT, "has changed", marks=pytest.mark.long),
        pytest.param(2, "rewrite", BAD_INPUT, "has changed", marks=pytest.mark.long),
    ],
)
def test_a_run_whose_data_fails_saves_its_last_step_and_continues_later(
    ranks: int, command: str, code: int, said: str, files: dict[str, bytes], tmp_path: Path
) -> None:
    """On every rank: that which reads the data and those which do not."""
    with hub_server(files, page=1) as hub:
        config = make(tmp_path, hub, "broken")
        ended = run_ranks(ranks, attempt, config, hub.endpoint, command, 10)
        assert {found for found, _ in ended} == {code}
        assert sum(said in text and text.startswith("Data") for _, text in ended) >= 1
        broken = parse_config(config)
        steps = record(broken)
        last = steps[-1][0]
        assert FAILS_AT <= last < 10
        assert saved(broken) == [last]

        hub.dead = False
        commit = hub.refs["main"]
        hub.commits[commit] = dict(files)
        assert run_ranks(ranks, attempt, config, hub.endpoint, None, 10)[0][0] == 75
        whole = make(tmp_path, hub, "whole")
        assert run_ranks(1, attempt, whole, hub.endpoint, None, 10)[0][0] == 75
        assert record(broken) == record(parse_config(whole))
        assert [step for step, _ in record(broken)] == list(range(1, 11))


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_while_the_server_is_dead_saves_and_stops(ranks: int, files: dict[str, bytes], tmp_path: Path) -> None:
    """The rank that waits, and the one that waits for it."""
    with hub_server(files, page=1) as hub:
        config = make(tmp_path, hub, "signalled", retry_minutes=10_000)
        assert {code for code, _ in run_ranks(ranks, attempt, config, hub.endpoint, "dead", 10, True)} == {STOPPED}
        stopped = parse_config(config)
        steps = record(stopped)
        assert FAILS_AT <= len(steps) < 10
        assert saved(stopped) == [len(steps)]

        hub.dead = False
        assert run_ranks(1, attempt, config, hub.endpoint, None, 10)[0][0] == STOPPED
        whole = make(tmp_path, hub, "whole")
        run_ranks(1, attempt, whole, hub.endpoint, None, 10)
        assert record(stopped) == record(parse_config(whole))


READ_LITTLE_AHEAD = """
from pretrain.data import reading, workers
reading.REFILL_BYTES, workers._BLOCKS_AHEAD = 1 << 11, 2
"""


def outage(config: dict[str, Any], endpoint: str, stop_at: int, scripts: str) -> int:
    """Train with the waits of a real run; after step 3, rank 0 asks the server to be dead for 30 seconds."""
    os.environ["HF_ENDPOINT"] = endpoint
    sys.path.insert(0, scripts)  # which workers inherit
    exec(READ_LITTLE_AHEAD)
    reported = Trainer.report

    def and_command(self: Trainer, record: dict[str, Any], context: Any) -> None:
        reported(self, record, context)
        if self.state.step == FAILS_AT and self.engine.rank == 0:
            urllib.request.urlopen(f"{endpoint}/control/dead?seconds=30").read()

    Trainer.report = and_command  # type: ignore[method-assign]
    try:
        return train(parse_config(config), stop_at=stop_at)
    finally:
        Trainer.report = reported  # type: ignore[method-assign]


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "workers"), [(2, 1), (2, 0), (3, 2)])
def test_a_server_that_is_dead_for_30_seconds_is_waited_for(ranks: int, workers: int, tmp_path: Path) -> None:
    texts = make_texts(8, 4000, longest=60)
    files = {
        f"d/{index:02}.jsonl": write_jsonl(tmp_path / "x.jsonl", texts[40 * index : 40 * index + 40]).read_bytes()
        for index in range(100)
    }
    (tmp_path / "sitecustomize.py").write_text(READ_LITTLE_AHEAD)
    steps, scripts = 110, str(tmp_path)
    with hub_server(files, page=7) as hub:
        more = {"lanes": 6, "sources": [{"path": hub.path("d/*.jsonl")}], "retry_minutes": 5}
        longer = {"train.total_tokens": 768 * (steps + 1), "train.micro_batch_sequences": 4}  # for 2 and 3 ranks
        config = merged(make(tmp_path, hub, "outage", **more), longer)
        codes = run_ranks(ranks, outage, merged(config, {"data.workers": workers}), hub.endpoint, steps, scripts)
        assert codes == [STOPPED] * ranks
        assert not hub.dead
        assert hub.refused >= ranks
        whole = merged(make(tmp_path, hub, "whole", **more), longer)
        assert run_ranks(1, attempt, whole, hub.endpoint, None, steps)[0][0] == STOPPED
        assert record(parse_config(config)) == record(parse_config(whole))


def test_validation_data_that_fails_is_saved_before_as_well(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Validator, context: Any) -> dict[str, Any]:
        raise DataError("a.jsonl: gone")

    monkeypatch.setattr(Validator, "run", run)
    config = tiny_config({"train.total_tokens": 768 * 4, "validation.every_steps": 2, "schedule.warmup_tokens": 0})
    with pytest.raises(DataError, match="gone"):
        train(config)
    assert saved(config) == [2]
    assert [step for step, _ in record(config)] == [1, 2]


def test_nothing_is_saved_twice_or_before_the_first_step(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    real = TokenStream.next_batch

    def next_batch(self: TokenStream, count: int) -> Any:
        nonlocal calls
        if calls == fails_at:
            raise DataError("a.jsonl: gone")
        calls += 1
        return real(self, count)

    monkeypatch.setattr(TokenStream, "next_batch", next_batch)
    for fails_at, found in ((0, []), (2, [2])):
        config = tiny_config({"run.name": f"at{fails_at}", "checkpoint.save_every_steps": 2})
        calls = 0
        with pytest.raises(DataError, match="gone"):
            train(config)
        assert saved(config) == found
