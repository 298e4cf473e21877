"""Building a model of either architecture from its config section."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from pretrain.config.model import ModelConfig
from pretrain.model.llama import fill_llama_buffers, initial_llama_weights, llama_config
from pretrain.model.speedrun import SpeedrunModel

LanguageModel: TypeAlias = LlamaForCausalLM | SpeedrunModel


def build_model(config: ModelConfig, seed: int, device: str | torch.device = "cpu") -> LanguageModel:
    """Return a freshly initialised model with fp32 weights, except for an embedding that the config wants in bf16.

    The weights depend on `config` and `seed` alone, so every rank and every kind of device starts with the same ones.

    Args:
        config: the model section.
        seed: of the initial weights.
        device: where the model lives. On the meta device it has shapes but no weights; an engine whose ranks never
            hold the whole model starts from there, and takes its part of each of `initial_weights`.
    """
    with torch.device("meta"):
        speedrun = config.architecture == "speedrun"
        model = SpeedrunModel(config) if speedrun else LlamaForCausalLM(llama_config(config))
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    if isinstance(model, LlamaForCausalLM):
        model.tie_weights()  # to_empty has given each of the tied modules a weight of its own
        fill_llama_buffers(model, device)
    with torch.no_grad():
        for name, values in initial_weights(model, config, seed):
            model.get_parameter(name).copy_(values)
    return model


def initial_weights(model: LanguageModel, config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, fp32 values on the CPU) of each parameter, one after the other, without touching the model.

    All of them are drawn from one generator in the order of `model.named_parameters()`, so a caller that wants some
    must run through those before it; at any time only one parameter is in memory.

    Args:
        model: gives the names and shapes; may be on the meta device.
        config: the model section that it was built from.
        seed: as for `build_model`.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, SpeedrunModel):
        return model.initial_weights(generator)
    return initial_llama_weights(model, config, generator)
