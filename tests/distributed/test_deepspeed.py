"""Runs under DeepSpeed's ZeRO: equal to a dense run up to the order of summation, across ranks, stages and engines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from optimizers import Aurora, param_groups
from optimizers.sharded import zero_layout
from pretrain.checkpoint.store import CheckpointReader, list_checkpoints
from tests.conftest import SMALL_VOCABULARY
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import distance, metrics, newest, run, run_with_fault, tensors

STEPS = 10
# Two or more micro-batches a step on up to 4 ranks, unequal numbers of targets (document masks), clipping active.
DENSE: dict[str, Any] = SMALL_VOCABULARY | {
    "train.total_tokens": STEPS * 384,
    "train.global_batch_tokens": 384,  # 12 sequences
    "train.micro_batch_sequences": 1,
    "train.grad_clip": 0.2,
    "schedule.warmup_tokens": 2 * 384,
    "validation.max_tokens": 384,
}


def zero_engine(stage: int) -> dict[str, Any]:
    """The keys of ZeRO."""
    wire = {"engine.wire_dtype": "fp32"} if stage else {}
    return {"engine.kind": "deepspeed", "engine.zero_stage": stage} | wire


def zero(stage: int, **more: Any) -> dict[str, Any]:
    """The same run under ZeRO."""
    return DENSE | zero_engine(stage) | more


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A dense run, and its distance to one that sums in another order."""
    one, other = tmp_path_factory.mktemp("dense"), tmp_path_factory.mktemp("reversed")
    run_ranks(1, run, str(one), DENSE)
    run_ranks(1, run_with_fault, str(other), DENSE, "reversed")
    noise = distance(other, one)
    assert 0 < noise < 1e-4
    norms = [norm for (norm,) in metrics(one, "grad_norm")]
    assert min(norms) > DENSE["train.grad_clip"]
    return one, noise


SOME = [(1, 2), (2, 3), (3, 4)]
GRID = [(stage, ranks) for stage in (0, 1, 2, 3) for ranks in (1, 2, 3, 4)]


def check_parity(dense: tuple[Path, float], tmp_path: Path, stage: int, ranks: int) -> None:
    one, noise = dense
    run_ranks(ranks, run, str(tmp_path), zero(stage))
    assert distance(tmp_path, one) <= 3 * noise
    keys = ("step", "tokens", "batch_sha256", "lr", "adamw_lr")
    assert metrics(tmp_path, *keys) == metrics(one, *keys)
    for (loss,), (wanted,) in zip(metrics(tmp_path, "loss"), metrics(one, "loss"), strict=True):
        assert loss == pytest.approx(wanted, rel=1e-5)
    assert newest(tmp_path).index["data_state"] == newest(one).index["data_state"]


@pytest.mark.parametrize(("stage", "ranks"), SOME)
def test_zero_equals_the_dense_run(dense: tuple[Path, float], tmp_path: Path, stage: int, ranks: int) -> None:
    check_parity(dense, tmp_path, stage, ranks)


@pytest.mark.long
@pytest.mark.parametrize(("stage", "ranks"), [case for case in GRID if case not in SOME])
def test_zero_equals_the_dense_run_everywhere(
    dense: tuple[Path, float], tmp_path: Path, stage: int, ranks: int
) -> None:
    check_parity(dense, tmp_path, stage, ranks)


@pytest.mark.parametrize("fault", ["dropped", "stale", "rate"])
def test_a_planted_fault_breaks_the_bound(dense: tuple[Path, float], tmp_path: Path, fault: str) -> None:
    one, noise = dense
    run_ranks(2, run_faulty, str(tmp_path), zero(1), fault)
    assert distance(tmp_path, one) > 3 * noise


def run_faulty(root: str, changes: dict[str, Any], fault: str) -> None:
    """A run in which rank 1 loses a few gradients, forgets momentum, or all take a rate that is 1 % off."""
    step, count = Aurora.step, [0]
    rank = int(os.environ["RANK"])

    def planted(self: Aurora, closure: Any = None) -> Any:
        (group,) = self.param_groups
        (flat,) = group["params"]
        if group["kind"] == "matrix":
            count[0] += 1
            if fault == "dropped" and rank == 1 and count[0] == 5:
                flat.grad[:64] = 0
            if fault == "stale" and rank == 1 and count[0] == 5:
                self.state[flat]["momentum"].zero_()
            if fault == "rate":
                group["lr"] *= 1.01
        return step(self)

    with mock.patch.object(Aurora, "step", planted):
        run(root, changes)


