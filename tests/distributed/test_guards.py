"""Bad numbers on one rank: all ranks skip the step, or the run ends before anything is saved."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from optimizers import Aurora
from pretrain.checkpoint.store import list_checkpoints
from pretrain.engine.base import Engine
from pretrain.engine.deepspeed import DeepSpeedEngine
from pretrain.engine.fsdp2 import Fsdp2Engine
from pretrain.engine.plain import PlainEngine
from pretrain.training.guards import TrainingError
from pretrain.training.trainer import Trainer
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import metrics, newest, run

SHORT: dict[str, Any] = {
    "train.total_tokens": 12 * 384,
    "train.global_batch_tokens": 384,
    "train.micro_batch_sequences": 6,
    "schedule.warmup_tokens": 0,
    "data.validation_fraction": 0.0,
    "guards.spike_window": 8,
}
DEEPSPEED = {"engine.kind": "deepspeed", "engine.zero_stage": 0}
BF16 = {"train.precision": "bf16"}
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "stage 0": DEEPSPEED,
    "stage 0 bf16": DEEPSPEED | BF16 | {"engine.accumulation_dtype": "bf16"},
    "stage 1": DEEPSPEED | {"engine.zero_stage": 1},
    "stage 1 bf16": DEEPSPEED | BF16 | {"engine.zero_stage": 1},
    "stage 2": DEEPSPEED | {"engine.zero_stage": 2},
    "stage 3": DEEPSPEED | {"engine.zero_stage": 3},
    "fsdp2": {"engine.kind": "fsdp2"},
}
CLASSES: dict[str, type[Engine]] = {"plain": PlainEngine, "deepspeed": DeepSpeedEngine, "fsdp2": Fsdp2Engine}
BAD_STEP = 3


def reduced_gradients(engine: Any) -> list[torch.Tensor]:
    """What this rank holds of the gradients when they have been summed over the ranks."""
    wrapper = getattr(engine, "_wrapper", None)
    match type(wrapper).__name__:
        case "BF16_Optimizer":
            return list(wrapper.get_grads_for_norm()[0])
        case "DeepSpeedZeroOptimizer":
            return [gradient for group in wrapper.averaged_gradients.values() for gradient in group]
        case "DeepSpeedZeroOptimizer_Stage3":
            return [gradient for group in wrapper.averaged_gradients.values() for gradient in group]
    return [p.grad for p in engine.module.parameters() if p.grad is not None]


def faulty(root: str, changes: dict[str, Any], fault: str, factor: float) -> dict[str, Any]:
    """A run of five steps whose third has a fault on rank 1 alone; what this rank saw."""
    mine = os.environ["RANK"] == "1"
    seen: dict[str, Any] = {"taken": [], "weights": []}
    engine_type = CLASSES[changes.get("engine.kind", "plain")]
    engine_step, forward_backward, step = engine_type.step, Trainer.forward_backward, Aurora.step

    def now() -> bool:
        return mine and len(seen["taken"]) == BAD_STEP - 1

    def after_reduction(self: Any, optimizer: Aurora) -> torch.Tensor:
        if fault == "reduced" and now():
            for gradient in reduced_gradients(self):
                gradient.mul_(factor)
        norm = engine_step(self, optimizer)
        seen["taken"].append(bool(optimizer.last_step_finite))
        seen["weights"].append(self.weight_hashes())
        return norm

    def lost(self: Trainer, share: Any) -> torch.Tensor:
        loss = forward_backward(self, share)
        return loss * factor if fault == "loss" and now() else loss

    def corrupted(self: Aurora, closure: Any = None) -> Any:
        if fault == "optimizer" and now() and not self._paused:
            next(p for group in self.param_groups for p in group["params"] if p.grad is not None).grad[0] = factor
        return step(self)

    with (
        mock.patch.object(engine_type, "step", after_reduction),
        mock.patch.object(Trainer, "forward_backward", lost),
        mock.patch.object(Aurora, "step", corrupted),
    ):
        run(root, changes, 5)
    return seen


FAST = [
    ("plain", "reduced", math.nan),
    ("plain", "reduced", 1000.0),
    ("stage 1 bf16", "reduced", math.nan),
    ("stage 3", "loss", math.nan),
    ("fsdp2", "reduced", math.nan),
]
MORE = [
    *((engine, fault, math.nan) for engine in ENGINES for fault in ("reduced", "loss")),
    *((engine, "reduced", 1000.0) for engine in ("stage 0", "stage 0 bf16", "stage 1 bf16")),
    *((engine, "optimizer", math.inf) for engine in ("plain", "stage 0")),
]


def check(engine: str, fault: str, factor: float, tmp_path: Path) -> None:
    first, second = run_ranks(2, faulty, str(tmp_path), SHORT | ENGINES[engine], fault, factor)
    assert first["taken"] == second["taken"] == [step != BAD_STEP for step in range(1, 6)]
    assert first["weights"] == second["weights"]
    if engine not in ("stage 3", "fsdp2"):
        assert first["weights"][BAD_STEP - 1] == first["weights"][BAD_STEP - 2]
        assert len({str(hashes) for hashes in first["weights"]}) == 4
    counters = newest(tmp_path).index["counters"]
    assert (counters["skipped_steps"], counters["skipped_in_a_row"]) == (1, 0)
    assert all(math.isfinite(loss) for loss in counters["loss_history"])
    assert len(list((tmp_path / "tiny" / "bad_batches").iterdir())) == 2  # each rank's share


@pytest.mark.parametrize(("engine", "fault", "factor"), FAST)
def test_a_bad_number_on_one_rank_skips_one_step_on_all(engine: str, fault: str, factor: float, tmp_path: Path) -> None:
    check(engine, fault, factor, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(("engine", "fault", "factor"), [case for case in MORE if case not in FAST])
def test_a_bad_number_on_one_rank_skips_one_step_under_every_engine(
    engine: str, fault: str, factor: float, tmp_path: Path
) -> None:
    check(engine, fault, factor, tmp_path)


def flipped(root: str, changes: dict[str, Any]) -> str:
    """What a run says in which the lowest bit of one weight on rank 1 flips after step 3."""
    engine_type = CLASSES[changes.get("engine.kind", "plain")]
    step, taken = engine_type.step, []

    def flip(self: Engine, optimizer: Aurora) -> torch.Tensor:
        norm = step(self, optimizer)  # type: ignore[arg-type]
        taken.append(norm)
        if os.environ["RANK"] == "1" and len(taken) == 3:
            weight = self.module.get_parameter("model.model.norm.weight").data
            weight[5:6].view(torch.int32).bitwise_xor_(1)
        return norm

    with mock.patch.object(engine_type, "step", flip):
        try:
            run(root, changes)
        except TrainingError as error:
            return str(error)
    return "nothing"


@pytest.mark.parametrize("engine", ["plain", pytest.param("stage 2", marks=pytest.mark.long)])
def test_weights_that_differ_end_the_run_before_a_save(engine: str, tmp_path: Path) -> None:
    """Without being asked to: a checkpoint would hold parts of both."""
    changes = SHORT | ENGINES[engine] | {"checkpoint.save_every_steps": 2}
    # Under ZeRO the next step would gather the weights anew.
    changes |= {"guards.compare_weights_every_steps": 3} if engine != "plain" else {}
    said = run_ranks(2, flipped, str(tmp_path), changes)
    for text in said:
        assert text.startswith(f"step {4 if engine == 'plain' else 3}: the weights of these ranks")
        assert "rank 1 (" in text
        assert "model.norm.weight" in text
    assert [path.name for path in list_checkpoints(tmp_path / "tiny" / "checkpoints")] == ["step-00000002"]


def rolled_back(root: str, changes: dict[str, Any]) -> tuple[float, float]:
    """The loss of a batch at the step of a checkpoint, and again when the run has been rolled back to it."""
    forward_backward, kept, losses = Trainer.forward_backward, [], []

    def spiked(self: Trainer, share: Any) -> torch.Tensor:
        if self.state.step == 8:
            kept.append(share)
            with torch.no_grad():
                losses.append(self.loss_sum(kept[0], self.engine.module).item())
        loss = forward_backward(self, share)
        return loss * 1000.0 if self.state.step == 9 and not self.state.rollbacks else loss

    with mock.patch.object(Trainer, "forward_backward", spiked):
        run(root, changes | {"guards.on_loss_spike": "roll_back", "checkpoint.save_every_steps": 4})
    before, after = losses
    return before, after


@pytest.mark.parametrize(
    "engine", ["stage 3", *(pytest.param(name, marks=pytest.mark.long) for name in ENGINES if name != "stage 3")]
)
def test_every_engine_returns_to_the_weights_of_the_checkpoint(engine: str, tmp_path: Path) -> None:
    for before, after in run_ranks(2, rolled_back, str(tmp_path), SHORT | ENGINES[engine]):
        assert before == after
    hashes = [batch for (batch,) in metrics(tmp_path, "batch_sha256")]
    assert len(set(hashes)) == 12
    assert newest(tmp_path).index["data_state"]["sequences_emitted"] == 14 * 12
