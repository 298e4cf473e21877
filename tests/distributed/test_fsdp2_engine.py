"""Runs whose engine shards with fully_shard: equal to a dense run up to the order of summation, and resumed to the bit.

Checkpoints of and for other engines: test_hand_overs. Bytes: test_traffic. Bad numbers on one rank: test_guards.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from pretrain.config import ConfigError, parse_config
from pretrain.engine.fsdp2 import Fsdp2Engine
from pretrain.launch import train
from pretrain.planning.cluster import Cluster, plan_run
from pretrain.planning.devices import DEVICES
from pretrain.training.trainer import Trainer
from tests.conftest import SPEEDRUN, TINY, merged
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import distance, metrics, run, run_with_fault, tensors
from tests.distributed.test_deepspeed import DENSE, STEPS, zero
from tests.distributed.test_zero_telemetry import ON, check_equal

FSDP2: dict[str, Any] = DENSE | {"engine.kind": "fsdp2", "engine.wire_dtype": "fp32"}
PAIRS = {"engine.shard_ranks": 2}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A dense run, and its distance to one that sums in another order."""
    one, other = tmp_path_factory.mktemp("dense"), tmp_path_factory.mktemp("reversed")
    run_ranks(1, run, str(one), DENSE)
    run_ranks(1, run_with_fault, str(other), DENSE, "reversed")
    return one, distance(other, one)


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (3, {}),
        (4, PAIRS),
        pytest.param(1, {}, marks=pytest.mark.long),
        pytest.param(2, {"train.activation_checkpointing": "full"}, marks=pytest.mark.long),
        pytest.param(2, {"engine.reshard_after_forward": False}, marks=pytest.mark.long),
        pytest.param(4, {"engine.shard_ranks": 1}, marks=pytest.mark.long),
        pytest.param(4, {"train.loss_chunk_tokens": 20}, marks=pytest.mark.long),
    ],
)
def test_it_equals_the_dense_run(dense: tuple[Path, float], tmp_path: Path, ranks: int, more: dict[str, Any]) -> None:
    one, noise = dense
    assert set(run_ranks(ranks, run, str(tmp_path), FSDP2 | more)) == {0}
    assert distance(tmp_path, one) <= 3 * noise
    keys = ("step", "tokens", "batch_sha256", "lr", "adamw_lr")
    assert metrics(tmp_path, *keys) == metrics(one, *keys)
    for key in ("loss", "grad_norm"):
        for (value,), (wanted,) in zip(metrics(tmp_path, key), metrics(one, key), strict=True):
            assert value == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (3, {"optimizer.name": "normuon"}),
        pytest.param(4, PAIRS | {"optimizer.row_balance": "carried"}, marks=pytest.mark.long),
        pytest.param(2, {"train.precision": "bf16", "engine.communication_dtype": "bf16"}, marks=pytest.mark.long),
        pytest.param(
            2, {"model": SPEEDRUN, "optimizer.contra": 0.2, "optimizer.uw_floor": 0.35}, marks=pytest.mark.long
        ),
    ],
)
def test_a_resumed_run_is_the_same_to_the_bit(tmp_path: Path, ranks: int, more: dict[str, Any]) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = FSDP2 | more
    run_ranks(ranks, run, str(whole), changes)
    for stop, code in ((3, 75), (7, 75), (None, 0)):
        assert set(run_ranks(ranks, run, str(parts), changes, stop)) == {code}
    assert metrics(parts, "step", "loss", "grad_norm", "lr") == metrics(whole, "step", "loss", "grad_norm", "lr")
    expected, found = tensors(whole), tensors(parts)
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert len(metrics(whole, "step")) == STEPS


@pytest.mark.long
def test_bf16_weights_train_as_those_of_zero_do(dense: tuple[Path, float], tmp_path: Path) -> None:
    """DeepSpeed's stage 3 computes with bf16 weights too; from the first gradient on, both round in an order of their
    own, and neither is farther from fp32 than the other."""
    one, _ = dense
    bf16 = {"train.precision": "bf16"}
    run_ranks(2, run, str(tmp_path / "zero"), zero(3, **bf16))
    run_ranks(2, run, str(tmp_path / "fsdp2"), FSDP2 | bf16)
    losses, wanted = metrics(tmp_path / "fsdp2", "loss"), metrics(tmp_path / "zero", "loss")
    assert losses[0] == pytest.approx(wanted[0], rel=1e-6)
    assert losses[0] != metrics(one, "loss")[0]
    for (loss,), (other,) in zip(losses, wanted, strict=True):
        assert loss == pytest.approx(other, abs=1e-3)
    assert distance(tmp_path / "fsdp2", one) < 1.3 * distance(tmp_path / "zero", one)


@pytest.mark.parametrize(("ranks", "more"), [(4, PAIRS), pytest.param(3, {}, marks=pytest.mark.long)])
def test_it_measures_neurons_as_a_dense_run_does(tmp_path: Path, ranks: int, more: dict[str, Any]) -> None:
    run_ranks(1, run, str(tmp_path / "dense"), DENSE | ON)
    run_ranks(ranks, run, str(tmp_path / "fsdp2"), FSDP2 | ON | more)
    check_equal(tmp_path / "fsdp2", tmp_path / "dense")


