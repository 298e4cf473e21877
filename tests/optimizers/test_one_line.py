"""`Aurora(model)`: any model is routed by what its modules are, and a table says why."""

import copy
import gc
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from optimizers import Aurora, OptionError, Route, Settings, param_groups, routes
from optimizers.directions import aurora
from tests.optimizers.helpers import error

STRICT = Settings(unsure="adamw", split_fused=True)


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn(x).chunk(3, dim=-1)
        return self.c_proj(torch.softmax(q @ k.mT, dim=-1) @ v)


class Block(nn.Module):
    """Of a nanoGPT: nothing in it has a method or a config of transformers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, bias=False)
        self.attn = Attention(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm(x))
        return x + self.mlp["c_proj"](self.mlp["c_fc"](x).relu())


class NanoGPT(nn.Module):
    def __init__(self, *, tied: bool = False, layers: int = 2, width: int = 16, vocabulary: int = 40) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocabulary, width), nn.Embedding(12, width)
        self.h = nn.ModuleList(Block(width) for _ in range(layers))
        self.lm_head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.lm_head(x)


class Experts(nn.Module):
    """A mixture of experts with its router, a gate of one output, and experts in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)
        self.shared_gate = nn.Linear(8, 1)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 8)) for _ in range(4))
        self.stacked = nn.Parameter(torch.randn(4, 24, 8))
        self.stacked_bias = nn.Parameter(torch.zeros(4, 24))


class Vision(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4)
        self.positions = nn.Parameter(torch.randn(1, 9, 16))
        self.table = nn.Parameter(torch.randn(9, 16))
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(2))
        self.norm = nn.LayerNorm(16)
        self.classifier = nn.Linear(16, 10)


def table(model: nn.Module, settings: Settings = STRICT) -> dict[str, Route]:
    """The rows by name; a weight in unequal parts has the last of its rows."""
    return {row.name: row for row in routes(model, settings)}


def matrices(model: nn.Module, settings: Settings = STRICT) -> set[str]:
    return {name for name, row in table(model, settings).items() if row.optimizer == "matrix"}


def gpt2(**options: Any) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=8, vocab_size=40, **options))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layers", [1, 3])
def test_a_head_without_any_method_that_says_so_goes_to_adamw(tied: bool, layers: int) -> None:
    model = NanoGPT(tied=tied, layers=layers)
    rows = table(model)
    hidden = {f"h.{i}.{name}.weight" for i in range(layers) for name in ("attn.c_attn", "attn.c_proj")}
    hidden |= {f"h.{i}.mlp.{name}.weight" for i in range(layers) for name in ("c_fc", "c_proj")}
    assert matrices(model) == hidden
    if tied:
        assert "lm_head.weight" not in rows
        assert rows["wte.weight"].why == "embedding, tied to the output head"
    else:
        assert (rows["lm_head.weight"].role, rows["lm_head.weight"].is_unsure) == ("head", False)
    assert matrices(model, Settings()) == hidden
    assert not [row for row in rows.values() if row.is_unsure]


@pytest.mark.parametrize("outputs", [3, 16, 1])
def test_a_classifier_is_never_a_matrix_in_silence(outputs: int) -> None:
    model = NanoGPT()
    model.lm_head = nn.Linear(16, outputs)
    row = table(model)["lm_head.weight"]
    assert row.optimizer == "adamw"
    assert row.is_unsure == (outputs != 1)
    if outputs == 1:
        assert row.why == "one row or column"
    else:
        with pytest.warns(UserWarning, match=r"lm_head\.weight"):
            groups = param_groups(model, Settings())
        assert "lm_head.weight" in groups[0]["param_names"]


def test_two_heads_are_both_found() -> None:
    model = NanoGPT()
    model.lm_head = nn.ModuleDict({"policy": nn.Linear(16, 5), "value": nn.Linear(16, 1)})  # type: ignore[assignment]
    assert not {name for name in matrices(model) if "lm_head" in name}


def test_gpt2s_weights_are_read_the_right_way_round() -> None:
    rows = table(gpt2())
    fc, proj = rows["transformer.h.0.mlp.c_fc.weight"], rows["transformer.h.0.mlp.c_proj.weight"]
    assert (fc.shape, fc.form, fc.direction, fc.lr_scale) == ((64, 16), "tall", "aurora", 2.0)
    assert (proj.shape, proj.form, proj.direction, proj.lr_scale) == ((16, 64), "wide", "muon", 1.0)
    attention = rows["transformer.h.0.attn.c_attn.weight"]
    assert (attention.shape, attention.blocks) == ((16, 16), 3)
    whole = table(gpt2(), Settings())["transformer.h.0.attn.c_attn.weight"]
    assert (whole.shape, whole.blocks, whole.direction) == ((48, 16), 1, "aurora")