def test_a_run_crosses_ranks_stages_and_engines(dense: tuple[Path, float], tmp_path: Path) -> None:
    one, noise = dense
    run_ranks(4, run, str(tmp_path), zero(1), 3)
    assert len(newest(tmp_path).index["files"]) == 8
    run_ranks(2, run, str(tmp_path), zero(3), 5)
    run_ranks(1, run, str(tmp_path), DENSE, 8)
    run_ranks(3, run, str(tmp_path), zero(2))
    assert distance(tmp_path, one) <= 3 * noise
    assert metrics(tmp_path, "step", "batch_sha256", "lr") == metrics(one, "step", "batch_sha256", "lr")


RESUMES = [(1, 3, "fp32", "aurora"), pytest.param(3, 2, "bf16", "normuon", marks=pytest.mark.long)]


@pytest.mark.parametrize(("stage", "ranks", "precision", "optimizer"), RESUMES)
def test_a_resume_on_the_same_ranks_is_exact_twice(
    tmp_path: Path, stage: int, ranks: int, precision: str, optimizer: str
) -> None:
    check_resume(tmp_path, stage, ranks, precision, optimizer)


@pytest.mark.long
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resume_is_exact_everywhere(tmp_path: Path, stage: int, ranks: int, precision: str) -> None:
    check_resume(tmp_path, stage, ranks, precision, "aurora")


def check_resume(tmp_path: Path, stage: int, ranks: int, precision: str, optimizer: str) -> None:
    short = {"train.total_tokens": 6 * 384, "train.precision": precision, "optimizer.name": optimizer}
    changes = zero(stage, **short)
    if stage == 0 and precision == "bf16":
        changes |= {"engine.accumulation_dtype": "bf16"}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(ranks, run, str(whole), changes)
    for stop_at in (2, 4, None):
        run_ranks(ranks, run, str(parts), changes, stop_at)
    first, second = tensors(whole), tensors(parts)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []
    keys = ("step", "loss", "grad_norm", "lr", "batch_sha256")
    assert metrics(whole, *keys) == metrics(parts, *keys)


@pytest.mark.parametrize(("stage", "ranks"), [(1, 4), (3, 3)])
def test_the_layout_is_the_one_that_is_computed(tmp_path: Path, stage: int, ranks: int) -> None:
    for found, wanted in run_ranks(ranks, layouts, str(tmp_path), zero(stage), stage, ranks):
        assert found == wanted


def layouts(root: str, changes: dict[str, Any], stage: int, ranks: int) -> tuple[Any, Any]:
    """The layout that DeepSpeed made and the one computed for it."""
    from pretrain.engine import deepspeed as deepspeed_engine

    prepared: list[Any] = []
    prepare = deepspeed_engine.DeepSpeedEngine.prepare

    def keep(self: Any, module: Any, optimizer: Aurora) -> None:
        groups = [
            dict(zip(g["param_names"], [tuple(p.shape) for p in g["params"]], strict=True))
            for g in optimizer.param_groups
        ]
        prepare(self, module, optimizer)
        prepared.append((self.held.layout, zero_layout(groups, ranks, stage)))

    with mock.patch.object(deepspeed_engine.DeepSpeedEngine, "prepare", keep):
        run(root, changes, 1)
    layout, computed = prepared[0]
    assert layout.shapes == computed.shapes
    table = [[sorted(own, key=str) for own in some.fragments] for some in (layout, computed)]
    return (table[0], layout.shard_sizes), (table[1], computed.shard_sizes)


TWINS = [(1, 2), (3, 2), pytest.param(2, 3, marks=pytest.mark.long), pytest.param(1, 4, marks=pytest.mark.long)]


@pytest.mark.parametrize(("stage", "ranks"), TWINS)
def test_bf16_weights_are_the_rounded_fp32_ones_of_a_dense_twin(tmp_path: Path, stage: int, ranks: int) -> None:
    changes = zero(stage, **{"train.precision": "bf16", "train.total_tokens": 6 * 384})
    worst = run_ranks(ranks, twin_of_bf16, str(tmp_path), changes)
    assert max(worst) < 1e-6
    saved = newest(tmp_path)
    assert saved.index["provenance"]["precision"] == "bfloat16 weights beside fp32 ones"