def share(root: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What one rank stores of the parameters and of their state after a step, and while a micro-batch is computed."""
    found: dict[str, Any] = {"gathered": set()}
    fit, accumulate = Trainer.fit, Fsdp2Engine.accumulate

    def looked(self: Trainer, stop_at: int | None = None) -> Any:
        outcome = fit(self, stop_at)
        parameters = dict(self.engine.module.named_parameters())
        found["types"] = {(type(p), p.placements[-1]) for p in parameters.values() if isinstance(p, DTensor)}
        found["plain"] = [name for name, p in parameters.items() if not isinstance(p, DTensor)]
        found["elements"] = sum(p.to_local().numel() for p in parameters.values() if isinstance(p, DTensor))
        states = [value for state in self.optimizer.state.values() for value in state.values()]
        found["state"] = sum(v.to_local().numel() for v in states if isinstance(v, DTensor))
        found["total"] = sum(p.numel() for p in parameters.values())
        return outcome

    def counted(self: Fsdp2Engine, last: bool) -> Any:
        block = next(part for name, part in self.module.named_modules() if name.endswith("layers.0"))
        block.register_forward_hook(lambda *_: found["gathered"].add(type(next(block.parameters()))))
        return accumulate(self, last)

    with mock.patch.object(Trainer, "fit", looked), mock.patch.object(Fsdp2Engine, "accumulate", counted):
        run(root, changes, 1)
    return found


@pytest.mark.parametrize(("ranks", "shards"), [(3, None), (4, 2)])
def test_each_rank_stores_its_share_only(tmp_path: Path, ranks: int, shards: int | None) -> None:
    more = {} if shards is None else {"engine.shard_ranks": shards}
    found = run_ranks(ranks, share, str(tmp_path), FSDP2 | more)
    count = shards or ranks
    for of_rank in found:
        assert not of_rank["plain"]
        assert {placement for _, placement in of_rank["types"]} == {Shard(0)}
        assert of_rank["elements"] < 1.1 * of_rank["total"] / count
        assert of_rank["state"] < 2.2 * of_rank["total"] / count
    assert sum(of_rank["elements"] for of_rank in found[:count]) == found[0]["total"]


def test_shard_ranks_must_divide_the_ranks(tmp_path: Path) -> None:
    config = parse_config(merged(TINY, {"run.root": str(tmp_path), **FSDP2, "engine.shard_ranks": 2}))
    with pytest.raises(ConfigError, match=r"engine\.shard_ranks: expected a divisor of the 3 ranks, got 2"):
        plan_run(config, Cluster(3, DEVICES["cpu"]))
    with pytest.raises(ConfigError, match=r"engine\.shard_ranks: expected a divisor of the 1 ranks, got 2"):
        train(config)
    assert not dist.is_initialized()


def compilations(root: str, changes: dict[str, Any]) -> tuple[int, int]:
    """How often something is compiled in a run, and how often that is called."""
    compiled, calls = [], []

    def compile(function: Any, *arguments: Any, **named: Any) -> Any:
        compiled.append(function)

        def called(*inputs: Any, **options: Any) -> Any:
            calls.append(function)
            return function(*inputs, **options)

        return called

    with mock.patch.object(torch, "compile", compile):
        run(root, changes, 2)
    return len(compiled), len(calls)


def test_each_block_is_compiled_and_called(tmp_path: Path) -> None:
    """The hooks that gather weights stay outside."""
    blocks, micro_batches = 2, 6
    for name, compiles in (("compiled", True), ("not", False)):
        for found in run_ranks(2, compilations, str(tmp_path / name), FSDP2 | {"train.compile": compiles}):
            assert found == ((blocks, 2 * blocks * micro_batches) if compiles else (0, 0))
    assert distance(tmp_path / "compiled", tmp_path / "not") == 0


@pytest.mark.long
@pytest.mark.parametrize("more", [{}, {"train.activation_checkpointing": "full"}])
def test_a_compiled_run_trains_and_measures_as_an_uncompiled_one(
    dense: tuple[Path, float], tmp_path: Path, more: dict[str, Any]
) -> None:
    one, noise = dense
    run_ranks(2, run, str(tmp_path / "run"), FSDP2 | {"train.compile": True} | more)
    assert distance(tmp_path / "run", one) <= 10 * noise
    run_ranks(1, run, str(tmp_path / "dense"), DENSE | ON)
    run_ranks(2, run, str(tmp_path / "measured"), FSDP2 | ON | {"train.compile": True} | more)
    check_equal(tmp_path / "measured", tmp_path / "dense")


def test_what_it_cannot_do_is_refused_by_name() -> None:
    for changes, wanted in [
        ({"samples.every_steps": 2}, "samples.every_steps: expected null with engine.kind fsdp2"),
        (
            {"engine.communication_dtype": "bf16", "train.precision": "fp32"},
            "engine.communication_dtype: expected fp32",
        ),
        (
            {"model": SPEEDRUN | {"embedding_dtype": "bf16"}},
            "model.embedding_dtype: expected fp32 with engine.kind fsdp2",
        ),
    ]:
        with pytest.raises(ConfigError, match=wanted.replace(".", r"\.")):
            parse_config(merged(TINY, FSDP2 | changes))


def alone(root: str) -> int:
    """A run without a launcher."""
    assert "RANK" not in os.environ
    return run(root, FSDP2, 2)


def test_it_starts_without_a_launcher(tmp_path: Path) -> None:
    assert run_ranks(1, alone, str(tmp_path)) == [75]
