"""Parameters and FLOPs, against the model itself and against a published yardstick."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import Config, load_config
from pretrain.model.build import build_model
from pretrain.model.cost import flops_per_token, parameter_count
from pretrain.model.loss import LossModel
from tests.conftest import REPOSITORY

MakeConfig = Callable[..., Config]


def test_the_1_1b_costs_what_the_yardstick_says() -> None:
    config = load_config(REPOSITORY / "configs" / "aurora-1.1b.yaml")
    assert flops_per_token(config.model, 2048) == pytest.approx(7.7e9, rel=0.02)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_of_weights_are_those_that_torch_counts(tiny_config: MakeConfig, tied: bool) -> None:
    """Six for each weight that is multiplied, whatever the grouping of heads; attention is another matter."""
    changes: dict[str, Any] = {"model.tie_embeddings": tied, "model.num_layers": 3, "model.intermediate_size": 96}
    config = tiny_config(changes)
    module = LossModel(build_model(config.model, 0), config.train)
    tokens = torch.zeros(2, config.sequence_length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        module(tokens, tokens).backward()
    products = sum(flops for op, flops in counter.get_flop_counts()["Global"].items() if op is torch.ops.aten.mm)
    attention = flops_per_token(config.model, 1000) - flops_per_token(config.model, 0)
    assert attention == 6 * 3 * config.model.hidden_size * 1000
    assert products == flops_per_token(config.model, 0) * tokens.numel()


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_those_of_the_model(tiny_config: MakeConfig, tied: bool) -> None:
    config = tiny_config({"model.tie_embeddings": tied})
    model = build_model(config.model, 0, device="meta")
    assert parameter_count(config.model)["total"] == sum(p.numel() for p in model.parameters())
