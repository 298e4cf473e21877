"""The loss of a language model, as the one module that an engine wraps, compiles and calls."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pretrain.config.train import TrainConfig
from pretrain.model.attention import TRANSFORMERS_NAME, AttentionMask
from pretrain.model.build import LanguageModel
from pretrain.model.speedrun import SpeedrunModel

IGNORED = -100
"""Label of positions that do not count, such as padding."""


class LossModel(nn.Module):
    """A causal language model whose output is its summed loss.

    Args:
        model: the language model; its activation checkpointing is switched on here, and the masks that it understands.
        train: sets activation checkpointing and the chunk size of the loss.
    """

    def __init__(self, model: LanguageModel, train: TrainConfig) -> None:
        super().__init__()
        self.model = model
        if not isinstance(model, SpeedrunModel):
            model.set_attn_implementation(TRANSFORMERS_NAME)  # knows every kind of mask
        self.chunk = train.loss_chunk_tokens
        every = train.activation_checkpointing
        if every != "none":
            model.activation_checkpointing_enable(every_n_layers=1 if every == "full" else every)

    def forward(
        self, inputs: Tensor, labels: Tensor, mask: AttentionMask = None, positions: Tensor | None = None
    ) -> Tensor:
        """Return the cross-entropy in nats, summed over the positions whose label is not `IGNORED`; fp32 scalar.

        Args:
            inputs: int64 token ids [batch, length].
            labels: int64 next tokens [batch, length].
            mask: see `AttentionMask`; None for plain causal attention.
            positions: int64 position ids [batch, length], or None for 0, 1, 2, ...
        """
        hidden, labels = self._hidden(inputs, mask, positions).flatten(0, 1), labels.flatten()
        if self.chunk is None or self.chunk >= len(labels):
            return self._loss(hidden, labels)
        # The logits of each chunk are recomputed in the backward pass and not kept.
        parts = [
            checkpoint(self._loss, h, y, use_reentrant=False) if torch.is_grad_enabled() else self._loss(h, y)
            for h, y in zip(hidden.split(self.chunk), labels.split(self.chunk), strict=True)
        ]
        return torch.stack(parts).sum()

    def _hidden(self, inputs: Tensor, mask: AttentionMask, positions: Tensor | None) -> Tensor:
        """Return the input of the head, [batch, length, hidden]."""
        if isinstance(self.model, SpeedrunModel):
            return self.model.hidden(inputs, mask, positions)
        return self.model.model(
            input_ids=inputs, attention_mask=mask, position_ids=positions, use_cache=False
        ).last_hidden_state

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        logits = self.model.lm_head(hidden)
        return F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
