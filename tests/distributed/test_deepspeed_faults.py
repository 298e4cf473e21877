"""Faults that users of DeepSpeed have reported, each shown to be absent under our engine.

FSDP2 is held to the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from optimizers import Aurora
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import distance, metrics, run, tensors
from tests.distributed.test_deepspeed import DENSE, STEPS, zero

ENGINES: dict[str, dict[str, Any]] = {f"stage {stage}": zero(stage) for stage in (0, 1, 2, 3)}
ENGINES["fsdp2"] = DENSE | {"engine.kind": "fsdp2", "engine.wire_dtype": "fp32"}
BF16 = {"train.precision": "bf16"}


def counted(root: str, changes: dict[str, Any]) -> int:
    """How often the optimizer steps in a run."""
    calls, step = [], Aurora.step

    def count(self: Aurora, closure: Any = None) -> Any:
        if not self._paused:
            calls.append(1)
        return step(self, closure)

    with mock.patch.object(Aurora, "step", count):
        run(root, changes)
    return len(calls)


def some(*fast: str) -> list[Any]:
    return [pytest.param(name, marks=[] if name in fast else [pytest.mark.long]) for name in ENGINES]


@pytest.mark.parametrize("engine", some("stage 3"))
def test_gradients_are_not_stepped_in_every_micro_batch(tmp_path: Path, engine: str) -> None:
    """Reported of stage 3: with 4 micro-batches a step, 4 steps were made, each with a quarter of the gradient."""
    whole, parts = ENGINES[engine] | {"train.micro_batch_sequences": 6}, ENGINES[engine]
    # An optimizer under stages 1 to 3 is called once for each group of parameters.
    (one, *_), (several, *_) = (
        run_ranks(2, counted, str(tmp_path / "1"), whole),
        run_ranks(2, counted, str(tmp_path / "6"), parts),
    )
    assert one == several
    assert several % STEPS == 0
    keys = ("step", "loss", "grad_norm")
    for found, wanted in zip(metrics(tmp_path / "6", *keys), metrics(tmp_path / "1", *keys), strict=True):
        assert found == pytest.approx(wanted, rel=1e-4)
    assert distance(tmp_path / "6", tmp_path / "1") < 1e-3


@pytest.mark.parametrize("micro_batch", [6, pytest.param(1, marks=pytest.mark.long)])
def test_a_weight_that_is_used_twice_gets_the_whole_gradient(tmp_path: Path, micro_batch: int) -> None:
    """Reported of stage 2 in bf16: of a tied embedding, the gradient of one use only, or one use counted twice."""
    tied = {"model.tie_embeddings": True, "train.grad_clip": None}  # the factor of clipping depends on an order of sums
    changes = {**tied, "train.micro_batch_sequences": micro_batch, **BF16}
    roots = {stage: tmp_path / str(stage) for stage in (1, 2)}
    for stage, root in roots.items():
        run_ranks(2, run, str(root), zero(stage) | changes)
    run_ranks(1, run, str(tmp_path / "plain"), DENSE | tied)
    if micro_batch == 6:  # one micro-batch: the same sums, in the same order
        first, second = tensors(roots[1]), tensors(roots[2])
        assert [key for key in first if not torch.equal(first[key], second[key])] == []
    # Half of the gradient of the embedding would show in the first norm, which is mostly the embedding's.
    for root in roots.values():
        assert metrics(root, "grad_norm")[0] == pytest.approx(metrics(tmp_path / "plain", "grad_norm")[0], rel=0.01)


@pytest.mark.parametrize("engine", some("stage 0"))
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp32", marks=pytest.mark.long)])
def test_gradients_are_not_divided_by_a_loss_scale(tmp_path: Path, engine: str, precision: str) -> None:
    """Reported of stage 0: gradients divided by 65,536, the loss scale of fp16, which is not on."""
    changes = ENGINES[engine] | {"train.precision": precision, "train.grad_clip": 1e-3}
    if engine == "stage 0" and precision == "bf16":
        changes |= {"engine.accumulation_dtype": "bf16"}
    run_ranks(2, run, str(tmp_path / "own"), changes)
    run_ranks(1, run, str(tmp_path / "plain"), DENSE | {"train.grad_clip": 1e-3})
    for (norm,), (wanted,) in zip(
        metrics(tmp_path / "own", "grad_norm"), metrics(tmp_path / "plain", "grad_norm"), strict=True
    ):
        assert norm == pytest.approx(wanted, rel=0.05)
    # AdamW hides a factor in its gradient; its moments do not, and here clipping sets their size.
    own, plain = tensors(tmp_path / "own"), tensors(tmp_path / "plain")
    name = ("model.embed_tokens.weight", "exp_avg")
    assert own[name].norm() == pytest.approx(plain[name].norm().item(), rel=0.05)
