"""What two ranks exchange: collectives, their elements, bytes and dtypes, counted where torch.distributed is called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.counting.counters import BUCKET, Collective, collectives
from tests.counting.ranks import added, counted
from tests.counting.where import configured, flops_per_token, metrics, run_ranks, train

QUIET = {"data.validation_fraction": 0.0}
ZERO = QUIET | {"engine.kind": "deepspeed"}
PARAMETERS, EMBEDDING = 280_736, 262_144
GRADIENTS = 10_000  # everything that a run exchanges besides gradients, weights and momenta has fewer elements


def exchanged(root: Path, changes: dict[str, Any], steps: int | None = 1) -> list[Collective]:
    """The collectives of rank 0; what is started together has as many on each rank."""
    first, second = run_ranks(2, counted, str(root), changes, steps)
    assert [call.name for call in first] == [call.name for call in second]
    return first


def of(calls: list[Collective], *names: str, least: int = 0) -> list[Collective]:
    return [call for call in calls if call.name in names and call.elements >= least]


@pytest.mark.parametrize(("rows", "micro_batches"), [(3, 4), (12, 1)])
def test_gradients_are_reduced_once_a_step_however_many_micro_batches(
    rows: int, micro_batches: int, tmp_path: Path
) -> None:
    assert 24 // (2 * rows) == micro_batches
    calls = exchanged(tmp_path, QUIET | {"train.micro_batch_sequences": rows}, 3)
    buckets = of(calls, BUCKET)
    assert sum(call.elements for call in buckets) == 3 * PARAMETERS
    assert {call.dtype for call in buckets} == {torch.float32}


def test_a_smaller_reduce_bucket_makes_more_reductions_of_the_same_gradients(tmp_path: Path) -> None:
    reductions = {}
    for bucket in (50_000_000, 8_000):
        changes = ZERO | {"engine.zero_stage": 1, "engine.reduce_bucket_elements": bucket}
        calls = of(exchanged(tmp_path / str(bucket), changes), "all_reduce", "reduce", least=10)
        reductions[bucket] = sorted(call.elements for call in calls if call.dtype == torch.float32)
    assert sum(reductions[50_000_000]) == sum(reductions[8_000]) == PARAMETERS
    assert len(reductions[50_000_000]) <= 2  # one for each rank that keeps a share
    *small, first, second = reductions[8_000]
    assert first == second == EMBEDDING // 2  # a single tensor is divided only where it lies on two ranks
    assert len(small) >= 3
    assert max(small) <= 8_000


def test_a_smaller_gather_bucket_makes_more_gathers_of_fewer_weights(tmp_path: Path) -> None:
    """Stage 3 gathers ahead of the forward pass so many weights at a time, and one matrix more."""
    gathers = {}
    for bucket in (50_000_000, 4_000):
        changes = ZERO | {"engine.zero_stage": 3, "engine.gather_bucket_elements": bucket}
        calls = of(exchanged(tmp_path / str(bucket), changes), "all_gather_into_tensor")
        gathers[bucket] = [call.elements for call in calls if call.elements != EMBEDDING]
    assert max(gathers[50_000_000]) == PARAMETERS
    assert 2_048 < max(gathers[4_000]) <= 4_000 + 2_048
    assert len(gathers[4_000]) > len(gathers[50_000_000])


def test_gradients_are_summed_over_ranks_in_the_communication_dtype(tmp_path: Path) -> None:
    sums = {}
    for dtype in ("fp32", "bf16"):
        changes = ZERO | {"engine.zero_stage": 1, "train.precision": "bf16", "engine.communication_dtype": dtype}
        sums[dtype] = of(exchanged(tmp_path / dtype, changes), "all_reduce", least=GRADIENTS)
    assert {call.dtype for call in sums["fp32"]} == {torch.float32}
    assert {call.dtype for call in sums["bf16"]} == {torch.bfloat16}
    assert sum(call.bytes for call in sums["fp32"]) == 2 * sum(call.bytes for call in sums["bf16"]) > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_micro_batches_are_summed_in_the_accumulation_dtype(dtype: str, tmp_path: Path) -> None:
    """Two micro-batches a rank: each is added to the sum, whole, since stage 1 shares gradients out at the end."""
    changes = ZERO | {"engine.zero_stage": 1, "train.precision": "bf16", "engine.accumulation_dtype": dtype}
    for found in run_ranks(2, added, str(tmp_path), changes, EMBEDDING):
        assert found.count("torch.float32") == (2 if dtype == "fp32" else 0)
        assert found.count("torch.bfloat16") >= 1


def test_a_bf16_wire_moves_half_the_bytes_of_momenta_and_steps(tmp_path: Path) -> None:
    wire = {}
    for dtype in ("fp32", "bf16"):
        changes = ZERO | {"engine.zero_stage": 3, "engine.wire_dtype": dtype, "train.micro_batch_sequences": 12}
        calls = exchanged(tmp_path / dtype, changes, 2)
        # The first step is checked, in fp32; a step begins with the one reduction of its one micro-batch.
        _, second = [index for index, call in enumerate(calls) if call.name == "reduce_scatter_tensor"]
        wire[dtype] = of(calls[second:], "all_to_all_single")
    assert [call.elements for call in wire["fp32"]] == [call.elements for call in wire["bf16"]]
    assert {call.dtype for call in wire["fp32"]} == {torch.float32}
    assert {call.dtype for call in wire["bf16"]} == {torch.bfloat16}
    assert sum(call.bytes for call in wire["fp32"]) == 2 * sum(call.bytes for call in wire["bf16"]) > 0


def test_adamw_exchanges_no_momenta(tmp_path: Path) -> None:
    changes = ZERO | {"engine.zero_stage": 3, "optimizer": {"name": "adamw", "adamw": {"lr": 1e-3}}}
    assert not of(exchanged(tmp_path, changes), "all_to_all_single")


@pytest.mark.long
def test_only_measured_steps_exchange_more(tmp_path: Path) -> None:
    """Each measurement costs as much as any other, and the steps between them nothing."""
    short = {"train.total_tokens": 6 * 768, "schedule.warmup_tokens": 0, "engine.kind": "deepspeed"}
    short |= {"engine.zero_stage": 3, "validation.max_tokens": 6 * 32}
    measure = {"telemetry.reference_step": 6, "telemetry.activation_sequences": 6}
    moved = {}
    for measured, every in {0: None, 1: 6, 2: 3, 6: 1}.items():
        changes = short | ({"telemetry.every_steps": every} | measure if every else {})
        calls = exchanged(tmp_path / str(measured), changes, None)
        moved[measured] = len(calls), sum(call.elements for call in calls)
    calls, elements = (moved[1][i] - moved[0][i] for i in (0, 1))
    assert calls > 0
    assert elements > 0
    for measured in (2, 6):
        assert moved[measured] == (moved[0][0] + measured * calls, moved[0][1] + measured * elements)


def test_the_utilisation_is_of_the_peak_of_all_ranks(tmp_path: Path) -> None:
    """Fault of a famous trainer: utilisation from the wrong peak."""
    changes = QUIET | {"train.peak_tflops": 0.001}
    config = configured(str(tmp_path), changes)
    run_ranks(2, counted, str(tmp_path), changes, 2)
    for record in metrics(config):
        per_rank = record["tokens_per_second"] / 2
        assert record["mfu"] == pytest.approx(per_rank * flops_per_token(config.model, 32) / 1e9, rel=1e-3)


def test_one_rank_exchanges_nothing(tmp_path: Path) -> None:
    with collectives() as found:
        train(configured(str(tmp_path), {"train.total_tokens": 768, "schedule.warmup_tokens": 0}))
    assert found.calls == []