@pytest.mark.parametrize("direction", ["aurora", "normuon", "u_normuon"])
def test_gpt2_steps_as_the_same_model_of_linears(direction: str) -> None:
    """A weight that is stored as inputs x outputs moves as its transpose would; c_attn as three weights."""
    model = gpt2()
    optimizer = Aurora(model, direction=direction, polar="svd", weight_decay=0.1, lr=0.1, uw_floor=0.1)
    weights = [model.transformer.h[0].mlp.c_fc.weight, model.transformer.h[0].attn.c_attn.weight]
    twins = [
        nn.Parameter(part.T.contiguous())
        for w in weights
        for part in w.detach().split(16 if w is weights[1] else 64, 1)
    ]
    other = Aurora(twins, direction=direction, polar="svd", weight_decay=0.1, lr=0.1, uw_floor=0.1)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        parts = [part for w in weights for part in w.grad.split(16 if w is weights[1] else 64, 1)]  # type: ignore[union-attr]
        for twin, part in zip(twins, parts, strict=True):
            twin.grad = part.T.contiguous()
        optimizer.step()
        other.step()
    assert torch.allclose(weights[0], twins[0].T, atol=1e-5)
    assert torch.allclose(weights[1], torch.cat([twin.T for twin in twins[1:]], dim=1), atol=1e-5)
    state = optimizer.state[weights[0]]
    assert state["momentum"].shape == (16, 64)
    if "second_moment" in state:
        assert torch.allclose(state["second_moment"], other.state[twins[0]]["second_moment"], atol=1e-6)


def test_routers_gates_and_experts() -> None:
    model = nn.ModuleList(Experts() for _ in range(2))
    rows = table(model)
    assert rows["0.gate.weight"].why == "router of experts"
    assert rows["1.shared_gate.weight"].why == "one row or column"
    assert rows["0.stacked"].role == "tensor"
    assert (rows["0.stacked_bias"].role, rows["0.stacked_bias"].optimizer) == ("vector", "adamw")
    assert rows["0.experts.3.0.weight"].direction == "aurora"
    stack = table(model, Settings(unsure="adamw", experts="matrix"))["0.stacked"]
    assert (stack.shape, stack.blocks, stack.direction) == ((24, 8), 4, "aurora")


def test_a_vision_transformer() -> None:
    model = Vision()
    rows = table(model)
    assert {name for name, row in rows.items() if row.is_unsure} == {"table", "classifier.weight"}
    assert rows["patches.weight"].role == "tensor"
    assert rows["positions"].role == "vector"
    attention = rows["layers.1.self_attn.in_proj_weight"]
    assert (attention.shape, attention.blocks) == ((16, 16), 3)
    assert rows["layers.1.self_attn.out_proj.weight"].optimizer == "matrix"
    assert rows["layers.0.linear1.weight"].direction == "aurora"
    groups = param_groups(model, Settings(unsure="adamw", adamw={"weight_decay": 0.1}))
    decays = {group["role"]: group["weight_decay"] for group in groups if group["kind"] == "adamw"}
    assert decays == {"hidden": 0.1, "head": 0.1, "tensor": 0.1, "vector": 0.0}
    conv = table(model, Settings(unsure="adamw", conv="matrix"))["patches.weight"]
    assert (conv.shape, conv.form, conv.why) == ((16, 48), "wide", "convolution")


def test_the_gates_of_an_lstm_are_blocks() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(20, 6), "rnn": nn.LSTM(6, 8, 2), "gru": nn.GRU(8, 6)})
    rows = table(model)
    assert [(rows[f"rnn.weight_{kind}_l0"].shape, rows[f"rnn.weight_{kind}_l0"].blocks) for kind in ("ih", "hh")] == [
        ((8, 6), 4),
        ((8, 8), 4),
    ]
    assert (rows["gru.weight_ih_l0"].shape, rows["gru.weight_ih_l0"].blocks) == ((6, 8), 3)
    assert table(model, Settings())["rnn.weight_ih_l0"].shape == (32, 6)


def test_interleaved_rows_are_not_split() -> None:
    class GPTBigCodeAttention(Attention):
        multi_query = False

    model = nn.ModuleList(GPTBigCodeAttention(8) for _ in range(2))
    assert table(model)["0.c_attn.weight"].shape == (24, 8)
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40
    )
    rows = table(GPTNeoXForCausalLM(config))
    fused = next(row for name, row in rows.items() if "query_key_value.weight" in name)
    assert (fused.shape, fused.blocks) == ((48, 16), 1)


