from typing import Any

import pytest
from pydantic import ValidationError
from torch import nn

from optimizers import options
from pretrain.config import ConfigError
from pretrain.config.model import ModelConfig
from pretrain.config.optimizer import AdamWConfig, OptimizerConfig
from pretrain.model.build import build_model


def problems(**data: Any) -> dict[str, str]:
    """Dotted path -> message of every error; the section's own validator reports several, a line each."""
    with pytest.raises(ValidationError) as caught:
        OptimizerConfig.model_validate(data)
    found = {}
    for error in caught.value.errors():
        if error["loc"]:
            found[".".join(map(str, error["loc"]))] = error["msg"]
        else:
            found |= dict(line.split(": ", 1) for line in str(error["ctx"]["error"]).splitlines())
    return found


def test_defaults_are_those_of_the_optimizer() -> None:
    settings = OptimizerConfig().settings()
    assert settings.name == "aurora"
    for key, value in settings.matrix.items():
        assert value == options.DEFAULTS["matrix"][key]
    of_others = {"riemannian", "outer_steps", "normuon_target", "running_norms", "beta2"}
    assert set(options.DEFAULTS["matrix"]) - set(settings.matrix) == {"direction", "eps_mode", "beta", *of_others}
    assert settings.adamw == options.DEFAULTS["adamw"]


def test_settings_carry_what_was_set() -> None:
    config = OptimizerConfig.model_validate(
        {
            "name": "aurora",
            "lr": 0.05,
            "balance_rule": "tyler",
            "beta": 0.4,
            "scope": "all",
            "adamw": {"lr": 0.01, "betas": [0.8, 0.9], "fused": True},
            "overrides": {"q_proj": "adamw"},
        }
    )
    settings = config.settings()
    assert settings.matrix["lr"] == 0.05
    assert settings.matrix["beta"] == 0.4
    assert settings.matrix["scope"] == "all"
    assert settings.adamw["betas"] == (0.8, 0.9)
    assert settings.adamw["fused"] is True
    assert settings.overrides == {"q_proj": "adamw"}


def test_every_option_without_effect_is_an_error_of_its_own() -> None:
    found = problems(name="adamw", lr=0.1, momentum=0.9, scope="tall", preset="released", overrides={"a": "adamw"})
    assert found.keys() == {"lr", "momentum", "scope", "preset", "overrides"}
    assert all("has no effect" in message for message in found.values())
    balance = {"scope": "all", "iterations": 2, "beta": 0.5, "balance_rule": "odds", "row_balance": "polar"}
    assert problems(name="muon", **balance).keys() == balance.keys()
    assert problems(name="muon", preset="released").keys() == {"preset"}
    assert problems(beta=0.5).keys() == {"beta"}
    assert problems(balance_rule="odds", beta=0.5).keys() == {"beta"}
    assert problems(iterations=1, balance_rule="tyler", beta=0.4).keys() == {"balance_rule", "beta"}
    assert problems(polar="cans", polar_dtype="fp32").keys() == {"polar_dtype"}
    assert problems(name="riemannian_aurora", iterations=2, outer_steps=2).keys() == {"iterations"}
    assert problems(name="normuon", riemannian="exact", normuon_target="unit", beta2=0.9).keys() == {
        "riemannian",
        "beta2",
    }
    assert problems(name="u_normuon", beta2=0.9).keys() == {"beta2"}
    assert problems(name="adamw", contra=0.2, row_blocks={"q": 4}).keys() == {"contra", "row_blocks"}


def test_roles_of_adamw_have_rates_of_their_own() -> None:
    config = OptimizerConfig.model_validate({"adamw": {"lr": 0.01, "embedding_lr": 0.3, "vector_lr": 0.0}})
    assert config.settings().adamw_lrs == {"embedding": 0.3, "vector": 0.0}
    assert config.settings().adamw["lr"] == 0.01
    assert OptimizerConfig().settings().adamw_lrs == {}
    assert problems(adamw={"head_lr": -1}).keys() == {"adamw.head_lr"}


def test_every_direction_loads_with_its_own_options() -> None:
    for data in (
        {"name": "aurora", "tolerance": 0.01, "row_balance": "gram", "polar_dtype": "fp16"},
        {"name": "riemannian_aurora", "riemannian": "released", "outer_steps": 2, "scope": "all"},
        {
            "name": "muon",
            "contra": 0.2,
            "uw_floor": 0.35,
            "cautious": True,
            "weight_decay": 0.1,
            "row_blocks": {"qkv": [8, 4, 4]},
        },
        {"name": "normuon", "normuon_target": "graft", "beta2": 0.9},
        {"name": "u_normuon", "running_norms": True, "beta2": 0.9},
    ):
        settings = OptimizerConfig.model_validate(data).settings()
        given = {**settings.matrix, "name": settings.name, "row_blocks": settings.row_blocks}
        assert {key: given[key] for key in data} == data


def test_order_in_the_file_does_not_matter() -> None:
    assert OptimizerConfig.model_validate({"beta": 0.4, "balance_rule": "tyler"}).beta == 0.4
    assert problems(scope="all", name="muon").keys() == {"scope"}


