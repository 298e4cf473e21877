"""What `Aurora(model)` makes of heads, routers, experts and attentions inside blocks, and of other code's groups."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from optimizers import Aurora, OptionError, Settings, routes
from tests.optimizers.test_one_line import matrices, table

HEADS = Settings(unsure="adamw", heads=1)


class Router(nn.Module):
    """Keeps its weight apart from the experts that it chooses from."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, experts, bias=False)


class Mixture(nn.Module):
    def __init__(self, kind: str, width: int = 16, experts: int = 5) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.router = Router(width, experts)
        layers = [nn.Sequential(nn.Linear(width, 2 * width), nn.Linear(2 * width, width)) for _ in range(experts)]
        if kind == "dict":
            self.experts: nn.Module = nn.ModuleDict({f"e{i}": layer for i, layer in enumerate(layers)})
        elif kind == "list":
            self.experts = nn.ModuleList(layers)
        else:
            self.experts = nn.Module()
            self.experts.w1 = nn.Parameter(torch.randn(experts, 2 * width, width))
            self.experts.w2 = nn.Parameter(torch.randn(experts, width, 2 * width))
            self.mlp = nn.Sequential(nn.Linear(width, 30), nn.Linear(30, width))


@pytest.mark.parametrize("kind", ["dict", "list", "stack"])
def test_a_router_is_known_by_the_experts_next_to_it(kind: str) -> None:
    rows = table(nn.ModuleList(Mixture(kind) for _ in range(2)))
    for name in ("gate", "router.score"):
        row = rows[f"1.{name}.weight"]
        assert (row.optimizer, row.why) == ("adamw", "router of experts")


class Block(nn.Module):
    """Small heads before, between and after the layers of a block."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.exit = nn.Linear(width, 100)
        self.halt = nn.Linear(width, 3)
        self.mixed = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.up = nn.Linear(width, 40)
        self.down = nn.Linear(40, width)
        self.probe = nn.Linear(width, 7)


def test_small_heads_inside_a_block_are_unsure() -> None:
    model = nn.ModuleDict({"words": nn.Embedding(50, 16), "layers": nn.ModuleList(Block() for _ in range(2))})
    rows = table(model)
    unsure = {name for name, row in rows.items() if row.is_unsure}
    assert unsure == {f"layers.{i}.{name}.weight" for i in range(2) for name in ("exit", "halt", "probe")}
    assert matrices(model) == {f"layers.{i}.{name}.weight" for i in range(2) for name in ("mixed", "out", "up", "down")}
    # `param_groups` keeps unsure weights as matrices.
    assert matrices(model, Settings()) == matrices(model) | unsure


def attention(**layers: tuple[int, int]) -> nn.Module:
    module = nn.Module()
    for name, (inputs, outputs) in layers.items():
        setattr(module, name, nn.Linear(inputs, outputs, bias=False))
    return module


@pytest.mark.parametrize(
    "layers",
    [
        {"q_proj": (16, 24), "k_proj": (16, 6), "v_proj": (16, 6), "o_proj": (24, 16)},
        {"wq": (16, 24), "wk": (16, 6), "wv": (16, 6), "wo": (24, 16)},
        {"query_key_value": (16, 28), "dense": (16, 16)},
        {"anything": (16, 48), "dense": (16, 16)},
        {
            "q_a_proj": (16, 5),
            "q_b_proj": (5, 36),
            "kv_a_proj_with_mqa": (16, 9),
            "kv_b_proj": (7, 33),
            "o_proj": (24, 16),
        },
    ],
    ids=["grouped", "torchtitan", "fused", "unknown name", "compressed"],
)
def test_every_weight_of_an_attention_is_sure(layers: dict[str, tuple[int, int]]) -> None:
    blocks = nn.ModuleList(nn.ModuleDict({"attn": attention(**layers), "norm": nn.LayerNorm(16)}) for _ in range(2))
    assert matrices(blocks) == {f"{i}.attn.{name}.weight" for i in range(2) for name in layers}


class Titan(nn.Module):
    """As in torchtitan: numbered blocks in a ModuleDict, whose norms come last, and fewer keys than queries."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(50, 16)
        self.layers = nn.ModuleDict({key: self.block() for key in keys})
        self.norm = nn.RMSNorm(16)
        self.output = nn.Linear(16, 50, bias=False)

    @staticmethod
    def block() -> nn.Module:
        """An attention, a gated layer with w3 after w2, and the norms."""
        layers = {"wq": (16, 16), "wk": (16, 8), "wv": (16, 8), "wo": (16, 16)}
        gated = {"w1": (16, 44), "w2": (44, 16), "w3": (16, 44)}
        norms = {"attention_norm": nn.RMSNorm(16), "ffn_norm": nn.RMSNorm(16)}
        return nn.ModuleDict({"attention": attention(**layers), "feed_forward": attention(**gated), **norms})