def test_phi3s_fused_weights_are_split_by_its_heads() -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=24,
        vocab_size=40,
        pad_token_id=0,
    )
    rows = routes(Phi3ForCausalLM(config), STRICT)
    fused = [(row.shape, row.blocks) for row in rows if "layers.0" in row.name and row.blocks > 0 and "qkv" in row.name]
    assert fused == [((16, 16), 1), ((8, 16), 2)]
    assert [(row.shape, row.blocks) for row in rows if "layers.0.mlp.gate_up" in row.name] == [((24, 16), 2)]


def test_heads_have_directions_of_their_own_if_asked_for() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = Settings(unsure="adamw", heads=1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 40}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=8))
    rows = table(model, settings)
    found = {name: rows[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkvo"}
    assert [(row.shape, row.blocks) for row in found.values()] == [
        ((8, 16), 4),
        ((8, 16), 2),
        ((8, 16), 2),
        ((16, 32), 1),
    ]
    three = [row for row in routes(model, Settings(unsure="adamw", heads=3)) if "1.self_attn.q" in row.name]
    assert [(row.shape, row.blocks) for row in three] == [((24, 16), 1), ((8, 16), 1)]
    fused = table(gpt2(), settings)
    assert (fused["transformer.h.0.attn.c_attn.weight"].shape, fused["transformer.h.0.attn.c_attn.weight"].blocks) == (
        (8, 16),
        6,
    )
    assert fused["transformer.h.0.mlp.c_fc.weight"].blocks == 1
    vision = table(Vision(), settings)["layers.0.self_attn.in_proj_weight"]
    assert (vision.shape, vision.blocks) == ((8, 16), 6)
    with pytest.raises(OptionError, match=r"heads 1 has no effect: .*states the size of its heads"):
        table(NanoGPT(), settings)
    with pytest.raises(OptionError, match="heads is -1"):
        table(NanoGPT(), Settings(heads=-1))
    optimizer = Aurora(model, routing=settings)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    assert bool(optimizer.last_step_finite)


@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions_and_experts_step_as_their_matrices_would(channels_last: bool) -> None:
    conv, experts = nn.Conv2d(3, 64, 2, bias=False), nn.Parameter(torch.randn(3, 12, 5))
    if channels_last:
        conv = conv.to(memory_format=torch.channels_last)
    before = [conv.weight.detach().clone(), experts.detach().clone()]
    groups = [
        {
            "params": [conv.weight, experts],
            "views": ["flat", "stack"],
            "polar": "svd",
            "lr": 0.5,
            "momentum": 0.0,
            "nesterov": False,
        }
    ]
    optimizer = Aurora(groups)
    conv.weight.grad, experts.grad = torch.randn_like(conv.weight), torch.randn_like(experts)
    optimizer.step()
    moved = (before[0] - conv.weight.detach()).flatten(1)
    wanted = aurora(conv.weight.grad.flatten(1), polar="svd")
    assert error(moved, 0.5 * (64 / 12) ** 0.5 * wanted) < 1e-5
    wanted = aurora(experts.grad, polar="svd")
    assert error(before[1] - experts.detach(), 0.5 * (12 / 5) ** 0.5 * wanted) < 1e-5
    assert optimizer.state[experts]["momentum"].shape == (3, 12, 5)


def test_aurora_of_a_model_trains_and_says_what_it_did() -> None:
    model = NanoGPT(tied=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = Aurora(model, lr=0.02, weight_decay=0.1, betas=(0.9, 0.99))
    lines = {line.split()[0]: line for line in optimizer.table.splitlines()}
    assert lines.keys() == {"parameter", *(name for name, _ in model.named_parameters())}
    assert "embedding, tied to the output head" in lines["wte.weight"]
    rates = {(group["kind"], group["role"]): group["lr"] for group in optimizer.param_groups}
    assert rates["matrix", "hidden"] == 0.02
    assert rates["adamw", "embedding"] == pytest.approx(0.003)
    assert optimizer.param_groups[1]["betas"] == (0.9, 0.99)
    tokens = torch.randint(0, 40, (4, 12))
    losses = []
    for _ in range(10):
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5


def test_what_is_not_recognised_goes_to_adamw_with_one_warning() -> None:
    model = Vision()
    with pytest.warns(UserWarning, match=r"table.*classifier\.weight") as caught:
        optimizer = Aurora(model)
    assert len(caught) == 1
    assert optimizer.table.count("unsure: ") == 2
    names = {name: group["kind"] for group in optimizer.param_groups for name in group["param_names"]}
    assert names["table"] == names["classifier.weight"] == "adamw"
    forced = Aurora(model, routing=Settings(unsure="adamw", overrides={"^table$": "matrix", "^classifier": "adamw"}))
    assert "table" in forced.param_groups[0]["param_names"]
    assert "unsure" not in forced.table


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"momentun": 0.9}, "did you mean 'momentum'"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"direction": "muno"}, "did you mean 'muon'"),
        ({"adamw_lr_ratio": -1}, "adamw_lr_ratio is -1"),
        ({"routing": Settings(conv="matirx")}, "conv is 'matirx'.*did you mean 'matrix'"),  # type: ignore[arg-type]
        ({"maximize": 2}, "maximize is 2"),
    ],
)
def test_bad_options_of_a_model_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Aurora(NanoGPT(), **given)


