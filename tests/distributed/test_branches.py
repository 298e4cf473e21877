"""A branch over several ranks equals the run that had its settings from the start, under every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.export.run import export_checkpoint
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import metrics, newest, run, tensors

BATCH = 192
SHORT: dict[str, Any] = {
    "train.total_tokens": 5 * BATCH,
    "train.global_batch_tokens": BATCH,  # 6 sequences
    "train.micro_batch_sequences": 3,
    "data.validation_fraction": 0.0,
    "optimizer.polar": "gram",
}
STABLE = {"schedule": {"kind": "constant", "warmup_tokens": BATCH}}
DECAY = {"schedule": {"kind": "wsd", "warmup_tokens": BATCH, "decay_start_tokens": 3 * BATCH}}
EXACT = ("step", "tokens", "loss", "lr", "grad_norm", "batch_sha256")
STILL = {"optimizer.lr": 0.0, "optimizer.adamw": {"lr": 0.0}}


def zero(stage: int, precision: str = "fp32") -> dict[str, Any]:
    wire = {"engine.wire_dtype": "fp32"} if stage else {}
    return {"engine.kind": "deepspeed", "engine.zero_stage": stage, "train.precision": precision, **wire}


def init(parent: Path, take: str) -> dict[str, Any]:
    return {"init": {"from": str(parent), "take": take}}


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(zero(1), id="zero 1"),
        pytest.param({}, id="plain", marks=pytest.mark.long),
        pytest.param(zero(2), id="zero 2", marks=pytest.mark.long),
        pytest.param(zero(3), id="zero 3", marks=pytest.mark.long),
        pytest.param(zero(1, "bf16"), id="zero 1, bf16", marks=pytest.mark.long),
        pytest.param(zero(3, "bf16"), id="zero 3, bf16", marks=pytest.mark.long),
    ],
)
def test_a_branch_on_two_ranks_equals_the_whole_run(engine: dict[str, Any], tmp_path: Path) -> None:
    parent, whole, branch = (tmp_path / name for name in ("parent", "whole", "branch"))
    common = SHORT | engine
    assert set(run_ranks(2, run, str(parent), common | STABLE, 2)) == {75}
    assert set(run_ranks(2, run, str(whole), common | DECAY)) == {0}
    assert set(run_ranks(2, run, str(branch), common | DECAY | init(parent / "tiny", "all"))) == {0}
    assert metrics(branch, *EXACT) == metrics(whole, *EXACT)[2:]
    expected, found = tensors(whole), tensors(branch)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.long
@pytest.mark.parametrize("take", ["weights", "weights+optimizer"])
@pytest.mark.parametrize("engine", [zero(0), zero(1), zero(3), zero(1, "bf16"), zero(3, "bf16"), {}])
def test_weights_arrive_in_fp32_on_any_engine(engine: dict[str, Any], take: str, tmp_path: Path) -> None:
    """At rate zero, from a plain run and its export."""
    parent = tmp_path / "parent"
    assert run_ranks(1, run, str(parent), SHORT | STABLE, 2) == [75]
    export_checkpoint(parent / "tiny", tmp_path / "export")
    expected = newest(parent).weights()
    for source in (parent / "tiny", tmp_path / "export")[: 2 if take == "weights" else 1]:
        child = tmp_path / f"of-{source.name}"
        changes = SHORT | STABLE | STILL | engine | init(source, take)
        assert set(run_ranks(2, run, str(child), changes, 1)) == {75}
        found = newest(child).weights()
        assert all(torch.equal(found[name], values) for name, values in expected.items())
