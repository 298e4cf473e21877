"""The model, transformers' `LlamaForCausalLM` or our `SpeedrunModel`, built from our config, and its loss."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from pretrain.config.model import ModelConfig
from pretrain.config.train import TrainConfig
from pretrain.model.speedrun import SpeedrunModel

IGNORED = -100  # label of positions that are padding


def llama_config(config: ModelConfig) -> LlamaConfig:
    """The transformers config of our model section. Special token ids are the tokenizer's: the export sets them."""
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


def build_model(config: ModelConfig, seed: int, device: str | torch.device = "cpu") -> LlamaForCausalLM | SpeedrunModel:
    """A freshly initialised model with fp32 weights, but for an embedding that the config wants in bf16.

    The weights depend on `config` and `seed` alone: they are drawn on the CPU from a generator of their own,
    so every rank and every kind of device starts from the same ones. On the meta device nothing is drawn.
    """
    with torch.device("meta"):
        speedrun = config.architecture == "speedrun"
        model = SpeedrunModel(config) if speedrun else LlamaForCausalLM(llama_config(config))
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, SpeedrunModel):
        model.init_weights(generator)
        return model.to(device)
    model.tie_weights()
    _init_weights(model, config, generator)
    # to_empty() left the rotary buffers without values: they are not parameters, nothing else sets them.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model.to(device)


@torch.no_grad()
def _init_weights(model: LlamaForCausalLM, config: ModelConfig, generator: torch.Generator) -> None:
    """Norm gains 1; everything else normal, the writers into the residual stream by `init_residual`."""
    residual_std = {
        "same": config.init_std,
        "depth_scaled": config.init_std / math.sqrt(2 * config.num_layers),
        "zero": 0.0,
    }[config.init_residual]
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0)
            continue
        writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        parameter.normal_(0.0, residual_std if writes_residual else config.init_std, generator=generator)


class LossModel(nn.Module):
    """A causal language model with its summed loss as the output: what the engine wraps, compiles and calls.

    Args:
        model: the language model.
        train: for activation checkpointing and the size of the loss's chunks.
    """

    def __init__(self, model: LlamaForCausalLM | SpeedrunModel, train: TrainConfig) -> None:
        super().__init__()
        self.model = model
        self.chunk = train.loss_chunk_tokens
        every = train.activation_checkpointing
        if every != "none":
            model.activation_checkpointing_enable(every_n_layers=1 if every == "full" else every)

    def forward(
        self, inputs: Tensor, labels: Tensor, mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """Cross-entropy in nats, summed over the positions whose label is not `IGNORED`; fp32 scalar.

        Args:
            inputs: int64 token ids [batch, length].
            labels: int64 next tokens [batch, length].
            mask: bool attention mask [batch, 1, length, length], or None for plain causal attention.
            positions: int64 position ids [batch, length], or None for 0, 1, 2, ...
        """
        hidden, labels = self._hidden(inputs, mask, positions).flatten(0, 1), labels.flatten()
        if self.chunk is None or self.chunk >= len(labels):
            return self._loss(hidden, labels)
        # Each chunk's logits are recomputed in the backward pass instead of kept.
        parts = [
            checkpoint(self._loss, h, y, use_reentrant=False) if torch.is_grad_enabled() else self._loss(h, y)
            for h, y in zip(hidden.split(self.chunk), labels.split(self.chunk), strict=True)
        ]
        return torch.stack(parts).sum()

    def _hidden(self, inputs: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """What the head reads, [batch, length, hidden]."""
        if isinstance(self.model, SpeedrunModel):
            return self.model.hidden(inputs, mask, positions)
        return self.model.model(
            input_ids=inputs, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.model.lm_head(hidden)
        return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