# The last stage of a pipeline may have a single block.
@pytest.mark.parametrize("keys", [("0", "1"), ("7",)])
def test_numbered_blocks_of_torchtitan_have_no_doubtful_weight(keys: tuple[str, ...]) -> None:
    model = Titan(keys)
    rows = table(model)
    assert not [name for name, row in rows.items() if row.is_unsure]
    names = ("attention.wq", "attention.wk", "attention.wv", "attention.wo", *(f"feed_forward.w{i}" for i in (1, 2, 3)))
    assert matrices(model) == {f"layers.{key}.{name}.weight" for key in keys for name in names}
    assert "output head" in rows["output.weight"].why


def test_subclasses_are_what_their_bases_are() -> None:
    """As fully_shard makes one of the class of every module that it is given."""
    from transformers.pytorch_utils import Conv1D

    layers = {"lstm": nn.LSTM(6, 5), "cell": nn.LSTMCell(6, 5), "gru": nn.GRUCell(6, 5), "conv": Conv1D(12, 6)}
    model = nn.ModuleDict({"words": nn.Embedding(9, 6), **layers})
    expected = {(row.name, row.shape, row.blocks, row.optimizer) for row in table(model).values()}
    assert ("cell.weight_ih", (5, 6), 4, "matrix") in expected
    assert ("conv.weight", (12, 6), 1, "matrix") in expected
    for layer in model.values():
        layer.__class__ = type(f"FSDP{type(layer).__name__}", (type(layer),), {})
    assert {(row.name, row.shape, row.blocks, row.optimizer) for row in table(model).values()} == expected
    assert not any(row.is_unsure for row in table(model).values())


def test_layers_without_a_shape_yet_are_refused() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.LayerNorm(8))
    with pytest.raises(OptionError, match=r"0\.weight has no shape yet: call the model once"):
        Aurora(model)


def test_models_of_transformers_have_no_doubtful_weight() -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "vocab_size": 40}
    deepseek = DeepseekV3Config(
        **sizes,
        moe_intermediate_size=12,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=12,
        kv_lora_rank=10,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
    )
    mixtral = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=5)
    with torch.device("meta"):
        for model in (DeepseekV3ForCausalLM(deepseek), MixtralForCausalLM(mixtral)):
            rows = table(model, Settings(unsure="adamw", experts="matrix"))
            assert not [name for name, row in rows.items() if row.is_unsure]
            assert {row.why for name, row in rows.items() if "mlp.gate.weight" in name} == {"router of experts"}
            # gate_up is [experts, outputs, inputs]
            assert {row.form for name, row in rows.items() if "experts.gate_up_proj" in name} <= {"tall", "wide"}
            assert all(row.shape[1] == 32 for name, row in rows.items() if "experts.gate_up_proj" in name)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("fused", [1, 2])
@pytest.mark.parametrize("routed", [False, True])
def test_experts_are_read_the_right_way_round(transposed: bool, fused: int, routed: bool) -> None:
    width, inner, count = 16, 12, 4

    def stack(outputs: int, inputs: int) -> nn.Parameter:
        return nn.Parameter(torch.randn((count, inputs, outputs) if transposed else (count, outputs, inputs)))

    moe, experts = nn.Module(), nn.Module()
    experts.first, experts.second = stack(fused * inner, width), stack(width, inner)
    moe.experts = experts
    if routed:
        moe.router = nn.Linear(width, count, bias=False)
    model = nn.ModuleDict({"moe": moe, "mlp": nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))})
    if not routed and fused == 1:
        return  # both stacks fit both ways
    settings = Settings(unsure="adamw", experts="matrix")
    if transposed:
        assert "experts x inputs x outputs" in table(model)["moe.experts.first"].why
        with pytest.raises(OptionError, match=r"experts 'matrix' has no effect: .*experts x outputs x inputs"):
            routes(model, settings)
    else:
        assert table(model, settings)["moe.experts.first"].shape == (fused * inner, width)


