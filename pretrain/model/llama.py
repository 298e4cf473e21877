"""The `llama` architecture: transformers' `LlamaForCausalLM`, with our initialisation."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pretrain.config.model import ModelConfig


def llama_config(config: ModelConfig) -> LlamaConfig:
    """Return the transformers config of a model section.

    It has no special token ids: those belong to the tokenizer, and the export adds them.
    """
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.context_length,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
        rms_norm_eps=config.norm_eps,
        initializer_range=config.init_std,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        use_cache=False,
        attn_implementation="sdpa",
    )


def initial_llama_weights(
    model: LlamaForCausalLM, config: ModelConfig, generator: torch.Generator
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, fp32 values on the CPU) of each parameter; see `pretrain.model.build.initial_weights`.

    Norm gains are 1, everything else is normal. `init_residual` sets the standard deviation of the matrices that write
    into the residual stream.
    """
    residual_std = {
        "same": config.init_std,
        "depth_scaled": config.init_std / math.sqrt(2 * config.num_layers),
        "zero": 0.0,
    }[config.init_residual]
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            yield name, torch.ones(parameter.shape)
            continue
        std = residual_std if name.endswith(("o_proj.weight", "down_proj.weight")) else config.init_std
        yield name, torch.empty(parameter.shape).normal_(0.0, std, generator=generator)


def fill_llama_buffers(model: LlamaForCausalLM, device: str | torch.device) -> None:
    """Compute the rotary frequencies, which have no values after `to_empty` and are not parameters."""
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config).to(device)