def test_values_out_of_range_are_all_reported() -> None:
    found = problems(
        name="sgd",
        lr=-1,
        momentum=1.0,
        iterations=0,
        polar="cubic",
        adamw={"lr": -1, "betas": [0.9, 1.0], "eps": -1e-8},
        overrides={"q": "sgd"},
    )
    expected = "name lr momentum iterations polar adamw.lr adamw.betas adamw.eps overrides.q"
    assert found.keys() == set(expected.split())
    assert "regular expression" in problems(overrides={"(": "adamw"})["overrides"]
    assert problems(lr="0.1").keys() == {"lr"}
    assert problems(leaning=1).keys() == {"leaning"}
    assert problems(adamw={"betas": [0.9]}).keys() == {"adamw.betas.1"}


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"name": "muon"},
        {"name": "adamw"},
        {"preset": "released"},
        {"preset": "released", "balance_rule": "odds", "lr": 0.05},
        {"balance_rule": "tyler"},
        {"iterations": 1},
    ],
)
@pytest.mark.filterwarnings("ignore:.*iterations = 1")
def test_a_dump_shows_what_acts_and_loads_again(data: dict[str, Any]) -> None:
    config = OptimizerConfig.model_validate(data)
    for mode in ("python", "json"):
        dumped = config.model_dump(mode=mode)
        assert OptimizerConfig.model_validate(dumped) == config
        assert OptimizerConfig.model_validate(dumped).settings() == config.settings()
    assert ("beta" in config.model_dump()) == (config.name == "aurora" and config.balance_rule == "tyler")
    assert ("scope" in config.model_dump()) == (config.name == "aurora")
    assert ("momentum" in config.model_dump()) == (config.name != "adamw")


def test_a_preset_is_written_out_and_what_is_set_wins() -> None:
    config = OptimizerConfig.model_validate({"preset": "released", "weight_decay": 0.0})
    assert (config.scope, config.polar, config.balance_rule) == ("all", "quintic_exact", "tyler")
    assert config.weight_decay == 0
    assert config.lr == options.DEFAULTS["matrix"]["lr"]
    assert config.settings().preset == "released"


def test_one_iteration_warns() -> None:
    with pytest.warns(UserWarning, match="less even than Muon's"):
        OptimizerConfig(iterations=1)


def test_every_field_is_documented() -> None:
    for section in (OptimizerConfig, AdamWConfig):
        for name, field in section.model_fields.items():
            assert field.description, name


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"overrides": {"nothing": "adamw"}}, "optimizer.overrides: override 'nothing' matches no parameter name"),
        ({"row_blocks": {"0": 5}}, "optimizer.row_blocks: row_blocks '0' splits 0.weight into 5"),
        ({"adamw": {"head_lr": 0.1}}, "optimizer.adamw.head_lr: adamw learning rate of role 'head' has no effect"),
        ({"overrides": {"0": "adamw"}}, "optimizer.name: optimizer 'aurora' found no matrix among 2 parameters"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_errors_of_the_config(data: dict[str, Any], problem: str) -> None:
    config, model = OptimizerConfig.model_validate(data), nn.Sequential(nn.Linear(2, 4))
    for call in (config.param_groups, config.routes):
        with pytest.raises(ConfigError) as caught:
            call(model)
        (found,) = caught.value.problems
        assert found.startswith(problem)


@pytest.mark.parametrize("architecture", ["llama", "speedrun"])
def test_heads_are_the_row_blocks_that_one_would_write_by_hand(architecture: str) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_layers": 2, "num_heads": 4}
    kv_heads = 2 if architecture == "llama" else 4
    extra = {} if architecture == "llama" else {"architecture": "speedrun"}
    config = ModelConfig.model_validate({**sizes, "num_kv_heads": kv_heads, "context_length": 16, **extra})
    model = build_model(config, seed=1, device="meta")
    by_hand = OptimizerConfig(name="muon", row_blocks={r"q_proj\.weight": 4, r"[kv]_proj\.weight": kv_heads})
    heads = OptimizerConfig(name="muon", heads=1)
    (wanted,), (found,) = (
        [group for group in each.param_groups(model) if group["kind"] == "matrix"] for each in (by_hand, heads)
    )
    weights = [blocks for blocks in found["row_blocks"] if blocks is not None]
    assert set(weights) == ({(8,) * 4, (8,) * 2} if architecture == "llama" else {(8,) * 4})
    assert found["row_blocks"] == wanted["row_blocks"]
    assert "row_blocks" not in OptimizerConfig(name="muon").param_groups(model)[0]


def test_heads_without_effect_are_an_error_of_the_config() -> None:
    assert problems(heads=-1).keys() == {"heads"}
    assert "heads" in problems(name="adamw", heads=1)
    model = nn.Sequential(nn.Linear(6, 12), nn.Linear(12, 4))
    with pytest.raises(ConfigError, match=r"optimizer\.heads: heads 1 has no effect"):
        OptimizerConfig(heads=1).param_groups(model)