def test_llama_4_is_not_stepped_as_its_transpose() -> None:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        hidden_size=16,
        intermediate_size=12,
        intermediate_size_mlp=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_local_experts=3,
        vocab_size=40,
        pad_token_id=0,
    )
    with torch.device("meta"):
        model = Llama4ForCausalLM(config)
    with pytest.raises(OptionError, match="experts 'matrix' has no effect"):
        routes(model, Settings(experts="matrix"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"heads": 2}, "heads 2 has no effect"),
        ({"conv": "matrix"}, "conv 'matrix' has no effect"),
        ({"experts": "matrix"}, "experts 'matrix' has no effect"),
        ({"name": "adamw", "heads": 1}, "no effect with optimizer 'adamw': heads"),
        ({"name": "adamw", "unsure": "adamw", "split_fused": True}, "'adamw': unsure, split_fused"),
        ({"name": "adamw", "unsure": "bogus"}, "unsure is 'bogus'"),
    ],
)
def test_routing_options_without_effect_are_refused(given: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 4))
    for make in (lambda: routes(model, Settings(**given)), lambda: Aurora(model, routing=Settings(**given))):
        with pytest.raises(OptionError, match=message):
            make()


def test_a_model_may_go_to_adamw_as_a_whole() -> None:
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 4))
    optimizer = Aurora(model, routing=Settings(name="adamw"))
    assert {group["kind"] for group in optimizer.param_groups} == {"adamw"}


@pytest.mark.parametrize("stated", [{"num_heads": 4}, {"head_dim": 6, "num_heads": 4}, {"n_heads": 4}])
@pytest.mark.parametrize("names", [("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("wq", "wk", "wv")])
def test_heads_of_a_cross_attention_are_those_of_its_queries(stated: dict[str, int], names: tuple[str, ...]) -> None:
    q, k, v = names
    layers = {q: (16, 24), k: (40, 12), v: (40, 12), "o_proj": (24, 16)}
    blocks = nn.ModuleList(nn.ModuleDict({"attn": attention(**layers), "norm": nn.LayerNorm(16)}) for _ in range(2))
    for block in blocks:
        for key, value in stated.items():
            setattr(block["attn"], key, value)  # type: ignore[index]
    rows = table(blocks, HEADS)
    found = [(rows[f"1.attn.{name}.weight"].shape, rows[f"1.attn.{name}.weight"].blocks) for name in names]
    assert found == [((6, 16), 4), ((6, 40), 2), ((6, 40), 2)]


def test_a_group_keeps_the_keys_of_other_code() -> None:
    w = nn.Parameter(torch.randn(4, 3))
    group = {"params": [w], "kind": "matrix", "name": "decay", "layer_id": 3, "bias_correction": True}
    optimizer = Aurora([group])
    assert {key: optimizer.param_groups[0][key] for key in ("name", "layer_id")} == {"name": "decay", "layer_id": 3}
    w.grad = torch.ones_like(w)
    optimizer.step()
    again = Aurora([{"params": [w], "kind": "matrix"}])
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["name"] == "decay"
    for slip in ("momentun", "weight_decya", "learning_rate", "wd", "iteration"):
        with pytest.raises(OptionError, match=f"unknown option '{slip}'"):
            Aurora([{"params": [w], "kind": "matrix", slip: 0.1}])


@pytest.mark.parametrize("shape", [(9,), (9, 4)])
def test_quantised_weights_that_adapters_leave_alone_are_no_obstacle(shape: tuple[int, ...]) -> None:
    adapter = nn.Parameter(torch.randn(4, 3))
    packed = nn.Parameter(torch.zeros(shape, dtype=torch.uint8), requires_grad=False)
    with pytest.warns(UserWarning, match="treated as matrices.*: 4 x 3"):
        optimizer = Aurora([packed, adapter])
    adapter.grad = torch.randn(4, 3)
    before = adapter.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    assert not torch.equal(before, adapter)
    assert not packed.any()
