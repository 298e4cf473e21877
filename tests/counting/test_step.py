"""What a training step costs: every option for memory, recomputation or kernels is seen to act, by counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from tests.counting.counters import Operators, forwards, saved_for_backward, total_bytes
from tests.counting.where import SPEEDRUN, configured, train

MICRO_BATCHES = 4  # of 6 sequences of 32 tokens
QUIET = {"data.validation_fraction": 0.0}
ARCHITECTURES: dict[str, dict[str, Any]] = {"llama": {}, "speedrun": {"model": SPEEDRUN}}


def saved_shapes(tmp_path: Path, changes: dict[str, Any]) -> dict[int, tuple[int, ...]]:
    """What autograd keeps in one step of a single micro-batch."""
    config = configured(str(tmp_path), QUIET | {"train.global_batch_tokens": 192, **changes})
    with saved_for_backward() as saved:
        train(config, "never", 1)
    return saved


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_chunked_loss_keeps_no_logits(architecture: str, tmp_path: Path) -> None:
    changes = ARCHITECTURES[architecture]
    whole = saved_shapes(tmp_path / "whole", changes)
    chunked = saved_shapes(tmp_path / "chunked", changes | {"train.loss_chunk_tokens": 48})
    vocabulary = 8192

    def of_logits(saved: dict[int, tuple[int, ...]]) -> list[tuple[int, ...]]:
        weight = (vocabulary, 32, 4)
        return [shape for shape in saved.values() if vocabulary in shape and shape not in (weight, (32, vocabulary, 4))]

    assert any(shape[0] == 192 for shape in of_logits(whole))
    assert all(len(shape) < 3 for shape in of_logits(chunked)), "only the head's bias may have the vocabulary's size"
    assert total_bytes(chunked) < total_bytes(whole) - 192 * vocabulary * 4


def test_the_logits_of_a_chunked_loss_never_exist_at_once(tmp_path: Path) -> None:
    """In training and in validation, where nothing is kept for a backward pass."""
    largest = {}
    for chunk in (None, 48):
        changes = {"train.loss_chunk_tokens": chunk, "train.total_tokens": 768, "schedule.warmup_tokens": 0}
        changes |= {"validation.max_tokens": 192, "optimizer.polar": "gram"}
        # A head of few entries, and no copy of the state for a save, so that nothing but logits is large.
        changes["checkpoint.asynchronous"] = False
        with Operators() as operators:
            train(configured(str(tmp_path / str(chunk)), changes))
        largest[chunk] = operators.largest
    assert largest[None] == 192 * 8192
    assert largest[48] == 48 * 8192


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("every", "recomputed"), [("none", 0), ("full", 3), (2, 2)])
def test_checkpointed_layers_are_computed_twice(architecture: str, every: Any, recomputed: int, tmp_path: Path) -> None:
    changes = ARCHITECTURES[architecture] | QUIET | {"model.num_layers": 3, "train.activation_checkpointing": every}
    with forwards(nn.Linear) as calls:
        train(configured(str(tmp_path), changes), "never", 1)
    down = [call for call in calls if call.module.out_features == 32 and call.module.in_features == 64]  # type: ignore
    assert len({call.module for call in down}) == 3
    assert len(down) == MICRO_BATCHES * (3 + recomputed)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_checkpointed_layers_keep_fewer_bytes(architecture: str, tmp_path: Path) -> None:
    kept = {}
    for every in ("none", 2, "full"):
        changes = ARCHITECTURES[architecture] | {"model.num_layers": 4, "train.activation_checkpointing": every}
        changes |= {"train.loss_chunk_tokens": 48}
        kept[every] = total_bytes(saved_shapes(tmp_path / str(every), changes))
    layer = (kept["none"] - kept["full"]) / 4
    assert layer > 10 * 192 * 32 * 4  # more than ten activations of the width of the model
    assert kept["none"] - kept[2] == pytest.approx(2 * layer, rel=0.01)


@pytest.mark.parametrize("compiled", [False, True])
def test_compile_compiles_once_and_every_micro_batch_calls_that(compiled: bool, tmp_path: Path) -> None:
    compilations, calls = [], []

    def compile(function: Any, *arguments: Any, **named: Any) -> Any:
        compilations.append(function)

        def call(*arguments: Any, **named: Any) -> Any:
            calls.append(torch.is_grad_enabled())
            return function(*arguments, **named)

        return call

    with mock.patch.object(torch, "compile", compile):
        train(configured(str(tmp_path), {"train.compile": compiled}), "never", 2)
    assert len(compilations) == int(compiled)
    assert len(calls) == (2 * MICRO_BATCHES if compiled else 0)


@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_kernels_are_asked_for_while_training(wanted: bool, tmp_path: Path) -> None:
    seen: list[bool] = []
    before = torch.are_deterministic_algorithms_enabled()
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda *_: seen.append(torch.are_deterministic_algorithms_enabled())
    )
    try:
        train(configured(str(tmp_path), QUIET | {"run.deterministic": wanted}), "never", 1)
    finally:
        handle.remove()
        torch.use_deterministic_algorithms(before)
    assert seen
    assert set(seen) == {wanted}


@pytest.mark.parametrize("fused", [False, True])
def test_fused_adamw_is_one_kernel_for_each_group(fused: bool, tmp_path: Path) -> None:
    with Operators("_fused_adamw_") as operators:
        train(configured(str(tmp_path), QUIET | {"optimizer.adamw.fused": fused}), "never", 3)
    groups = 2  # the embedding; the gains of the norms
    assert len(operators.calls) == (3 * groups if fused else 0)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_matrix_products_have_the_dtype_of_the_precision(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    adamw = {"optimizer": {"name": "adamw", "adamw": {"lr": 1e-3}}}
    with Operators("mm") as operators:  # the table of rotations is a bmm
        train(configured(str(tmp_path), QUIET | adamw | {"train.precision": precision}), "never", 1)
    matrices = 2 * 7 + 1  # of two layers, and the head
    assert len(operators.calls) == MICRO_BATCHES * matrices * 3  # forward, and backward to inputs and weights
    assert {dtype for call in operators.calls for dtype in call.dtypes} == {dtype}


@pytest.mark.parametrize(("rows", "passes"), [(6, 4), (12, 2), (24, 1)])
def test_a_micro_batch_is_one_forward_pass(rows: int, passes: int, tmp_path: Path) -> None:
    with forwards(nn.Embedding) as calls:
        train(configured(str(tmp_path), QUIET | {"train.micro_batch_sequences": rows}), "never", 2)
    assert [call.shape for call in calls] == [(rows, 32)] * (2 * passes)
    assert all(call.training for call in calls)


def test_a_dense_mask_is_passed_only_where_it_is_asked_for(tmp_path: Path) -> None:
    """It costs the fused causal kernel, and T x T entries."""
    attention = nn.functional.scaled_dot_product_attention
    wanted = {
        "none": ({}, [False]),
        "document by document": ({"data.document_mask": True}, []),
        "dense": ({"data.document_mask": True, "train.document_attention": "dense"}, [True]),
    }
    for name, (changes, expected) in wanted.items():
        seen: list[bool] = []

        def look(*arguments: Any, seen: list[bool] = seen, **named: Any) -> Any:
            seen.append(named.get("attn_mask") is not None)
            return attention(*arguments, **named)

        with mock.patch.object(nn.functional, "scaled_dot_product_attention", look):
            train(configured(str(tmp_path / name), QUIET | changes), "never", 1)
        assert seen == expected * (2 * MICRO_BATCHES), name
