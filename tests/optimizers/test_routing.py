from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from optimizers import Aurora, Route, Settings, param_groups, routes


def llama(tied: bool, device: str = "cpu") -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    with torch.device(device):
        return LlamaForCausalLM(config)


class Block(nn.Module):
    """A model that transformers knows nothing of, with every kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)
        self.positions = nn.Embedding(6, 4)
        self.up = nn.Linear(4, 8)
        self.down = nn.Linear(8, 4, bias=False)
        self.norm = nn.LayerNorm((6, 4))
        self.filter = nn.Conv1d(4, 4, 3)
        self.mix = nn.Parameter(torch.randn(4, 4))


def by_name(rows: list[Route]) -> dict[str, Route]:
    return {row.name: row for row in rows}


@pytest.mark.parametrize("tied", [True, False])
def test_llama_is_routed_by_identity(tied: bool) -> None:
    model = llama(tied)
    rows = by_name(routes(model, Settings()))
    assert rows.keys() == {name for name, _ in model.named_parameters()}
    layer = "model.layers.0."
    assert rows[f"{layer}mlp.gate_proj.weight"] == Route(
        f"{layer}mlp.gate_proj.weight", (48, 16), "tall", "matrix", "aurora", 3**0.5, "2-D weight"
    )
    down = rows[f"{layer}mlp.down_proj.weight"]
    assert (down.form, down.direction, down.lr_scale) == ("wide", "muon", 1.0)
    query = rows[f"{layer}self_attn.q_proj.weight"]
    assert (query.form, query.optimizer, query.direction) == ("square", "matrix", "muon")
    norm = rows[f"{layer}input_layernorm.weight"]
    assert (norm.form, norm.optimizer, norm.lr_scale, norm.why) == ("none", "adamw", None, "not 2-D")
    embedding = rows["model.embed_tokens.weight"]
    assert embedding.optimizer == "adamw"
    assert ("lm_head.weight" in rows) != tied
    if tied:
        assert embedding.why == "embedding, tied to the output head"
    else:
        assert rows["lm_head.weight"].optimizer == "adamw"
        assert rows["lm_head.weight"].why == "output head"
        assert embedding.why == "embedding"


@pytest.mark.parametrize("tied", [True, False])
def test_groups_hold_every_parameter_once_and_all_matrices_in_one(tied: bool) -> None:
    model = llama(tied)
    groups = param_groups(model, Settings(matrix={"lr": 0.05}, adamw={"weight_decay": 0.1}))
    head = [] if tied else ["head"]
    assert [(group["kind"], group["role"]) for group in groups] == [
        ("matrix", "hidden"),
        *(("adamw", role) for role in ("embedding", *head, "vector")),
    ]
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1, *(0.1 for _ in head), 0.0]
    listed = [p for group in groups for p in group["params"]]
    assert {id(p) for p in listed} == {id(p) for p in model.parameters()}
    assert len(listed) == len(list(model.parameters()))
    names = dict(model.named_parameters())
    for group in groups:
        assert [names[name] is p for name, p in zip(group["param_names"], group["params"], strict=True)]
    optimizer = Aurora(groups)
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert optimizer.param_groups[0]["direction"] == "aurora"


def test_the_table_says_what_the_scope_does() -> None:
    model = llama(True)
    name = "model.layers.0.mlp.{}_proj.weight"
    for scope, tall, wide in (("tall", "aurora", "muon"), ("wide", "muon", "aurora"), ("all", "aurora", "aurora")):
        rows = by_name(routes(model, Settings(matrix={"scope": scope, "lr_scale": "spectral"})))
        assert (rows[name.format("up")].direction, rows[name.format("down")].direction) == (tall, wide)
        assert rows[name.format("down")].lr_scale == pytest.approx((16 / 48) ** 0.5)
    rows = by_name(routes(model, Settings(name="muon")))
    assert rows[name.format("up")].direction == "muon"


def test_other_models_are_routed_by_their_modules() -> None:
    rows = by_name(routes(Block(), Settings()))
    assert {name for name, row in rows.items() if row.optimizer == "matrix"} == {"up.weight", "down.weight", "mix"}
    assert rows["positions.weight"].why == "embedding"
    assert rows["up.bias"].why == "bias"
    assert rows["norm.weight"].why == "norm gain"
    assert rows["norm.bias"].why == "bias"
    assert rows["filter.weight"].why == "not 2-D"


def test_wrapped_models_are_routed_alike() -> None:
    model = llama(False)
    plain = routes(model, Settings())
    wrapped = routes(nn.ModuleDict({"module": model}), Settings())
    assert [(row.name, row.why) for row in wrapped] == [(f"module.{row.name}", row.why) for row in plain]


def test_the_meta_device_is_enough() -> None:
    assert routes(llama(True, "meta"), Settings()) == routes(llama(True), Settings())


def test_overrides_win_in_both_directions() -> None:
    model = llama(False)
    overrides: dict[str, Any] = {r"layers\.1\.self_attn": "adamw", r"^lm_head": "matrix"}
    rows = by_name(routes(model, Settings(overrides=overrides)))
    assert rows["lm_head.weight"].optimizer == "matrix"
    assert rows["lm_head.weight"].why == "override '^lm_head'"
    assert rows["model.layers.1.self_attn.q_proj.weight"].optimizer == "adamw"
    assert rows["model.layers.0.self_attn.q_proj.weight"].optimizer == "matrix"


def test_an_override_finds_a_tied_parameter_under_any_of_its_names() -> None:
    rows = by_name(routes(llama(True), Settings(overrides={"lm_head": "matrix"})))
    assert rows["model.embed_tokens.weight"].optimizer == "matrix"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"no_such_layer": "adamw"}, "'no_such_layer' matches no parameter"),
        ({"(": "adamw"}, "not a regular expression"),
        ({"q_proj": "adam"}, "is 'adam'"),
        ({"q_proj": "adamw", "layers.0": "matrix"}, "contradict"),
        ({"input_layernorm": "matrix"}, "expected 2-D"),
        ({"proj": "adamw"}, "found no matrix"),
    ],
)
def test_bad_overrides_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(llama(True), Settings(overrides=overrides))


@pytest.mark.parametrize("name", ["aurora", "muon"])
def test_a_matrix_optimizer_without_a_matrix_is_an_error_and_no_silent_adamw(name: Any) -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3))
    with pytest.raises(ValueError, match="found no matrix"):
        param_groups(model, Settings(name=name))


@pytest.mark.parametrize("shape", [(48 * 16,), (0,)])
def test_a_flattened_matrix_is_an_error_and_no_silent_adamw(shape: tuple[int, ...]) -> None:
    model = llama(True)
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight.*flattened"):
        param_groups(model, Settings())


def test_adamw_takes_everything_when_asked() -> None:
    model = llama(True)
    rows = routes(model, Settings(name="adamw"))
    assert {row.optimizer for row in rows} == {"adamw"}
    groups = param_groups(model, Settings(name="adamw", adamw={"lr": 0.01, "weight_decay": 0.1}))
    assert [(group["kind"], group["role"]) for group in groups] == [
        ("adamw", "embedding"),
        ("adamw", "hidden"),
        ("adamw", "vector"),
    ]
    assert all(p.ndim == 2 for group in groups[:2] for p in group["params"])
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0]
    Aurora(groups)
    with pytest.raises(ValueError, match="no effect with optimizer 'adamw': momentum, preset"):
        param_groups(model, Settings(name="adamw", matrix={"momentum": 0.9}, preset="released"))


def test_frozen_parameters_are_listed_and_left_out() -> None:
    model = llama(True)
    model.model.layers[0].requires_grad_(False)
    rows = routes(model, Settings())
    assert {row.optimizer for row in rows if ".0." in row.name} == {"frozen"}
    listed = [name for group in param_groups(model, Settings()) for name in group["param_names"]]
    assert not [name for name in listed if ".0." in name]
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        param_groups(model, Settings(name="adamw"))


def test_bad_settings_are_refused() -> None:
    model = llama(True)
    for settings, message in (
        (Settings(name="auror"), "did you mean 'aurora'"),  # type: ignore[arg-type]
        (Settings(matrix={"beta": 0.5}), "beta has no effect"),
        (Settings(adamw={"bets": (0.9, 0.9)}), "did you mean 'betas'"),
        (Settings(name="muon", preset="released"), "preset"),
    ):
        with pytest.raises(ValueError, match=message):
            param_groups(model, settings)


def test_a_routed_llama_trains() -> None:
    torch.manual_seed(0)
    model = llama(True)
    optimizer = Aurora(param_groups(model, Settings(matrix={"polar": "svd"})))
    tokens = torch.randint(0, 64, (4, 16))
    losses = []
    for _ in range(12):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3


def test_the_preset_reaches_the_group() -> None:
    optimizer = Aurora(param_groups(llama(True), Settings(preset="released", matrix={"lr": 0.05})))
    group = optimizer.param_groups[0]
    assert (group["eps_mode"], group["polar"], group["scope"]) == ("absolute", "quintic_exact", "all")


def test_embedding_head_and_vectors_have_learning_rates_of_their_own() -> None:
    settings = Settings(adamw={"lr": 0.01}, adamw_lrs={"embedding": 0.3, "head": 0.003})
    groups = {group["role"]: group for group in param_groups(llama(False), settings) if group["kind"] == "adamw"}
    assert {role: group["lr"] for role, group in groups.items()} == {"embedding": 0.3, "head": 0.003, "vector": 0.01}
    assert groups["embedding"]["param_names"] == ["model.embed_tokens.weight"]
    assert groups["head"]["param_names"] == ["lm_head.weight"]
    with pytest.raises(ValueError, match="role 'head' has no effect"):
        param_groups(llama(True), settings)


def test_row_blocks_split_by_name_and_show_in_the_table() -> None:
    model = llama(True)
    rows = model.model.layers[0].self_attn.q_proj.weight.shape[0]
    settings = Settings(row_blocks={r"0\.self_attn\.q_proj": 2, r"1\.self_attn\.q_proj": [rows - 1, 1]})
    table = [row for row in routes(model, settings) if "q_proj" in row.name]
    columns = model.model.layers[0].self_attn.q_proj.weight.shape[1]
    assert [(row.shape, row.blocks) for row in table] == [
        ((rows // 2, columns), 2),
        ((rows - 1, columns), 1),
        ((1, columns), 1),
    ]
    (group,) = (group for group in param_groups(model, settings) if group["kind"] == "matrix")
    split = dict(zip(group["param_names"], group["row_blocks"], strict=True))
    assert split["model.layers.0.self_attn.q_proj.weight"] == (rows // 2, rows // 2)
    assert split["model.layers.1.self_attn.q_proj.weight"] == (rows - 1, 1)
    assert split["model.layers.0.mlp.up_proj.weight"] is None
    assert len(set(group["param_names"])) == len(group["param_names"])
    Aurora(param_groups(model, settings))


@pytest.mark.parametrize(
    ("row_blocks", "message"),
    [
        ({"q_proj": 7}, "splits .*q_proj.* into 7: expected parts of its"),
        ({"q_proj": [1, 2]}, "into \\[1, 2\\]"),
        ({"q_proj": 0}, "into 0"),
        ({"nothing": 2}, "row_blocks 'nothing' matches no parameter"),
        ({"(": 2}, "not a regular expression"),
        ({"norm": 2}, "does not belong to the matrix optimizer"),
        ({"q_proj": 2, "self_attn.q": 2}, "contradict each other"),
    ],
)
def test_bad_row_blocks_are_refused(row_blocks: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        param_groups(llama(True), Settings(row_blocks=row_blocks))
