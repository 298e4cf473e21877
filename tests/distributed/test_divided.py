"""Ranks with whole parameters divide the matrices: the same steps as one process makes, and less work for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.neurons.telemetry import load_arrays, measurements
from tests.distributed.divided import compare, empty, freed_late, joined, refused, wrapped
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import run, tensors
from tests.distributed.sharded import SHAPES

STACKED = {
    "matrix": {"experts": (3, 9, 5), "conv1d": (6, 20), "kernel": (12, 2, 3), "up": (17, 5)},
    "vector": {"gain": (5,)},
}
VIEWS = {"views": {"experts": "stack", "conv1d": "in_out", "kernel": "flat"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "aurora": {},
    "muon": {"direction": "muon"},
    "carried": {"row_balance": "carried"},
    "normuon": {"direction": "normuon"},
    "floor": {"uw_floor": 0.5, "direction": "normuon"},
    "blocks": {"row_blocks": {"qkv": (6, 4, 4), "up": (9, 8)}},
}


def same(found: list[dict[str, Any]]) -> None:
    """All ranks hold the same weights and state to the bit, and those of one process, which stacks other matrices."""
    for of_rank in found:
        assert of_rank["sums"] == found[0]["sums"]
        assert all(distance < 1e-6 for *_, distance in of_rank["differing"]), of_rank["differing"]
        assert of_rank["received"] == of_rank["others"] > 0
        assert of_rank["fallbacks"][0] == of_rank["fallbacks"][1]


@pytest.mark.parametrize(
    ("ranks", "variant"), [(2, "aurora"), (3, "carried"), (2, "normuon"), (3, "blocks"), (2, "floor"), (4, "muon")]
)
def test_divided_steps_are_those_of_one_process(ranks: int, variant: str) -> None:
    """All ranks together find each direction once."""
    options = {"polar": "svd", **VARIANTS[variant]}
    found = run_ranks(ranks, compare, options)
    matrices = len(SHAPES["matrix"]) + 3 * ("row_blocks" in options)
    same(found)
    assert max(of_rank["found"] for of_rank in found) < matrices
    assert sum(of_rank["found"] for of_rank in found) == matrices


def test_stacks_and_transposed_weights_are_divided_as_well() -> None:
    for carried in ({}, {"row_balance": "carried"}):
        found = run_ranks(2, _compare_stacked, carried)
        same(found)
        assert sum(of_rank["found"] for of_rank in found) == 6


def _compare_stacked(options: dict[str, Any]) -> dict[str, Any]:
    return compare({"polar": "svd", **VIEWS, **options}, shapes=STACKED)


@pytest.mark.parametrize("bucket", [1, 200])
def test_several_rounds_make_the_same_steps(bucket: int) -> None:
    same(run_ranks(2, _compare_in_buckets, bucket))


def _compare_in_buckets(bucket: int) -> dict[str, Any]:
    return compare({"polar": "svd"}, bucket=bucket)


def test_bf16_moves_half_as_much_and_keeps_the_ranks_equal() -> None:
    found = run_ranks(2, _compare_bf16)
    assert found[0]["sums"] == found[1]["sums"]
    for of_rank in found:
        assert of_rank["received"] == of_rank["others"]
        assert 0 < max(distance for *_, distance in of_rank["differing"]) < 5e-3


def _compare_bf16() -> dict[str, Any]:
    return compare({"polar": "svd"}, wire="bf16")


def test_a_nan_on_one_rank_makes_all_skip() -> None:
    found = run_ranks(3, _compare_with_nan)
    same(found)
    for of_rank in found:
        assert of_rank["taken"] == [True] * 3 + [False] + [True] * 4


def _compare_with_nan() -> dict[str, Any]:
    return compare({"polar": "svd"}, nan_on=1)


def test_empty_matrices_need_no_plan() -> None:
    assert run_ranks(2, empty) == [True, True]


def test_an_optimizer_of_a_distributed_model_divides_by_itself() -> None:
    for of_rank in run_ranks(2, wrapped):
        assert of_rank["kinds"] == {"divided": "DividedMatrices", "whole": "WholeMatrices", "bound": "DividedMatrices"}
        losses = of_rank["losses"]
        assert losses["divided"] == losses["bound"] == pytest.approx(losses["whole"], rel=1e-5)


def test_ranks_that_run_out_of_data_inside_join_hold_up_nobody() -> None:
    assert run_ranks(2, joined) == [3, 5]


def test_a_model_that_outlives_its_engine_is_freed() -> None:
    assert run_ranks(2, freed_late, 1 << 23, timeout_seconds=60) == [True, True]


@pytest.mark.parametrize(("fault", "told"), [("weights", "different weights"), ("options", "the same options")])
def test_ranks_that_are_not_replicas_are_refused(fault: str, told: str) -> None:
    for message in run_ranks(2, refused, fault):
        assert told in message


def arrays(root: Path) -> list[dict[str, torch.Tensor]]:
    """The measurements of a run, by step."""
    return [load_arrays(path) for _, path in measurements(root / "tiny" / "telemetry")]


def test_a_run_is_the_same_whether_its_ranks_divide_the_matrices(tmp_path: Path) -> None:
    """Weights, and what telemetry says of the directions, which each rank sees in part."""
    roots = {}
    for divide in (True, False):
        root = roots[divide] = tmp_path / str(divide)
        changes = {"optimizer.polar": "svd", "engine.divide_matrices": divide, "telemetry.every_steps": 2}
        changes |= {"train.micro_batch_sequences": 4}
        run_ranks(3, run, str(root), changes)
    first, second = tensors(roots[True]), tensors(roots[False])
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=1e-5, atol=1e-7)
    for line, other in zip(arrays(roots[True]), arrays(roots[False]), strict=True):
        assert line.keys() == other.keys()
        assert any(key.endswith("direction") for key in line)
        for key, values in line.items():
            torch.testing.assert_close(values, other[key], rtol=1e-4, atol=1e-6)
