"""What somebody with a GPU should run; everything here is skipped without CUDA.

    python -m pytest -q tests/gpu                  one GPU: a few minutes
    CUDA_VISIBLE_DEVICES=0,1 python -m pytest -q tests/gpu    two GPUs: NCCL as well

Those for one GPU were run once, on an H200 with torch 2.11; the variable-length attention kernel needs a newer one, and
docs/state.md says what passed. A failure is news: please report it with the output of
`python -m torch.utils.collect_env`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from optimizers.polar import polar
from pretrain.data.masks import attention_inputs
from pretrain.model.attention import attend, choose_kernel
from pretrain.slurm.health import gpu_problems
from tests.conftest import REPOSITORY
from tests.counting.counters import Operators
from tests.counting.where import TINY, configured, merged, metrics, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
QUIET = {"data.validation_fraction": 0.0}
GRAM = {"optimizer.polar": "gram"}


def losses(root: Path, changes: dict[str, Any], steps: int = 10) -> list[float]:
    config = configured(str(root), QUIET | changes)
    train(config, "never", steps)
    return [line["loss"] for line in metrics(config)]


@pytest.mark.parametrize("polar_dtype", ["auto", "fp16", "bf16", "fp32"])
def test_bf16_autocast_steps_stay_near_fp32(polar_dtype: str, tmp_path: Path) -> None:
    """The first loss is of equal weights; the tenth differs by the rounding of ten steps."""
    exact = losses(tmp_path / "fp32", {"optimizer.polar": "svd"})
    changes = GRAM | {"optimizer.polar_dtype": polar_dtype, "train.precision": "bf16"}
    found = losses(tmp_path / "bf16", changes)
    assert found[0] == pytest.approx(exact[0], rel=2e-3)
    assert found[-1] == pytest.approx(exact[-1], rel=2e-2)
    assert found[-1] < found[0]


def test_products_are_bf16_under_autocast(tmp_path: Path) -> None:
    adamw = {"optimizer": {"name": "adamw", "adamw": {"lr": 1e-3}}, "train.precision": "bf16"}
    with Operators("mm") as operators:
        losses(tmp_path, adamw, 1)
    # The backward pass runs in another thread on a GPU, so this is the forward pass.
    assert operators.calls
    assert {dtype for call in operators.calls for dtype in call.dtypes} == {torch.bfloat16}


@pytest.mark.parametrize("m_n", [(256, 64), (64, 256), (128, 128)])
@pytest.mark.parametrize(("dtype", "limit"), [("fp32", 2e-3), ("fp16", 2e-2), ("bf16", 5e-2)])
@pytest.mark.parametrize("backend", ["gram", "polar_express"])
def test_polar_backends_agree_with_an_svd(backend: Any, dtype: Any, limit: float, m_n: tuple[int, int]) -> None:
    """Condition numbers of a few tens, for which the backends state their error."""
    generator = torch.Generator("cuda").manual_seed(1)
    m, n = m_n
    u, _, v = torch.linalg.svd(torch.randn(m, n, generator=generator, device="cuda"), full_matrices=False)
    sigma = torch.logspace(0, -1.5, min(m, n), device="cuda")
    found = polar(u * sigma @ v, backend, dtype=dtype)
    exact = u @ v
    assert float((found - exact).norm() / exact.norm()) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_adamw_equals_the_plain_one(dtype: torch.dtype, tmp_path: Path) -> None:
    precision = {"train.precision": "bf16" if dtype == torch.bfloat16 else "fp32", "optimizer.polar": "svd"}
    plain = losses(tmp_path / "plain", precision | {"optimizer.adamw.fused": False})
    with Operators("_fused_adamw_") as operators:
        fused = losses(tmp_path / "fused", precision | {"optimizer.adamw.fused": True})
    assert len(operators.calls) == 10 * 2
    assert fused == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize(("dtype", "kernel"), [(torch.bfloat16, "varlen"), (torch.float32, "flex")])
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("length", [256, 300])
def test_attention_within_documents_equals_the_dense_mask(
    dtype: torch.dtype, kernel: Any, key_heads: int, length: int
) -> None:
    assert choose_kernel("auto", torch.device("cuda"), dtype, 64, length).kernel == kernel
    tokens = torch.randint(1, 50, (3, length))
    tokens[:, 20::60] = 0
    tokens[1, 100:] = 0
    lengths = torch.tensor([length, 100, length])
    valid = (torch.arange(length) < lengths[:, None])[:, None, :, None].cuda()
    drawn = [torch.randn(3, heads, length, 64, device="cuda") for heads in (4, key_heads, key_heads, 4)]
    found: dict[str, list[torch.Tensor]] = {}
    for name in ("dense", kernel):
        # The dense mask in fp32 is the reference of both.
        query, key, value, grad = (z.to(torch.float32 if name == "dense" else dtype) for z in drawn)
        inputs = [z.requires_grad_() for z in (query, key, value)]
        mask, _ = attention_inputs(
            tokens, 0, document_mask=True, reset_positions=True, kernel=name, lengths=lengths, device=query.device
        )
        mixed = attend(*inputs, mask) * valid
        mixed.backward(grad)
        found[name] = [mixed.detach(), *(z.grad for z in inputs if z.grad is not None)]
    for ours, exact in zip(found[kernel], found["dense"], strict=True):
        assert float((ours.float() - exact).norm() / exact.norm()) < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("compiled", [False, True])
def test_document_masks_train_alike_with_and_without_a_dense_mask(
    precision: str, compiled: bool, tmp_path: Path
) -> None:
    changes = {"data.document_mask": True, "data.reset_positions": True, "train.precision": precision} | GRAM
    heads = {"model.num_heads": 1, "train.compile": compiled}  # of 32 dimensions
    # FlexAttention needs sequences of 128 tokens.
    heads |= {"model.context_length": 128, "train.global_batch_tokens": 3072, "train.total_tokens": 122_880}
    fast, dense = (
        losses(tmp_path / kind, changes | heads | {"train.document_attention": kind}) for kind in ("auto", "dense")
    )
    assert fast == pytest.approx(dense, rel=1e-2 if precision == "bf16" else 1e-3)


def test_the_utilisation_is_reported_on_a_known_gpu(tmp_path: Path) -> None:
    config = configured(str(tmp_path), QUIET | GRAM | {"train.precision": "bf16"})
    train(config, "never", 3)
    known = any(name in torch.cuda.get_device_name() for name in ("H100", "H200", "A100", "B200", "L40S", "4090"))
    for line in metrics(config):
        assert ("mfu" in line) is known
        assert 0 <= line.get("mfu", 0) < 1  # that of so small a model rounds to 0


def test_phases_are_timed_by_events(tmp_path: Path) -> None:
    config = configured(str(tmp_path), QUIET | GRAM)
    train(config, "never", 5)
    line = metrics(config)[-1]
    assert line["forward_backward_seconds"] + line["optimizer_seconds"] <= 1.5 * line["step_seconds"]


def test_a_resume_is_exact_with_deterministic_kernels(tmp_path: Path) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    changes = QUIET | GRAM | {"run.deterministic": True}
    whole = losses(tmp_path / "whole", changes, 6)
    parts = configured(str(tmp_path / "parts"), changes)
    for stop in (3, 6):
        train(parts, "auto", stop)
    assert [line["loss"] for line in metrics(parts)] == whole


def by_command(root: Path, changes: dict[str, Any], processes: int) -> list[float]:
    """Train with the command, which starts the processes."""
    file = root / "config.yaml"
    root.mkdir()
    file.write_text(yaml.safe_dump(merged(TINY, {"run.root": str(root / "runs"), **QUIET, **changes})))
    command = [sys.executable, "-m", "pretrain", "train", str(file), "--stop-at", "10", "--processes", str(processes)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 75, done.stdout + done.stderr
    return [json.loads(line)["loss"] for line in (root / "runs/tiny/metrics.jsonl").read_text().splitlines()]


@two_gpus
@pytest.mark.parametrize(
    "engine",
    [
        {},
        *({"engine.kind": "deepspeed", "engine.zero_stage": stage, "engine.wire_dtype": "fp32"} for stage in (1, 2, 3)),
    ],
    ids=["plain", "zero1", "zero2", "zero3"],
)
def test_two_ranks_over_nccl_equal_one(engine: dict[str, Any], tmp_path: Path) -> None:
    changes = {"optimizer.polar": "svd", "train.precision": "fp32"}
    one = by_command(tmp_path / "one", changes, 1)
    two = by_command(tmp_path / "two", changes | engine, 2)
    assert two == pytest.approx(one, rel=1e-4)


def test_a_step_is_launched_without_waiting_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the step nor its record: its values are read when the next step is on its way."""
    from pretrain.training.trainer import Trainer

    launch, launched = Trainer.launch, []

    def watched(self: Trainer, *arguments: Any) -> Any:
        launched.append(self.state.step)
        if self.state.step < 3:  # kernels are chosen and memory is reserved in the first steps
            return launch(self, *arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(self, *arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "launch", watched)
    assert losses(tmp_path, GRAM | {"guards.on_loss_spike": "skip", "guards.spike_window": 8}, 12)
    assert len(launched) == 12


def test_the_check_of_a_node_finds_nothing_wrong_with_these_gpus() -> None:
    problems, rates = gpu_problems(torch.cuda.device_count())
    assert problems == []
    assert len(rates) == torch.cuda.device_count()
    assert min(rates) > 10
    missing, _ = gpu_problems(torch.cuda.device_count() + 1)
    assert "are needed" in missing[0]["text"]


def test_the_check_of_a_node_notices_memory_in_use() -> None:
    free, total = torch.cuda.mem_get_info()
    held = torch.empty(max(0, free - total // 2), dtype=torch.uint8, device="cuda")
    problems, _ = gpu_problems(1)
    del held
    torch.cuda.empty_cache()
    assert "in use by other processes" in problems[0]["text"]
