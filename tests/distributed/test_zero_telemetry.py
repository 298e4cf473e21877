"""Neuron telemetry under ZeRO: the measurements of a dense run, from gradients that no rank has whole."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from optimizers import Aurora, sharded
from pretrain.checkpoint.store import CheckpointReader, list_checkpoints
from pretrain.neurons.telemetry import load_arrays, measurements
from pretrain.run.json_lines import JsonLines
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import metrics, newest, run, tensors
from tests.distributed.test_deepspeed import DENSE, zero

STEPS = 6
SHORT: dict[str, Any] = {"train.total_tokens": STEPS * 384}
ON: dict[str, Any] = SHORT | {
    "telemetry.every_steps": 3,
    "telemetry.reference_step": 3,
    "telemetry.activation_sequences": 6,
    "checkpoint.save_every_steps": 2,
    "checkpoint.keep_last": 2,
}
ADAMW: dict[str, Any] = {"optimizer": {"name": "adamw", "adamw": {"lr": 3e-3}}}
GRAM: dict[str, Any] = {"optimizer.polar": "gram", "optimizer.polar_dtype": "fp32"}


def measured(root: Path) -> dict[int, dict[str, Tensor]]:
    """The arrays of a run by step."""
    return {step: load_arrays(path) for step, path in measurements(root / "tiny/telemetry")}


def records(root: Path) -> list[dict[str, Any]]:
    """The telemetry of the steps that were measured, timings aside."""
    lines = JsonLines(root / "tiny/metrics.jsonl").read()
    kept = [{k: v for k, v in line.items() if k.startswith("telemetry/")} for line in lines]
    return [{k: v for k, v in line.items() if k != "telemetry/seconds"} for line in kept if line]


def check_equal(found: Path, wanted: Path) -> None:
    """Every array of every measurement, and every number in the metrics."""
    mine, theirs = measured(found), measured(wanted)
    assert list(mine) == list(theirs) == [3, 6]
    for step, arrays in theirs.items():
        assert mine[step].keys() == arrays.keys()
        assert {key.rpartition(".")[2] for key in arrays} == {"leverage", "direction", "activation"}
        for key, values in arrays.items():
            assert torch.allclose(mine[step][key], values, rtol=1e-4, atol=0), (step, key)
    for one, other in zip(records(found), records(wanted), strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert one[key] == (None if value is None else pytest.approx(value, rel=1e-4, abs=1e-6)), key


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("dense")
    run_ranks(1, run, str(root), DENSE | ON)
    return root


@pytest.fixture(scope="module")
def chunked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ZeRO 3 on three ranks, which divide no matrix."""
    root = tmp_path_factory.mktemp("chunked")
    run_ranks(3, run, str(root), zero(3) | ON)
    return root


def test_stage_3_measures_what_a_dense_run_does(dense: Path, chunked: Path) -> None:
    check_equal(chunked, dense)


def test_stage_1_measures_the_same_and_trains_bit_identically_without(dense: Path, tmp_path: Path) -> None:
    on, off = tmp_path / "on", tmp_path / "off"
    run_ranks(2, run, str(on), zero(1) | ON)
    run_ranks(2, run, str(off), zero(1) | SHORT)
    check_equal(on, dense)
    trained, alone = tensors(on), tensors(off)
    assert {key for key in trained if key[1] != "telemetry_average"} == alone.keys()
    assert all(torch.equal(trained[key], value) for key, value in alone.items())
    keys = ("step", "loss", "grad_norm", "batch_sha256")
    assert metrics(on, *keys) == metrics(off, *keys)


@pytest.mark.long
def test_directions_of_adamw_come_from_its_shards(tmp_path: Path) -> None:
    run_ranks(1, run, str(tmp_path / "dense"), DENSE | ON | ADAMW)
    changes = zero(2) | ON | ADAMW
    del changes["engine.wire_dtype"]  # no matrix is sent
    run_ranks(2, run, str(tmp_path / "zero"), changes)
    check_equal(tmp_path / "zero", tmp_path / "dense")


@pytest.mark.long
def test_directions_that_a_team_computes_are_summed_over_it(tmp_path: Path) -> None:
    """Rows of gate and up and columns of down go to both members: each knows a part of every neuron of down."""
    run_ranks(1, run, str(tmp_path / "dense"), DENSE | ON | GRAM)
    assert min(run_ranks(2, run_with_teams, str(tmp_path / "zero"), zero(1) | ON | GRAM)) >= 6
    check_equal(tmp_path / "zero", tmp_path / "dense")


def run_with_teams(root: str, changes: dict[str, Any]) -> int:
    """A run in which both ranks share every MLP matrix; returns how many they shared."""
    plan_group, shared = sharded.plan_group, [0]

    def together(*arguments: Any, **options: Any) -> sharded.Plan:
        plan = plan_group(*arguments, **options)
        teams = [(0, 1) if "mlp" in unit.name else alone for unit, alone in zip(plan.units, plan.teams, strict=True)]
        shared[0] = teams.count((0, 1))
        return dataclasses.replace(plan, teams=tuple(teams))

    with mock.patch.object(sharded, "plan_group", together):
        run(root, changes)
    return shared[0]


