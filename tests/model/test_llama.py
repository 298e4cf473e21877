"""The model is a real Llama, built the same everywhere, and its optional paths compute the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pretrain.config import Config, load_config
from pretrain.model.build import build_model
from pretrain.model.cost import flops_per_token, parameter_count
from pretrain.model.loss import IGNORED, LossModel
from tests.counting.counters import Operators

MakeConfig = Callable[..., Config]
REPOSITORY = Path(__file__).parents[2]


def batch(vocabulary: int = 8192) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(vocabulary, (4, 33), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].clone()
    labels[2, 20:] = IGNORED
    return tokens[:, :-1], labels


def loss_and_gradients(config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    module = LossModel(build_model(config.model, seed=1), config.train)
    module.train()
    if config.train.compile:
        module.compile()
    loss = module(*batch())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def test_the_loss_is_the_summed_cross_entropy_of_the_models_logits(tiny_config: MakeConfig) -> None:
    config = tiny_config()
    model = build_model(config.model, seed=1)
    inputs, labels = batch()
    logits = model(input_ids=inputs).logits
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    loss = LossModel(model, config.train)(inputs, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"train.activation_checkpointing": "full"},
        {"train.activation_checkpointing": 2},
        {"train.loss_chunk_tokens": 24},
        {"train.loss_chunk_tokens": 64},
        {"train.loss_chunk_tokens": 50, "train.activation_checkpointing": "full"},
        pytest.param({"train.compile": True}, id="compile", marks=pytest.mark.long),
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False])
def test_an_optional_path_equals_the_plain_one(changes: dict[str, Any], tied: bool, tiny_config: MakeConfig) -> None:
    if changes.get("train.compile") and not tied:
        pytest.skip("compiling once is enough")
    plain_loss, plain = loss_and_gradients(tiny_config({"model.tie_embeddings": tied}))
    loss, gradients = loss_and_gradients(tiny_config({"model.tie_embeddings": tied, **changes}))
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == plain.keys()
    for name, expected in plain.items():
        distance = (gradients[name] - expected).norm() / expected.norm()
        assert distance <= 1e-6, (name, distance)


def test_checkpointing_every_nth_layer_checkpoints_those(tiny_config: MakeConfig) -> None:
    config = tiny_config({"model.num_layers": 5, "train.activation_checkpointing": 2})
    module = LossModel(build_model(config.model, seed=1), config.train)
    assert [layer.gradient_checkpointing for layer in module.model.model.layers] == [
        True,
        False,
        True,
        False,
        True,
    ]


def test_the_initial_weights_depend_on_the_seed_alone(tiny_config: MakeConfig) -> None:
    config = tiny_config().model
    torch.manual_seed(1)
    first = build_model(config, seed=5).state_dict()
    torch.manual_seed(2)
    again = build_model(config, seed=5).state_dict()
    other = build_model(config, seed=6).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


@pytest.mark.parametrize(("kind", "std"), [("same", 0.02), ("depth_scaled", 0.01), ("zero", 0.0)])
def test_residual_writers_are_initialised_as_asked(kind: str, std: float, tiny_config: MakeConfig) -> None:
    config = tiny_config({"model.init_residual": kind, "model.hidden_size": 256, "model.intermediate_size": 256}).model
    layer = build_model(config, seed=1).model.layers[0]
    assert layer.self_attn.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer.mlp.down_proj.weight.std().item() == pytest.approx(std, rel=0.05)
    assert layer.self_attn.o_proj.weight.std().item() == pytest.approx(std, rel=0.05)
    assert (layer.input_layernorm.weight == 1).all()


def test_rotary_buffers_survive_the_meta_device(tiny_config: MakeConfig) -> None:
    config = tiny_config({"model.rope_theta": 50_000.0}).model
    model = build_model(config, seed=1)
    half = config.hidden_size // config.num_heads // 2
    expected = 50_000.0 ** (-torch.arange(half, dtype=torch.float32) / half)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)


@pytest.mark.parametrize("name", ["quickstart", "aurora-1.1b"])
def test_the_shipped_configs_build_with_the_counted_parameters(name: str) -> None:
    config = load_config(REPOSITORY / "configs" / f"{name}.yaml")
    model = build_model(config.model, seed=1, device="meta")
    counts = parameter_count(config.model)
    assert sum(p.numel() for p in model.parameters()) == counts["total"]
    inner = counts["blocks"] + counts["norms"]
    assert inner == pytest.approx({"quickstart": 4.2e6, "aurora-1.1b": 1.095e9}[name], rel=0.01)


def test_a_forward_pass_reads_nothing_back_from_the_device(tiny_config: MakeConfig) -> None:
    """Each value that Python asks for makes the host wait for all that it has launched on a GPU."""
    config = tiny_config()
    module = LossModel(build_model(config.model, seed=1), config.train)
    inputs, labels = batch()
    with Operators("_local_scalar_dense", "nonzero") as operators:
        module(inputs, labels).backward()
    assert operators.calls == []


@pytest.mark.parametrize("tied", [True, False])
def test_flops_per_token_are_those_of_the_matrix_products(tied: bool, tiny_config: MakeConfig) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    config = tiny_config({"model.tie_embeddings": tied})
    module = LossModel(build_model(config.model, seed=1), config.train)
    # Eager attention computes all scores, causal or not: twice the causal count that we report.
    module.model.set_attn_implementation("eager")
    inputs, labels = batch()
    with FlopCounterMode(display=False) as counter:
        module(inputs, labels).backward()
    attention = 6 * config.model.num_layers * config.model.hidden_size * 32
    assert counter.get_total_flops() / inputs.numel() == flops_per_token(config.model, 32) + attention