def twin_of_bf16(root: str, changes: dict[str, Any]) -> float:
    """Alongside a bf16 run a dense optimizer gets the fp32 gradients that `step` receives; return the distance."""
    import torch.distributed as dist

    from pretrain.engine import deepspeed as deepspeed_engine

    twin: dict[str, Any] = {}
    prepare, engine_step, step = (
        deepspeed_engine.DeepSpeedEngine.prepare,
        deepspeed_engine.DeepSpeedEngine.step,
        Aurora.step,
    )

    def gathered(held: Any, values: list[Tensor]) -> dict[str, Tensor]:
        whole = {name: torch.zeros(shape).reshape(-1) for name, shape in held.layout.shapes.items()}
        for f in held.layout.fragments[held.rank]:
            if values[f.shard] is not None:
                whole[f.name][f.start : f.stop] = values[f.shard][f.offset : f.offset + f.length]
        for flat in whole.values():
            dist.all_reduce(flat)
        return {name: flat.view(held.layout.shapes[name]) for name, flat in whole.items()}

    def make(self: Any, module: Any, optimizer: Aurora) -> None:
        groups = param_groups(module.model, self.config.optimizer.settings())
        prepare(self, module, optimizer)
        weights = gathered(self.held, [flat.detach() for flat in self.held.shards])
        for g in groups:
            g["params"] = [weights[name].clone().requires_grad_() for name in g["param_names"]]
        twin["engine"], twin["optimizer"] = self, Aurora(groups)
        assert type(self.model.optimizer).__name__ == {1: "BF16_Optimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}.get(
            self.config.engine.zero_stage, "DeepSpeedZeroOptimizer"
        )

    def watched(self: Aurora, closure: Any = None) -> None:
        if self is not twin.get("optimizer"):
            for group in self.param_groups:
                for flat in group["params"]:
                    if flat.grad is not None:
                        twin.setdefault("gradients", {})[id(flat)] = flat.grad.clone()
        step(self)

    def both(self: Any, optimizer: Aurora) -> Tensor:
        twin["gradients"] = {}
        norm = engine_step(self, optimizer)
        found = [twin["gradients"][id(flat)] for flat in self.held.shards]
        gradients = gathered(self.held, found)
        for mine, theirs in zip(twin["optimizer"].param_groups, optimizer.param_groups, strict=True):
            mine["lr"] = theirs["lr"]
            for name, p in zip(mine["param_names"], mine["params"], strict=True):
                p.grad = gradients[name]
        twin["optimizer"].step()
        return norm

    engine_class = deepspeed_engine.DeepSpeedEngine
    with (
        mock.patch.object(engine_class, "prepare", make),
        mock.patch.object(Aurora, "step", watched),
        mock.patch.object(engine_class, "step", both),
    ):
        worst = []

        def measure(self: Any) -> None:
            masters = gathered(self.held, [flat.detach() for flat in self.held.shards])
            for group in twin["optimizer"].param_groups:
                for name, p in zip(group["param_names"], group["params"], strict=True):
                    worst.append(((masters[name] - p).norm() / p.norm()).item())
            if self.config.engine.zero_stage < 3:
                for name, p in self.module.model.named_parameters():
                    assert p.dtype == torch.bfloat16
                    assert torch.equal(p.detach(), masters[name].bfloat16()), name
            close(self)

        close = engine_class.close
        with mock.patch.object(engine_class, "close", measure):
            run(root, changes)
    return max(worst)


def test_an_export_needs_no_deepspeed(tmp_path: Path) -> None:
    run_ranks(3, run, str(tmp_path), zero(3), 2)
    reader = CheckpointReader(list_checkpoints(tmp_path / "tiny" / "checkpoints")[-1])
    weights = reader.weights()
    assert {tuple(w.shape) for w in weights.values()} >= {(2048, 32), (64, 32)}
    out = run_ranks(1, export_without_deepspeed, str(tmp_path / "tiny"), str(tmp_path / "out"))
    assert out == [True]


def export_without_deepspeed(source: str, out: str) -> bool:
    """Exports where importing DeepSpeed fails."""
    import sys

    from transformers import AutoModelForCausalLM

    from pretrain.export.run import export_checkpoint

    with mock.patch.dict(sys.modules, {"pretrain.engine.deepspeed": None}):
        reader = export_checkpoint(Path(source), Path(out))
    model = AutoModelForCausalLM.from_pretrained(out)
    saved = reader.weights()
    return all(torch.equal(p.float(), saved[name]) for name, p in model.named_parameters())
