"""Two ranks compute what one does: the distance is that of another order of summation, and faults exceed it."""

from __future__ import annotations

from pathlib import Path

from tests.conftest import SMALL_VOCABULARY
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import distance, metrics, newest, run, run_with_fault

STEPS = 10
CHANGES = SMALL_VOCABULARY | {"train.total_tokens": STEPS * 768, "schedule.warmup_tokens": 0}


def test_two_ranks_equal_one_up_to_the_order_of_summation(tmp_path: Path) -> None:
    root = {name: tmp_path / name for name in ("one", "reversed", "two", "lost", "rate")}
    run_ranks(1, run, str(root["one"]), CHANGES)
    run_ranks(1, run_with_fault, str(root["reversed"]), CHANGES, "reversed")
    run_ranks(2, run, str(root["two"]), CHANGES)
    noise = distance(root["reversed"], root["one"])
    assert 0 < noise < 1e-4
    assert distance(root["two"], root["one"]) <= 3 * noise
    batches = [metrics(root[name], "batch_sha256") for name in ("one", "two")]
    assert batches[0] == batches[1]
    assert newest(root["one"]).index["data_state"] == newest(root["two"]).index["data_state"]
    for fault in ("lost", "rate"):
        run_ranks(2, run_with_fault, str(root[fault]), CHANGES, fault)
        assert distance(root[fault], root["one"]) > 3 * noise, fault


def test_a_run_moves_from_one_rank_to_two_and_back(tmp_path: Path) -> None:
    one, moved = tmp_path / "one", tmp_path / "moved"
    run_ranks(1, run, str(one), CHANGES)
    run_ranks(1, run, str(moved), CHANGES, 3)
    run_ranks(2, run, str(moved), CHANGES, 7)
    run_ranks(1, run, str(moved), CHANGES)
    assert distance(moved, one) < 1e-4
    assert metrics(moved, "step", "batch_sha256", "lr") == metrics(one, "step", "batch_sha256", "lr")