def test_averages_cross_engines_and_stages(dense: Path, tmp_path: Path) -> None:
    run_ranks(1, run, str(tmp_path), DENSE | ON, 2)
    run_ranks(2, run, str(tmp_path), zero(3) | ON, 4)
    run_ranks(1, run, str(tmp_path), DENSE | ON)
    check_equal(tmp_path, dense)


def test_a_resume_on_the_same_ranks_changes_no_bit(chunked: Path, tmp_path: Path) -> None:
    shutil.copytree(chunked, tmp_path, dirs_exist_ok=True)
    newest(tmp_path).folder.joinpath("index.json").unlink()  # step 6 is lost: the run resumes from step 4
    assert newest(tmp_path).index["step"] == 4
    run_ranks(3, run, str(tmp_path), zero(3) | ON)
    whole, parts = measured(chunked), measured(tmp_path)
    assert all(torch.equal(parts[step][key], values) for step in whole for key, values in whole[step].items())
    assert records(tmp_path) == records(chunked)
    first, second = tensors(chunked), tensors(tmp_path)
    assert sum(key[1] == "telemetry_average" for key in first) == 6
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def test_a_void_step_leaves_the_averages_and_starves_nobody(tmp_path: Path) -> None:
    run_ranks(2, run_with_overflow, str(tmp_path), zero(1) | ON, 3)
    (record,) = records(tmp_path)
    assert record["telemetry/starved"] is None
    assert record["telemetry/leverage_dead"] is not None
    before, after = map(CheckpointReader, list_checkpoints(tmp_path / "tiny/checkpoints"))
    assert (before.index["step"], after.index["step"]) == (2, 3)
    watched = [name for name, slots in before.index["parameters"].items() if "telemetry_average" in slots]
    assert len(watched) == 6
    for name in watched:
        kept = before.read(name, "telemetry_average")
        assert bool(kept.any())
        assert torch.equal(after.read(name, "telemetry_average"), kept)


def run_with_overflow(root: str, changes: dict[str, Any], at: int) -> None:
    """A run in which the gradients of one step, counted from 1, are not finite on one rank."""
    from pretrain.engine.deepspeed import DeepSpeedEngine

    backward, passes = DeepSpeedEngine.backward, [0]

    def broken(self: DeepSpeedEngine, loss: Tensor) -> None:
        passes[0] += 1
        is_bad = os.environ["RANK"] == "1" and (passes[0] - 1) // 6 + 1 == at  # 6 micro-batches a step and rank
        backward(self, loss * torch.inf if is_bad else loss)

    with mock.patch.object(DeepSpeedEngine, "backward", broken):
        run(root, changes, at)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_measures_what_a_dense_run_does(dense: Path, tmp_path: Path, stage: int, ranks: int) -> None:
    run_ranks(ranks, run, str(tmp_path), zero(stage) | ON)
    check_equal(tmp_path, dense)


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", ["muon", "normuon", "u_normuon"])
def test_other_directions_are_shown_too(tmp_path: Path, name: str, stage: int) -> None:
    changes = ON | {"optimizer.name": name}
    run_ranks(1, run, str(tmp_path / "dense"), DENSE | changes)
    run_ranks(3, run, str(tmp_path / "zero"), zero(stage) | changes)
    check_equal(tmp_path / "zero", tmp_path / "dense")


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_weights_are_measured_by_their_fp32_masters(tmp_path: Path, stage: int) -> None:
    """The averages are those of the gradients that the optimizer steps with."""
    changes = zero(stage) | ON | {"train.precision": "bf16"}
    if stage == 0:
        changes |= {"engine.accumulation_dtype": "bf16"}
    assert run_ranks(2, averages_beside, str(tmp_path), changes) == [True, True]
    arrays = measured(tmp_path)[6]
    assert {key.rpartition(".")[2] for key in arrays} == {"leverage", "direction", "activation"}


def averages_beside(root: str, changes: dict[str, Any]) -> bool:
    """A run in which another average is kept of each whole shard; returns whether the watched ones are its parts."""
    from pretrain.neurons.watched import MOMENTUM, WatchedMatrices

    kept: dict[int, Tensor] = {}
    seen: list[WatchedMatrices] = []
    step, move = Aurora.step, WatchedMatrices.move_averages

    def beside(self: Aurora, closure: Any = None) -> None:
        for p in [] if self._paused else [p for group in self.param_groups for p in group["params"]]:
            assert p.grad.dtype == p.dtype == torch.float32
            kept[id(p)] = torch.lerp(kept.get(id(p), torch.zeros_like(p)), p.grad, 1 - MOMENTUM)
        step(self)

    def note(self: WatchedMatrices, shard: Tensor, finite: Tensor) -> None:
        seen[:] = [self]
        move(self, shard, finite)

    with mock.patch.object(Aurora, "step", beside), mock.patch.object(WatchedMatrices, "move_averages", note):
        run(root, changes)
    (matrices,) = seen
    shards = matrices._held.shards
    if not matrices.here:
        return matrices._pieces == []
    own = [piece.of(kept[id(shards[piece.place.shard])]) for piece in matrices._pieces]
    return bool(own) and all(torch.equal(a, piece.average) for a, piece in zip(own, matrices._pieces, strict=True))
