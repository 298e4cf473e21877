import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from optimizers import Aurora
from pretrain.checkpoint.state import group_settings


def build(dtype: torch.dtype = torch.float32, **matrix: Any) -> tuple[list[nn.Parameter], Aurora]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for s in ((8, 3), (3, 8), (5,))]
    return params, Aurora([{"params": params[:2], **matrix}, {"params": params[2:], "kind": "adamw"}])


def step(params: list[nn.Parameter], optimizer: Aurora, *seeds: int) -> None:
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


@pytest.mark.parametrize("through_file", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"polar": "svd"},
        {"direction": "riemannian_aurora"},
        {"direction": "muon", "contra": 0.2, "uw_floor": 0.35},
        {"direction": "normuon"},
        {"row_balance": "carried", "row_blocks": [(4, 4), None]},
        {"direction": "u_normuon", "running_norms": True, "row_blocks": [(4, 4), None]},
    ],
)
def test_a_resumed_run_is_the_same_bit_for_bit(options: dict[str, Any], dtype: torch.dtype, through_file: bool) -> None:
    params, optimizer = build(dtype, weight_decay=0.1, **options)
    step(params, optimizer, 1, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    if through_file:
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        saved = torch.load(buffer, weights_only=True)
    resumed_params, resumed = build(dtype)
    for p, q in zip(resumed_params, params, strict=True):
        p.data.copy_(q.data)
    resumed.load_state_dict(saved)
    step(params, optimizer, 3, 4)
    step(resumed_params, resumed, 3, 4)
    for p, q in zip(params, resumed_params, strict=True):
        assert torch.equal(p, q)
        assert set(optimizer.state[p]) == set(resumed.state[q])
        for key, value in optimizer.state[p].items():
            assert value.dtype == resumed.state[q][key].dtype == torch.float32
            assert torch.equal(value, resumed.state[q][key])


def test_hyper_parameters_come_back_with_the_state() -> None:
    """Otherwise the first step after a resume runs at another learning rate."""
    params, optimizer = build(lr=0.1, momentum=0.8, balance_rule="tyler", beta=0.3, scope="all", lr_scale="rms")
    optimizer.param_groups[0]["lr"] = 0.07
    step(params, optimizer, 1)
    _, other = build()
    other.load_state_dict(optimizer.state_dict())
    for group, expected in zip(other.param_groups, optimizer.param_groups, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == {k: v for k, v in expected.items() if k != "params"}


def test_a_loaded_state_shares_no_memory_with_its_source() -> None:
    params, optimizer = build()
    step(params, optimizer, 1)
    saved = optimizer.state_dict()
    twin_params, twin = build()
    twin.load_state_dict(saved)
    before = copy.deepcopy(saved)
    step(twin_params, twin, 2)
    for index, state in saved["state"].items():
        for key, value in state.items():
            assert torch.equal(value, before["state"][index][key])


def test_foreign_states_are_refused() -> None:
    params, optimizer = build()
    step(params, optimizer, 1)
    theirs = torch.optim.AdamW([{"params": params[:2]}, {"params": params[2:]}]).state_dict()
    with pytest.raises(ValueError, match="kind None"):
        optimizer.load_state_dict(theirs)

    swapped = copy.deepcopy(optimizer.state_dict())
    swapped["param_groups"][1]["kind"] = "matrix"
    with pytest.raises(ValueError, match="kind 'matrix'"):
        optimizer.load_state_dict(swapped)

    reshaped = copy.deepcopy(optimizer.state_dict())
    reshaped["state"][0]["momentum"] = torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"momentum has shape \(3, 8\)"):
        optimizer.load_state_dict(reshaped)

    partial = copy.deepcopy(optimizer.state_dict())
    del partial["state"][2]["exp_avg"]
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.load_state_dict(partial)


def test_a_refused_state_changes_nothing() -> None:
    params, optimizer = build(lr=0.1)
    step(params, optimizer, 1)
    before = copy.deepcopy(optimizer.state_dict())
    reshaped = copy.deepcopy(before)
    reshaped["state"][2]["exp_avg"] = torch.zeros(2)
    reshaped["param_groups"][0]["lr"] = 5.0
    with pytest.raises(ValueError, match="exp_avg"):
        optimizer.load_state_dict(reshaped)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert all(torch.equal(value, after["state"][index][key]) for key, value in state.items())


def test_a_state_from_before_an_option_existed_takes_its_default() -> None:
    params, optimizer = build(polar="svd")
    step(params, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    for key in ("contra", "uw_floor", "running_norms", "tolerance", "polar_dtype"):
        del saved["param_groups"][0][key]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["contra"] == 0
    step(params, optimizer, 2)


def test_state_is_fp32_whatever_the_default_dtype_of_the_process() -> None:
    params, optimizer = build()
    torch.set_default_dtype(torch.float64)
    try:
        step(params, optimizer, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {value.dtype for p in params for value in optimizer.state[p].values()} == {torch.float32}


def test_a_schedule_finds_the_rate_that_each_group_began_with() -> None:
    optimizer = build(lr=0.05)[1]
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * 0.5
    assert [group["base_lr"] for group in optimizer.param_groups] == [0.05, 3e-3]
    saved = optimizer.state_dict()
    resumed = build(lr=0.2)[1]
    resumed.load_state_dict(saved)
    assert [group["base_lr"] for group in resumed.param_groups] == [0.05, 3e-3]
    # A state from before there was a base_lr leaves that of the optimizer that loads it.
    for group in saved["param_groups"]:
        del group["base_lr"]
    resumed = build(lr=0.2)[1]
    resumed.load_state_dict(saved)
    assert [group["base_lr"] for group in resumed.param_groups] == [0.2, 3e-3]
    assert [group["lr"] for group in resumed.param_groups] == [0.025, 1.5e-3]


def test_a_checkpoint_does_not_hold_the_rate_that_the_config_gives() -> None:
    optimizer = build(lr=0.05)[1]
    assert all("lr" in settings and "base_lr" not in settings for settings in group_settings(optimizer))


def test_observers_are_told_the_place_of_every_direction() -> None:
    seen: list[tuple[Any, torch.Tensor]] = []
    params = [nn.Parameter(torch.zeros(8, 3)), nn.Parameter(torch.zeros(3, 8))]
    optimizer = Aurora([{"params": params, "param_names": ["a", "b"], "row_blocks": [(6, 2), None]}], lr_scale="rms")
    optimizer.direction_observer = lambda place, d: seen.append((place, d.clone()))
    step(params, optimizer, 1)
    assert {(place.name, tuple(place.area)) for place, _ in seen} == {
        ("a", (0, 6, 0, 3)),
        ("a", (6, 8, 0, 3)),
        ("b", (0, 3, 0, 8)),
    }
    for place, d in seen:
        area, weight = place.area, params[0 if place.name == "a" else 1]
        applied = weight[area.row : area.row_stop, area.column : area.column_stop]
        assert torch.allclose(applied, -0.02 * 0.2 * max(area.shape) ** 0.5 * d)
