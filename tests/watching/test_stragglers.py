"""How fast each rank computes, and which one is slower than the others."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.launch import watch as launch_watch
from pretrain.watching.forward_clock import ForwardClock
from pretrain.watching.heartbeat import Heartbeat
from pretrain.watching.stragglers import stragglers
from tests.counting.ranks import counted
from tests.counting.where import run_ranks
from tests.watching.beats import beat


def beats(*seconds: float | None) -> dict[int, Heartbeat]:
    return {rank: beat(rank, forward_seconds=found) for rank, found in enumerate(seconds)}


def test_ranks_that_are_slower_than_the_median_are_named() -> None:
    assert stragglers(beats(1.0, 1.1, 2.0, 0.9), 1.5) == {
        2: "rank 2 on node2 (process 1002) is slow: its forward passes take 2 s a step, 2.0 times as long as those of "
        "the median rank (1 s)"
    }
    assert list(stragglers(beats(1.0, 1.6), 1.5)) == [1]
    assert list(stragglers(beats(1.0, 1.4), 1.5)) == []
    assert list(stragglers(beats(2.0, 2.0, 1.0, 1.0, 2.0), 1.5)) == []  # the fast ones are the exception
    assert list(stragglers(beats(5.0), 1.5)) == list(stragglers(beats(5.0, None), 1.5)) == []


def test_only_the_forward_passes_count() -> None:
    clock = ForwardClock(torch.device("cpu"))
    now = 0.0
    for step in range(8):
        seconds = [("data", 50.0), ("forward", 1.0 + step), ("backward", 20.0), ("forward", 2.0), ("backward", 30.0)]
        for phase, passes in [*seconds, ("records", 7.0)]:
            clock.enter(phase, now)
            now += passes
        assert clock.seconds() is None or step >= 5
    clock.enter("data", now)
    assert clock.seconds() == pytest.approx(6.5)  # the median of 3, 4, ... 10


def test_a_slow_rank_is_reported_once_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 of this process stands for all: the heartbeats of the others lie in the folder."""
    said: list[str] = []
    monkeypatch.setattr(launch_watch, "STRAGGLER_SECONDS", 0.01)
    monkeypatch.setattr(launch_watch, "read_heartbeats", lambda *_: beats(1.0, 1.0, 9.0))

    class Display:
        say = staticmethod(said.append)

    class Stub:
        display = Display
        folder = type("Folder", (), {"path": tmp_path})
        alerts = type("Alerts", (), {"send": staticmethod(lambda *_, **__: None)})
        progress = type("Progress", (), {"now": type("Now", (), {"step": 3})})

    stub: Any = Stub
    with launch_watch._comparing(stub, stub, "one", 1.5):
        for _ in range(200):
            if said:
                break
            time.sleep(0.01)
    assert len(said) == 1
    assert said[0].startswith("warning: rank 2 on node2")


@pytest.mark.long
def test_heartbeats_add_no_collective(tmp_path: Path) -> None:
    found = []
    for hang in (None, 300.0):
        changes = {"data.validation_fraction": 0.0, "watch.hang_seconds": hang}
        changes |= {"watch.straggler_factor": 1.5 if hang else None}
        found.append(run_ranks(2, counted, str(tmp_path / str(hang)), changes, 3))
    names = [[[call.name for call in calls] for calls in ranks] for ranks in found]
    assert names[0] == names[1]
    assert names[0][0]
