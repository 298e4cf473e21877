"""The model of the modded-nanoGPT optimization track (record of 3,175 steps, Aurora with Contra-Muon and u/w floor).

It differs from Llama in its MLP (two matrices with ReLU^2 between them), biases on all linear layers, RMSNorm after the
embedding and on queries and keys, rotary positions on half of the dimensions of a head, a fixed attention scale, and
logits that saturate. Modules and parameters that Llama has too have Llama's names.

Shapes: B sequences of T tokens, width h, H heads of d = h / H dimensions, a vocabulary of V entries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pretrain.config.model import ModelConfig
from pretrain.model.attention import AttentionMask, attend

ATTENTION_SCALE = 0.12
"""Factor of the attention scores; not the usual 1/sqrt(d), since queries and keys have norm sqrt(d)."""

LOGIT_CAP = 15.0
"""Bound on the absolute value of a logit."""

INIT_VARIANCE = 0.33
"""Variance of an initial weight times its fan-in; close to the 1/3 of torch's linear layer, but normal."""

_EMBEDDING_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Embedding(nn.Embedding):
    """Token ids [B, T] to vectors [B, T, h] in fp32, or under autocast in the dtype of the weight.

    That dtype becomes the dtype of the residual stream. The look-up always uses an fp32 copy of the weight: its
    backward pass sums the gradients of all occurrences of a token, and on a CPU a sum in bf16 stops growing long before
    the thousands of occurrences of a frequent token have been added.
    """

    def forward(self, ids: Tensor) -> Tensor:
        """[B, T] to [B, T, h]."""
        vectors = F.embedding(ids, self.weight.float())
        return vectors.to(self.weight.dtype) if torch.is_autocast_enabled(ids.device.type) else vectors


class RMSNorm(nn.RMSNorm):
    """RMSNorm with gain, computed in fp32, in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] to [..., h]."""
        return F.rms_norm(x.float(), self.normalized_shape, self.weight, self.eps).type_as(x)


class SoftcappedHead(nn.Linear):
    """Hidden states [..., h] to logits c z / sqrt(z^2 + c^2) [..., V] in fp32, with z = W x + b and c = `LOGIT_CAP`."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., h] to [..., V]."""
        z = super().forward(hidden).float()
        return LOGIT_CAP * z * torch.rsqrt(z.square() + LOGIT_CAP**2)


def rotation(positions: Tensor, head_size: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [..., 1, T, d/2] in fp32 of positions [..., T], for `rotate`.

    The first d/4 of the d/2 pairs turn by base^(-i / (d/4 - 1)) radians per position, i = 0 .. d/4 - 1, so from 1 to
    1/base. The others do not turn ("half-truncated").
    """
    turning = head_size // 4
    exponents = torch.linspace(0, 1, turning, dtype=torch.float32, device=positions.device)
    frequencies = F.pad(base**-exponents, (0, head_size // 2 - turning))
    angles = positions.float()[..., None, :, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn heads [B, H, T, d] by the angles of `rotation`; pair i consists of the dimensions i and i + d/2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


class Attention(nn.Module):
    """Causal multi-head attention with gain-free RMSNorm on queries and keys."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads, self.eps = config.num_heads, config.norm_eps
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask) -> Tensor:
        """[B, T, h] to [B, T, h]; see `AttentionMask`."""
        q, k, v = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (rotate(F.rms_norm(z.float(), z.shape[-1:], eps=self.eps), cos, sin).type_as(v) for z in (q, k))
        mixed = attend(q, k, v, mask, ATTENTION_SCALE)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, h] to [B, H, T, d]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


class Mlp(nn.Module):
    """down(relu(up(x))^2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, h] to [B, T, h]."""
        return self.down_proj(self.up_proj(x).relu().square())


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask) -> Tensor:
        """[B, T, h] to [B, T, h]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """Everything below the head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_size, self.rope_theta = config.hidden_size // config.num_heads, config.rope_theta
        dtype = _EMBEDDING_DTYPES[config.embedding_dtype]
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, dtype=dtype)
        self.embed_norm = RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.recompute_every = 0  # every n-th layer recomputes its activations in the backward pass; 0: none does
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, ids: Tensor, mask: AttentionMask = None, positions: Tensor | None = None) -> Tensor:
        """Return the input of the head, [B, T, h]; the arguments are those of `SpeedrunModel.hidden`."""
        if positions is None:
            positions = torch.arange(ids.shape[-1], device=ids.device)
        cos, sin = rotation(positions, self.head_size, self.rope_theta)
        x = self.embed_norm(self.embed_tokens(ids))
        recompute = self.recompute_every if torch.is_grad_enabled() else 0
        for index, layer in enumerate(self.layers):
            if recompute and index % recompute == 0:
                x = checkpoint(layer, x, cos, sin, mask, use_reentrant=False)
            else:
                x = layer(x, cos, sin, mask)
        return self.norm(x)


class SpeedrunModel(nn.Module):
    """The whole model. Its weights are not initialised; see `pretrain.model.build.build_model`.

    It can only be trained and validated: it has no key-value cache for generating text and no Hugging Face counterpart
    to export to.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.model = Trunk(config)
        self.lm_head = SoftcappedHead(config.hidden_size, config.vocab_size)

    def hidden(self, ids: Tensor, mask: AttentionMask = None, positions: Tensor | None = None) -> Tensor:
        """Return the input of `lm_head`, [B, T, h].

        Args:
            ids: int64 [B, T].
            mask: see `AttentionMask`; None for plain causal attention.
            positions: int64 [B, T]; None for 0, 1, 2, ...
        """
        return self.model(ids, mask, positions)

    def forward(self, ids: Tensor, mask: AttentionMask = None, positions: Tensor | None = None) -> Tensor:
        """Return logits [B, T, V] in fp32; the arguments are those of `hidden`."""
        return self.lm_head(self.hidden(ids, mask, positions))

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding, for the routing of parameters."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """Return the head, for the routing of parameters."""
        return self.lm_head

    def activation_checkpointing_enable(self, every_n_layers: int) -> None:
        """Recompute the activations of layers 0, n, 2n, ... in the backward pass, like the models of transformers."""
        self.model.recompute_every = every_n_layers

    def initial_weights(self, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, fp32 values on the CPU) of each parameter; see `pretrain.model.build.initial_weights`.

        Gains are 1, biases 0, the embedding N(0, 1); the matrices that write into the residual stream and the head are
        0, the others N(0, 0.33 / fan-in).
        """
        for name, parameter in self.named_parameters():
            shape = parameter.shape
            if parameter.ndim == 1:
                yield name, torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
            elif name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                yield name, torch.zeros(shape)
            else:
                embeds = parameter is self.model.embed_tokens.weight
                std = 1.0 if embeds else math.sqrt(INIT_VARIANCE / shape[1])
                yield name, torch.empty(shape).normal_(0.0, std, generator=generator)