def test_a_model_without_a_matrix_is_refused_and_the_doubtful_are_named() -> None:
    with pytest.raises(OptionError, match=r"no matrix .* Of weight it is not sure"):
        Aurora(nn.Linear(8, 4))
    with pytest.raises(OptionError, match=r"an option for these: conv\."):
        Aurora(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    with pytest.raises(OptionError, match="routing has no effect"):
        Aurora(NanoGPT().parameters(), routing=Settings())


def test_the_model_is_not_kept_alive() -> None:
    model = NanoGPT()
    optimizer = Aurora(model)
    reference = optimizer._model
    assert reference is not None
    assert reference() is model
    del model
    gc.collect()
    assert reference() is None


def test_parameters_that_were_replaced_in_the_model_are_an_error_at_the_first_step() -> None:
    model = NanoGPT()
    optimizer = Aurora(model)
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(p.detach().clone())
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    with pytest.raises(OptionError, match=r"no longer those of the model, h\.0\.attn\.c_attn\.weight for example"):
        optimizer.step()


def test_parameters_that_a_wrapper_replaces_in_the_groups_too_are_followed() -> None:
    model = NanoGPT()
    optimizer = Aurora(model, polar="svd")
    new: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = new.setdefault(p, nn.Parameter(p.detach().clone()))
    for group in optimizer.param_groups:
        group["params"] = [new[p] for p in group["params"]]
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    before = model.h[0].attn.c_proj.weight.detach().clone()
    optimizer.step()
    moved = (before - model.h[0].attn.c_proj.weight.detach()).double()
    assert float(torch.linalg.svdvals(moved)[0]) == pytest.approx(0.02, rel=0.01)


def test_master_copies_with_gradients_of_their_own_are_stepped() -> None:
    model = NanoGPT()
    optimizer = Aurora(model)
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
        for p in group["params"]:
            p.grad = torch.randn_like(p)
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    for _ in range(2):
        optimizer.step()
        optimizer.param_groups[0]["params"][1].grad = None  # a layer that is not used now and then
    assert not torch.equal(before, optimizer.param_groups[0]["params"][0])


def test_a_copy_and_a_pickle_of_a_routed_optimizer_step() -> None:
    model = NanoGPT()
    optimizer = Aurora(model, routing=Settings(unsure="adamw", split_fused=True))
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        for group in twin.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        twin.step()
        assert bool(twin.last_step_finite)
        assert "matrix" in twin.table
        twin.add_param_group({"params": [nn.Parameter(torch.randn(4, 3))]})


def test_a_state_from_before_views_existed_keeps_the_orientation() -> None:
    model = gpt2()
    optimizer = Aurora(model, routing=Settings())
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["views"]
    optimizer.load_state_dict(saved)
    assert "in_out" in optimizer.param_groups[0]["views"]


@pytest.mark.parametrize("views", [["out_in"], "flat", [None, None], ["stack"], ["flat"]])
def test_views_that_do_not_fit_are_refused(views: Any) -> None:
    with pytest.raises(OptionError, match=r"views|expected"):
        Aurora([{"params": [nn.Parameter(torch.randn(4, 3))], "views": views}])


def test_views_are_refused_on_shards() -> None:
    from optimizers.sharded import LayoutError, flat_layout, plan_group

    group = Aurora(
        [{"params": [nn.Parameter(torch.randn(4, 3))], "param_names": ["w"], "views": ["in_out"]}]
    ).param_groups[0]
    with pytest.raises(LayoutError, match="w has the view 'in_out'"):
        plan_group(flat_layout([{"w": (4, 3)}], 1), group)
