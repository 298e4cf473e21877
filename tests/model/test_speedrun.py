"""The speedrun model computes what its source says, in every way that a run may ask for."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from optimizers import routes
from pretrain.config import Config, ConfigError
from pretrain.data.masks import attention_inputs
from pretrain.model.build import build_model
from pretrain.model.cost import flops_per_token, parameter_count
from pretrain.model.loss import IGNORED, LossModel
from pretrain.model.speedrun import SpeedrunModel
from tests.conftest import SPEEDRUN

MakeConfig = Callable[..., Config]


@pytest.fixture
def speedrun(tiny_config: MakeConfig) -> MakeConfig:
    """Builds a small config of the architecture."""
    return lambda changes=None: tiny_config({"model": SPEEDRUN, **(changes or {})})


def scrambled(config: Config) -> SpeedrunModel:
    """A model without a single zero: as it is initialised, blocks and head would hide most faults."""
    model = build_model(config.model, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.empty(parameter.shape).normal_(0.0, 0.3, generator=generator)
            parameter.copy_(parameter + noise)
    return model


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(8192, (4, 33), generator=torch.Generator().manual_seed(0))
    labels = tokens[:, 1:].clone()
    labels[2, 20:] = IGNORED
    return tokens[:, :-1], labels


# ---- A second implementation, one sequence, one head, one query and one pair of dimensions at a time, in fp64.


def rms(x: Tensor, eps: float) -> Tensor:
    return x / math.sqrt(float((x * x).mean()) + eps)


def turned(head: Tensor, position: int) -> Tensor:
    """`head` [d] with its first d/4 pairs (i, i + d/2) turned, by 1 radian a position to 1/1024."""
    size, result = len(head), head.clone()
    for i in range(size // 4):
        angle = position * 1024.0 ** (-i / (size // 4 - 1))
        a, b = float(head[i]), float(head[i + size // 2])
        result[i] = a * math.cos(angle) + b * math.sin(angle)
        result[i + size // 2] = b * math.cos(angle) - a * math.sin(angle)
    return result


def attention(w: dict[str, Tensor], prefix: str, x: Tensor, config: Config, allowed: Tensor, at: list[int]) -> Tensor:
    def linear(name: str) -> Tensor:
        return x @ w[f"{prefix}.{name}.weight"].T + w[f"{prefix}.{name}.bias"]

    q, k, v = linear("q_proj"), linear("k_proj"), linear("v_proj")
    size, eps = config.model.hidden_size // config.model.num_heads, config.model.norm_eps
    rows = []
    for query in range(len(x)):
        heads = []
        for head in range(config.model.num_heads):
            part = slice(head * size, (head + 1) * size)
            seen = [key for key in range(len(x)) if allowed[query, key]]
            turned_q = turned(rms(q[query, part], eps), at[query])
            scores = [0.12 * float(turned_q @ turned(rms(k[key, part], eps), at[key])) for key in seen]
            weights = [math.exp(score - max(scores)) for score in scores]
            heads.append(sum(p / sum(weights) * v[key, part] for p, key in zip(weights, seen, strict=True)))
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ w[f"{prefix}.o_proj.weight"].T + w[f"{prefix}.o_proj.bias"]


def oracle(model: SpeedrunModel, config: Config, ids: Tensor, allowed: Tensor, at: list[int]) -> Tensor:
    """Logits [T, V] of one sequence; `allowed` [T, T] says what each query sees, `at` are the positions."""
    w = {name: parameter.detach().double() for name, parameter in model.named_parameters()}

    def norm(x: Tensor, name: str) -> Tensor:
        return torch.stack([rms(row, config.model.norm_eps) for row in x]) * w[f"{name}.weight"]

    x = norm(w["model.embed_tokens.weight"][ids], "model.embed_norm")
    for layer in range(config.model.num_layers):
        name = f"model.layers.{layer}"
        x = x + attention(w, f"{name}.self_attn", norm(x, f"{name}.input_layernorm"), config, allowed, at)
        inner = norm(x, f"{name}.post_attention_layernorm") @ w[f"{name}.mlp.up_proj.weight"].T
        inner = (inner + w[f"{name}.mlp.up_proj.bias"]).clamp(min=0) ** 2
        x = x + inner @ w[f"{name}.mlp.down_proj.weight"].T + w[f"{name}.mlp.down_proj.bias"]
    z = norm(x, "model.norm") @ w["lm_head.weight"].T + w["lm_head.bias"]
    return 15 * z / (z**2 + 225).sqrt()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("reset_positions", [False, True])
def test_the_logits_are_those_of_a_plain_implementation(
    dtype: str, document_mask: bool, reset_positions: bool, speedrun: MakeConfig
) -> None:
    config = speedrun({"model.embedding_dtype": dtype})
    model = scrambled(config)
    ids = torch.tensor([[5, 7, 0, 11, 13, 17, 0, 19, 23, 29], [31, 37, 41, 43, 0, 47, 53, 59, 61, 67]])
    masks = attention_inputs(ids, 0, document_mask=document_mask, reset_positions=reset_positions)
    with torch.no_grad():
        found = model(ids, *masks)
    for row, sequence in enumerate(ids.tolist()):
        starts = [max([0, *(i + 1 for i in range(t) if sequence[i] == 0)]) for t in range(10)]
        at = [t - start if reset_positions else t for t, start in enumerate(starts)]
        allowed = torch.ones(10, 10).tril().bool()
        if document_mask:
            allowed &= torch.tensor(starts)[:, None] == torch.tensor(starts)[None, :]
        expected = oracle(model, config, ids[row], allowed, at)
        torch.testing.assert_close(found[row].double(), expected, rtol=0, atol=1e-5)


def test_the_loss_is_the_summed_cross_entropy_of_the_logits(speedrun: MakeConfig) -> None:
    config = speedrun()
    model, (inputs, labels) = scrambled(config), batch()
    expected = F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    loss = LossModel(model, config.train)(inputs, labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_it_starts_as_the_recipe_says(speedrun: MakeConfig) -> None:
    changes = {"model.hidden_size": 128, "model.intermediate_size": 512}
    config = speedrun(changes)
    model = build_model(config.model, seed=1)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "o_proj.weight", "down_proj.weight", "lm_head.weight")):
            assert (parameter == 0).all(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        elif "embed_tokens" in name:
            assert parameter.std().item() == pytest.approx(1, rel=0.01)
        else:
            assert parameter.std().item() == pytest.approx(math.sqrt(0.33 / 128), rel=0.02), name
    inputs, labels = batch()
    loss = LossModel(model, config.train)(inputs, labels)
    assert loss.item() / (labels != IGNORED).sum() == pytest.approx(math.log(8192))

    again = build_model(speedrun({**changes, "model.embedding_dtype": "bf16"}).model, seed=1)
    for name, parameter in model.named_parameters():
        assert torch.equal(again.get_parameter(name), parameter.bfloat16() if "embed_tokens" in name else parameter)
    assert {p.dtype for p in again.parameters()} == {torch.float32, torch.bfloat16}


def loss_and_gradients(config: Config, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    module = LossModel(scrambled(config), config.train)
    if config.train.compile:
        module.compile()
    inputs, labels = batch()
    masks = attention_inputs(inputs, 17, document_mask=True, reset_positions=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = module(inputs, labels, *masks)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in module.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "changes",
    [
        {"train.activation_checkpointing": "full"},
        {"train.activation_checkpointing": 2},
        {"train.loss_chunk_tokens": 24},
        {"train.loss_chunk_tokens": 50, "train.activation_checkpointing": "full"},
        pytest.param({"train.compile": True}, id="compile", marks=pytest.mark.long),
    ],
    ids=str,
)
def test_an_optional_path_equals_the_plain_one(changes: dict[str, Any], speedrun: MakeConfig) -> None:
    plain_loss, plain = loss_and_gradients(speedrun())
    loss, gradients = loss_and_gradients(speedrun(changes))
    torch.testing.assert_close(loss, plain_loss, rtol=1e-6, atol=0)
    assert gradients.keys() == plain.keys()
    assert len(plain) == len(list(scrambled(speedrun()).parameters()))
    for name, expected in plain.items():
        distance = (gradients[name] - expected).norm() / expected.norm()
        # A bias of the keys moves all scores of a query alike, but for the norm: its gradient is nearly 0.
        assert distance <= (1e-4 if "k_proj.bias" in name else 2e-6), (name, distance)


def test_checkpointing_every_nth_layer_runs_those_twice(speedrun: MakeConfig) -> None:
    config = speedrun({"model.num_layers": 5, "train.activation_checkpointing": 2})
    module = LossModel(scrambled(config), config.train)
    runs = [0] * 5
    for index, layer in enumerate(module.model.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: runs.__setitem__(index, runs[index] + 1))
    with torch.no_grad():
        module(*batch())
    assert runs == [1, 1, 1, 1, 1]
    module(*batch()).backward()
    assert runs == [3, 2, 3, 2, 3]


def test_under_autocast_the_residual_stream_has_the_dtype_of_the_embedding(speedrun: MakeConfig) -> None:
    exact, _ = loss_and_gradients(speedrun())
    for setting, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        config = speedrun({"model.embedding_dtype": setting})
        model, inputs = scrambled(config), batch()[0]
        assert model.hidden(inputs).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert model.hidden(inputs).dtype == dtype
            assert model(inputs).dtype == torch.float32
        rounded, gradients = loss_and_gradients(config, autocast=True)
        assert rounded.item() == pytest.approx(exact.item(), rel=0.02)
        assert gradients["model.embed_tokens.weight"].dtype == dtype


def test_the_gradient_of_a_frequent_token_is_not_lost_to_bf16(speedrun: MakeConfig) -> None:
    """Adding 0.1 to a bf16 number ends at 32 (on a CPU, where torch adds up in the dtype of the weight)."""
    embed = build_model(speedrun({"model.embedding_dtype": "bf16"}).model, seed=1).model.embed_tokens
    embed(torch.zeros(1, 4096, dtype=torch.int64)).mul(0.1).sum().backward()
    torch.testing.assert_close(embed.weight.grad[0].float(), torch.full((32,), 409.6), rtol=2**-8, atol=0)
    assert (embed.weight.grad[1:] == 0).all()


def test_parameters_and_flops_are_those_of_the_module(speedrun: MakeConfig) -> None:
    config = speedrun()
    module = LossModel(build_model(config.model, seed=1), config.train)
    counts = parameter_count(config.model)
    parts = {"embedding": 0, "head": 0, "blocks": 0, "biases": 0, "norms": 0}
    for name, parameter in module.model.named_parameters():
        part = (
            "embedding" if "embed_tokens" in name
            else "head" if "lm_head" in name
            else "norms" if "norm" in name
            else "biases" if "bias" in name
            else "blocks"
        )  # fmt: skip
        parts[part] += parameter.numel()
    assert counts == {**parts, "total": sum(parts.values())}

    inputs, labels = batch()
    # A mask keeps SDPA to its plain kernel, which computes all scores: twice the causal count that we report.
    mask = torch.ones(32, 32).tril().bool().expand(4, 1, 32, 32)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        module(inputs, labels, mask).backward()
    attention_twice = 6 * config.model.num_layers * config.model.hidden_size * 32
    assert counter.get_total_flops() / inputs.numel() == flops_per_token(config.model, 32) + attention_twice


def test_every_parameter_goes_to_the_optimizer_that_the_recipe_names(speedrun: MakeConfig) -> None:
    config = speedrun({"optimizer.scope": "all"})
    rows = {row.name: row for row in routes(build_model(config.model, 0, "meta"), config.optimizer.settings())}
    for name, row in rows.items():
        if name == "model.embed_tokens.weight":
            assert (row.optimizer, row.role) == ("adamw", "embedding")
        elif name == "lm_head.weight":
            assert (row.optimizer, row.role) == ("adamw", "head")
        elif name.endswith(("bias", "norm.weight")):
            assert (row.optimizer, row.role) == ("adamw", "vector"), name
        else:
            direction = "aurora" if "mlp" in name else "muon"
            assert (row.optimizer, row.direction) == ("matrix", direction), name
    assert sum(row.optimizer == "matrix" for row in rows.values()) == 6 * config.model.num_layers


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"samples.every_steps": 5}, ("samples.every_steps", "expected null", "speedrun", "got 5")),
        ({"model.num_kv_heads": 1}, ("model.num_kv_heads", "expected num_heads (2)", "got 1")),
        ({"model.num_heads": 16, "model.num_kv_heads": 16}, ("model.num_heads", "multiple of 4", "32 / 16 = 2")),
        ({"model.tie_embeddings": True}, ("model.tie_embeddings", "has no effect")),
        ({"model.init_std": 0.02}, ("model.init_std", "has no effect")),
        ({"model.init_residual": "zero"}, ("model.init_residual", "has no effect")),
        ({"model.embedding_dtype": "fp16"}, ("model.embedding_dtype", "fp16")),
        ({"model.architecture": "gpt"}, ("model.architecture", "'llama' or 'speedrun'")),
    ],
    ids=str,
)
def test_what_the_architecture_cannot_do_is_refused_by_name(
    changes: dict[str, Any], parts: tuple[str, ...], speedrun: MakeConfig
) -> None:
    with pytest.raises(ConfigError) as caught:
        speedrun(changes)
    (problem,) = caught.value.problems
    for part in parts:
        assert part in problem


def test_a_llama_has_the_keys_and_the_identity_that_it_always_had(tiny_config: MakeConfig) -> None:
    before = {
        "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads",
        "context_length", "rope_theta", "tie_embeddings", "norm_eps", "init_std", "init_residual",
    }  # fmt: skip
    config = tiny_config()
    assert {key.removeprefix("model.") for key in config.keys_of("result") if key.startswith("model.")} == before
    assert set(config.resolved()["model"]) == before
    said = tiny_config({"model.architecture": "llama"})
    assert said.keys_of("result") == config.keys_of("result")
    with pytest.raises(ConfigError, match=r"model\.embedding_dtype: has no effect"):
        tiny_config({"model.embedding_dtype": "bf16"})


def test_the_architecture_and_the_dtype_are_part_of_the_identity(speedrun: MakeConfig) -> None:
    identity = speedrun().keys_of("result")
    assert identity["model.architecture"] == "speedrun"
    assert identity["model.embedding_dtype"] == "fp32"
    assert identity != speedrun({"model.embedding_dtype": "bf16"}).keys_of("result")
