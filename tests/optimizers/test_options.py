import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from optimizers import Aurora


def weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(4, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentun": 0.9}, "unknown option 'momentun'.*did you mean 'momentum'"),
        ({"direction": "auror"}, "direction is 'auror'.*did you mean 'aurora'"),
        ({"scope": "tal"}, "scope is 'tal'.*tall, all, wide"),
        ({"polar": "quintik"}, "polar is 'quintik'.*did you mean 'quintic'"),
        ({"polar": "grams"}, "polar is 'grams'"),
        (
            {"row_balance": "cholesky"},
            "row_balance is .cholesky.: expected one of auto, polar, .*gram, carried, polished",
        ),
        ({"tolerance": 0}, "tolerance is 0: expected a number above 0 and below 1 or null"),
        ({"polar": "svd", "polar_dtype": "fp32"}, "polar_dtype has no effect: polar .svd. has one dtype only"),
        ({"lr_scale": None}, "lr_scale is None"),
        ({"lr": -0.1}, "lr is -0.1: expected a number of at least 0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": "3e-4"}, "lr is '3e-4'"),
        ({"lr": torch.ones(2)}, "lr is tensor"),
        ({"momentum": torch.tensor(0.9)}, "momentum is tensor"),
        ({"momentum": 1.0}, "momentum is 1.0: .*below 1"),
        ({"nesterov": 1}, "nesterov is 1: expected true or false"),
        ({"iterations": 0}, "iterations is 0: expected a whole number of at least 1"),
        ({"iterations": 2.0}, "iterations is 2.0"),
        ({"iterations": True}, "iterations is True"),
        ({"balance_rule": "tyler", "beta": 0.0}, "beta is 0.0: .*above 0 and at most 1"),
        ({"weight_decay": -1}, "weight_decay is -1"),
        ({"preset": "relased"}, "preset is 'relased'.*did you mean 'released'"),
        ({"preset": "released", "direction": "muon"}, "preset 'released' is for direction 'aurora', not 'muon'"),
        ({"betas": (0.9, 0.95)}, "betas has no effect"),
    ],
)
def test_each_bad_option_has_a_message(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Aurora([weight()], **options)


def test_all_problems_of_a_group_are_named_at_once() -> None:
    group = {"params": [weight()], "lr": -1, "scope": "up", "betas": (0.9, 0.9), "momentun": 1}
    with pytest.raises(ValueError, match="bad options") as caught:
        Aurora([group])
    for part in ("lr is -1", "scope is 'up'", "'betas' is an option of kind 'adamw'", "unknown option 'momentun'"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"beta": 0.5}, "beta"),
        ({"balance_rule": "odds", "beta": 0.4}, "beta"),
        ({"iterations": 1, "balance_rule": "tyler"}, "balance_rule"),
        ({"iterations": 1, "row_balance": "polar"}, "row_balance"),
        *(
            ({"direction": "muon", key: value}, key)
            for key, value in {
                "scope": "tall",
                "iterations": 2,
                "beta": 0.5,
                "balance_rule": "odds",
                "row_balance": "polar",
                "eps_mode": "relative",
            }.items()
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:iterations = 1")
def test_options_without_effect_are_refused_in_groups_and_in_the_constructor(options: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} has no effect"):
        Aurora([weight()], **options)
    with pytest.raises(ValueError, match=f"{key} has no effect"):
        Aurora([{"params": [weight()], **options}])


def test_an_option_of_the_constructor_must_act_in_one_group_only() -> None:
    muon: dict[str, Any] = {"params": [weight()], "direction": "muon"}
    aurora: dict[str, Any] = {"params": [weight()]}
    for groups in ([muon, aurora], [aurora, muon]):
        optimizer = Aurora(groups, scope="all", lr=0.3)
        assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.3]
        assert next(g for g in optimizer.param_groups if g["direction"] == "aurora")["scope"] == "all"
    with pytest.raises(ValueError, match="momentum has no effect"):
        Aurora([{"params": [weight()], "kind": "adamw"}], momentum=0.9)
    with pytest.raises(ValueError, match="preset has no effect"):
        Aurora([{"params": [weight()], "kind": "adamw"}], preset="released")


def test_groups_win_over_the_constructor_and_that_over_the_preset() -> None:
    groups: list[dict[str, Any]] = [{"params": [weight()], "momentum": 0.5}, {"params": [weight()]}]
    optimizer = Aurora(groups, preset="released", momentum=0.7)
    assert [group["momentum"] for group in optimizer.param_groups] == [0.5, 0.7]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.025, 0.025]
    assert groups[1].keys() == {"params"}


def test_each_kind_has_defaults_of_its_own() -> None:
    groups: list[dict[str, Any]] = [{"params": [weight()]}, {"params": [weight()], "kind": "adamw"}]
    optimizer = Aurora(groups)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 3e-3]
    with pytest.raises(ValueError, match=re.escape("kind is 'adam'")):
        Aurora([{"params": [weight()], "kind": "adam"}])


def test_one_iteration_warns() -> None:
    with pytest.warns(UserWarning, match="less even than Muon's"):
        Aurora([weight()], iterations=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Aurora([{"params": [weight()], "kind": "matrix"}], iterations=2)


def test_a_refused_group_is_not_added() -> None:
    optimizer = Aurora([weight()])
    for bad in ({"params": [nn.Parameter(torch.zeros(3))]}, {"params": [weight()], "lr": -1}):
        with pytest.raises(ValueError, match="expected"):
            optimizer.add_param_group(bad)
    assert len(optimizer.param_groups) == 1


def test_keys_that_schedulers_leave_in_groups_are_no_options() -> None:
    group = {"params": [weight()], "initial_lr": 0.1}
    assert Aurora([group]).param_groups[0]["initial_lr"] == 0.1
