"""The initial weights can be drawn one parameter at a time, by engines that never hold the whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from pretrain.config import Config
from pretrain.model.build import build_model, initial_weights
from tests.conftest import SPEEDRUN

MakeConfig = Callable[..., Config]

MODELS: dict[str, dict[str, Any]] = {
    "tied llama": {},
    "llama": {"model.tie_embeddings": False, "model.init_residual": "depth_scaled"},
    "llama, zero residual": {"model.init_residual": "zero"},
    "speedrun": {"model": SPEEDRUN},
    "speedrun, bf16 embedding": {"model": SPEEDRUN | {"embedding_dtype": "bf16"}},
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=list(MODELS))
def test_one_parameter_at_a_time_gives_the_weights_of_the_whole_model(
    changes: dict[str, Any], tiny_config: MakeConfig
) -> None:
    config = tiny_config(changes).model
    model, outline = build_model(config, seed=5), build_model(config, seed=5, device="meta")
    assert all(parameter.is_meta for parameter in outline.parameters())
    torch.manual_seed(1)  # not the state in which build_model would leave it
    before = torch.get_rng_state()
    drawn = dict(initial_weights(outline, config, seed=5))
    assert torch.equal(torch.get_rng_state(), before)
    assert list(drawn) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert drawn[name].dtype == torch.float32
        assert torch.equal(parameter, drawn[name].to(parameter.dtype)), name
    assert all(parameter.is_meta for parameter in outline.parameters())


@pytest.mark.parametrize("changes", MODELS.values(), ids=list(MODELS))
def test_only_one_parameter_is_in_memory(changes: dict[str, Any], tiny_config: MakeConfig) -> None:
    config = tiny_config(changes).model
    outline = build_model(config, seed=5, device="meta")
    drawn: list[torch.Size] = []
    normal, ones, zeros = torch.Tensor.normal_, torch.ones, torch.zeros

    def counted(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*arguments: Any, **options: Any) -> torch.Tensor:
            values = function(*arguments, **options)
            drawn.append(values.shape)
            return values

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "normal_", counted(normal))
        patch.setattr(torch, "ones", counted(ones))
        patch.setattr(torch, "zeros", counted(zeros))
        for number, (name, _) in enumerate(initial_weights(outline, config, seed=5), start=1):
            assert len(drawn) == number, name
    assert drawn == [parameter.shape for parameter in outline.parameters()]


def test_the_first_weights_are_the_first_draws_of_the_seed(tiny_config: MakeConfig) -> None:
    """The order of the draws decides every weight of a run that is yet to be repeated."""
    config = tiny_config({"model.init_std": 0.5}).model
    model = build_model(config, seed=9)
    generator = torch.Generator().manual_seed(9)
    layer = model.model.layers[0]
    for parameter in (model.model.embed_tokens.weight, layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
        assert torch.equal(parameter, torch.empty(parameter.shape).normal_(0.0, 0.5, generator=generator))
