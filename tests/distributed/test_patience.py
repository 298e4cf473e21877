"""Ranks that wait for one that waits for a data server do not give up before it does."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from pretrain.config import parse_config
from pretrain.engine import make_engine, ranks
from pretrain.engine.base import patience
from pretrain.engine.ranks import Ranks
from pretrain.processes.errors import PeerError
from tests.conftest import TINY, merged
from tests.distributed.ranks import run_ranks

TIMEOUT = timedelta(seconds=1)


def long_work(fails: bool) -> tuple[str, int]:
    """What rank 0 does takes three times as long as a collective waits; returns the result and the beats."""
    rank = int(os.environ["RANK"])
    ranks.BEAT_SECONDS = 0.1
    dist.init_process_group("gloo", timeout=TIMEOUT)
    here = Ranks(rank, 2, dist.group.WORLD)
    beats, beat = 0, Ranks._beat

    def counted(self: Ranks, ended: int) -> bool:
        nonlocal beats
        beats += 1
        return beat(self, ended)

    Ranks._beat = counted  # type: ignore[method-assign]

    def work() -> str:
        time.sleep(3 * TIMEOUT.total_seconds())
        if fails:
            raise KeyError("missing")
        return f"of rank {rank}"

    try:
        found = here.on_rank_0(work, long=True)
    except (KeyError, PeerError) as error:
        found = type(error).__name__
    assert here.gather(rank) == [0, 1]  # in step
    dist.destroy_process_group()
    return found, beats


def test_long_work_of_rank_0_may_take_longer_than_a_collective_waits() -> None:
    (first, beats), (second, seen) = run_ranks(2, long_work, False)
    assert first == second == "of rank 0"
    assert 3 < beats == seen < 60
    assert [found for found, _ in run_ranks(2, long_work, True)] == ["KeyError", "PeerError"]


def test_a_single_process_does_long_work_itself() -> None:
    assert Ranks().on_rank_0(lambda: 3, long=True) == 3


def timeouts(changes: dict[str, Any]) -> list[float]:
    """Of all groups of this process once the model is built, in minutes."""
    config = parse_config(merged(TINY, changes))
    engine = make_engine(config)
    engine.build()
    found = [group._get_backend(torch.device("cpu")).options._timeout for group in distributed_c10d._world.pg_map]
    engine.close()
    return [timeout.total_seconds() / 60 for timeout in found]


@pytest.mark.parametrize("kind", ["plain", pytest.param("deepspeed", marks=pytest.mark.long)])
def test_every_group_waits_longer_than_a_rank_waits_for_a_server(kind: str) -> None:
    changes: dict[str, Any] = {"engine.kind": kind, "data.retry_minutes": 77}
    if kind == "deepspeed":
        changes["engine.zero_stage"] = 2
    for found in run_ranks(2, timeouts, changes):
        assert len(found) >= (1 if kind == "plain" else 2)
        assert all(minutes == pytest.approx(107) for minutes in found)


def test_patience_covers_the_waits_for_a_server() -> None:
    config = parse_config(merged(TINY, {"data.retry_minutes": 200}))
    assert patience(config) >= timedelta(minutes=220)
