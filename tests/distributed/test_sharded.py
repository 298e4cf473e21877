"""The sharded optimizer is the dense one: same weights and states, and exactly the planned bytes."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.sharded import compare, worst

STEPS, FP32, BF16 = 20, 4, 2
SVD = {"polar": "svd", "weight_decay": 0.1}
DIRECTIONS: dict[str, dict[str, Any]] = {
    "aurora": {"row_balance": "polar"},
    "aurora_all_cautious": {"row_balance": "polar", "scope": "all", "cautious": True, "nesterov": False},
    "muon": {"direction": "muon", "lr_scale": "rms"},
    "normuon": {"direction": "normuon"},
    "u_normuon_running": {"direction": "u_normuon", "running_norms": True},
    "riemannian": {"direction": "riemannian_aurora"},
    "contra_floor": {"direction": "muon", "contra": 0.2, "uw_floor": 0.35},
    "carried": {"row_balance": "carried", "row_blocks": {"qkv": (8, 3, 3), "up": (12, 5)}},
    "polished": {"row_balance": "polished"},
    "blocks": {"direction": "normuon", "row_blocks": {"qkv": (8, 3, 3), "up": (12, 5)}},
}
SOME = [(1, 3, "blocks"), (3, 2, "aurora"), (3, 4, "contra_floor"), (1, 4, "aurora_all_cautious"), (3, 3, "carried")]
GRID = [(stage, ranks, name) for stage in (1, 3) for ranks in (1, 2, 3, 4) for name in DIRECTIONS]


def check(stage: int, ranks: int, name: str) -> None:
    calls = "group" if (stage + ranks) % 2 else "one"
    results = run_ranks(ranks, _compare, stage, {**SVD, **DIRECTIONS[name]}, {"calls": calls, "bucket": 200})
    assert worst(results) < 1e-6
    assert [result["bytes"] for result in results] == [STEPS * FP32 * result["planned"] for result in results]
    # There and back once a round, and nothing travels where there is nobody else.
    calls = 2 * STEPS * results[0]["rounds"] if ranks > 1 else 0
    assert {result["calls"] for result in results} == {calls}
    assert {result["fallbacks"] for result in results} == {results[0]["dense_fallbacks"]}


def _compare(stage: int, options: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    return compare(stage, options, **more)


@pytest.mark.parametrize(("stage", "ranks", "name"), SOME)
def test_sharded_equals_dense(stage: int, ranks: int, name: str) -> None:
    check(stage, ranks, name)


@pytest.mark.long
@pytest.mark.parametrize(("stage", "ranks", "name"), [case for case in GRID if case not in SOME])
def test_sharded_equals_dense_everywhere(stage: int, ranks: int, name: str) -> None:
    check(stage, ranks, name)


@pytest.mark.parametrize("fault", ["dropped", "stale", "rate"])
def test_a_planted_fault_breaks_the_bound(fault: str) -> None:
    results = run_ranks(2, _compare, 1, {**SVD, **DIRECTIONS["aurora"]}, {"fault": fault})
    assert worst(results) > 1e-4


def test_more_ranks_than_matrices_and_a_shard_that_is_all_padding() -> None:
    shapes = {"matrix": {"up": (3, 2)}, "vector": {"gain": (1,)}}
    for stage in (1, 3):
        results = run_ranks(4, _compare, stage, {**SVD, **DIRECTIONS["aurora"]}, {"shapes": shapes, "steps": 5})
        assert worst(results) < 1e-6


def test_a_bf16_wire_moves_half_the_bytes_and_rounds_to_bf16() -> None:
    results = run_ranks(3, _compare, 3, {**SVD, **DIRECTIONS["aurora"]}, {"wire": "bf16"})
    assert [result["bytes"] for result in results] == [STEPS * BF16 * result["planned"] for result in results]
    assert 1e-6 < worst(results) < 2e-2


TEAMS: dict[str, dict[str, Any]] = {
    "aurora": {"row_balance": "leverage", "scope": "all"},
    "aurora_gram": {"row_balance": "gram", "iterations": 3, "tolerance": 0.01},
    "polished": {"row_balance": "polished", "row_blocks": {"qkv": (8, 3, 3), "down": (2, 3)}},
    "muon_floor": {"direction": "muon", "uw_floor": 0.35},
    "normuon": {"direction": "normuon", "row_blocks": {"qkv": (8, 3, 3), "down": (2, 3)}},
    "u_normuon": {"direction": "u_normuon"},
    "u_normuon_running": {"direction": "u_normuon", "running_norms": True},
}


@pytest.mark.parametrize(("name", "ranks", "team"), [(name, 3, 2 + i % 2) for i, name in enumerate(TEAMS)])
def test_a_matrix_shared_by_a_team_gets_the_same_direction(name: str, ranks: int, team: int) -> None:
    options = {"polar": "gram", "polar_dtype": "fp32", **TEAMS[name]}
    results = run_ranks(ranks, _compare, 1, options, {"team": team, "steps": 5})
    assert max(map(len, results[0]["teams"])) == team
    # log D is what is left of log(1 - l), for which fp32 is coarser.
    assert worst(results) < (1e-3 if name == "polished" else 1e-4)
