"""The activations that a plan counts are those that autograd saves."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.config import Config
from pretrain.model.build import build_model
from pretrain.model.loss import LossModel
from pretrain.planning.memory import activations, saved_activations

MakeConfig = Callable[..., Config]
SMALL: dict[str, Any] = {
    "engine.kind": "deepspeed",
    "train.micro_batch_sequences": 3,
    "model.num_layers": 4,
    "model.hidden_size": 48,
    "model.intermediate_size": 80,
    "model.num_heads": 3,
    "model.num_kv_heads": 1,
}


def counted(config: Config, dtype: torch.dtype, *, autocast: bool) -> int:
    """Bytes of all storages that the forward pass saves, but for weights, token ids, labels and rotary tables."""
    module = LossModel(build_model(config.model, 0).to(dtype), config.train)
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    length = config.sequence_length
    tokens = torch.randint(0, config.model.vocab_size, (config.train.micro_batch_sequences, length + 1))
    saved: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        rotary = x.shape == (1, 1, length, config.model.hidden_size // config.model.num_heads)
        if x.is_floating_point() and x.ndim and not rotary and x.untyped_storage().data_ptr() not in own:
            saved[x.untyped_storage().data_ptr()] = x  # alive, so that no other storage takes its place
        return x

    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), context:
        module(tokens[:, :-1], tokens[:, 1:])
    return sum(x.untyped_storage().nbytes() for x in saved.values())


@pytest.mark.parametrize("checkpointing", ["none", "full", 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
def test_saved_activations_are_counted_to_the_byte(
    tiny_config: MakeConfig, precision: str, checkpointing: str | int
) -> None:
    autocast = precision == "autocast"
    changes = SMALL | {"train.activation_checkpointing": checkpointing}
    config = tiny_config(changes if not autocast else changes | {"engine.kind": "plain"})
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    element = 4 if precision == "fp32" else 2
    assert saved_activations(config, element, autocast=autocast) == counted(config, dtype, autocast=autocast)


def test_a_chunked_loss_saves_no_logits(tiny_config: MakeConfig) -> None:
    whole = tiny_config(SMALL)
    tokens = 3 * whole.sequence_length
    chunked = tiny_config(SMALL | {"train.loss_chunk_tokens": tokens // 4})
    logits = 4 * tokens * whole.model.vocab_size
    assert saved_activations(whole, 4) - saved_activations(chunked, 4) == logits
    # At the peak there are the log-softmax, its gradient and that of the logits, of one chunk.
    assert activations(whole, 4) - saved_activations(whole, 4) == 2 * logits
    assert activations(chunked, 4) - saved_activations(chunked, 4) == 3 * logits // 4


def test_a_recomputed_layer_exists_once_in_the_backward_pass(tiny_config: MakeConfig) -> None:
    kept = tiny_config(SMALL)
    every = tiny_config(SMALL | {"train.activation_checkpointing": "full"})
    inputs = 4 * 3 * kept.sequence_length * kept.model.hidden_size * 4
    layer = (saved_activations(kept, 4) - saved_activations(every, 4) + inputs) // 4
    head = activations(kept, 4) - saved_activations(kept, 4)
    assert activations(every, 4) == saved_activations(every, 4) + layer + head
