"""A gradient that is not finite: the step must not have happened, for any tensor, bit for bit."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from optimizers import Aurora

BAD = [float("nan"), float("inf"), -float("inf")]


def build(
    polar: str, fused: bool, dtype: torch.dtype = torch.float32, direction: str = "aurora"
) -> tuple[list[nn.Parameter], Aurora]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 3), (8, 3), (3, 8), (4, 4), (6,), (5, 2)]
    params = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    matrix = {"params": params[:4], "polar": polar, "weight_decay": 0.1, "direction": direction}
    adamw = {"params": params[4:], "kind": "adamw", "fused": fused, "weight_decay": 0.1}
    return params, Aurora([matrix, adamw])


def set_gradients(params: list[nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def everything(params: list[nn.Parameter], optimizer: Aurora) -> list[Tensor]:
    """Every tensor that a step may touch."""
    states = [optimizer.state[p][key] for p in params for key in sorted(optimizer.state[p])]
    return [t.detach().clone() for t in [*params, *states]]


def same_bits(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(map(flat, first), map(flat, second), strict=True)
    )


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1)


@pytest.mark.parametrize(
    ("polar", "fused", "direction"),
    [
        ("quintic", False, "aurora"),
        ("svd", True, "aurora"),
        ("quintic_exact", False, "aurora"),
        ("gram", False, "normuon"),
        ("gram", False, "riemannian_aurora"),
    ],
)
@pytest.mark.parametrize(("where", "bad"), [(0, BAD[0]), (3, BAD[1]), (4, BAD[2]), (5, BAD[0])])
def test_one_bad_entry_anywhere_voids_the_step_everywhere(
    where: int, bad: float, polar: str, fused: bool, direction: str
) -> None:
    params, optimizer = build(polar, fused, direction=direction)
    for seed in (1, 2):
        set_gradients(params, seed)
        optimizer.step()
    assert bool(optimizer.last_step_finite)
    before = everything(params, optimizer)
    set_gradients(params, 3)
    params[where].grad.view(-1)[1] = bad  # type: ignore[union-attr]
    optimizer.step()
    assert not bool(optimizer.last_step_finite)
    assert optimizer.last_step_finite.dtype == torch.bool
    assert same_bits(everything(params, optimizer), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("polar", ["quintic", "svd"])
def test_later_steps_equal_those_of_a_run_that_never_saw_it(polar: str, fused: bool, dtype: torch.dtype) -> None:
    params, optimizer = build(polar, fused, dtype)
    clean_params, clean = build(polar, fused, dtype)
    for seed in range(5):
        if seed in (0, 2, 3):
            # Also at the first step, where there is no state yet.
            set_gradients(params, 50 + seed)
            params[seed].grad[0] = float("nan")  # type: ignore[index]
            optimizer.step()
        for pair in ((params, optimizer), (clean_params, clean)):
            set_gradients(pair[0], seed)
            pair[1].step()
        assert bool(optimizer.last_step_finite)
    assert same_bits(everything(params, optimizer), everything(clean_params, clean))
    assert all(float(optimizer.state[p]["step"]) == 5 for p in params)


def test_nan_is_not_kept_by_multiplying_the_update_with_zero() -> None:
    """0 * NaN is NaN: a void step that is a product and no selection poisons weights and momentum."""
    w, b = nn.Parameter(torch.ones(4, 2)), nn.Parameter(torch.ones(3))
    groups: list[dict[str, Any]] = [{"params": [w]}, {"params": [b], "kind": "adamw"}]
    optimizer = Aurora(groups)
    w.grad, b.grad = torch.full((4, 2), float("nan")), torch.full((3,), float("inf"))
    optimizer.step()
    assert torch.equal(w, torch.ones(4, 2))
    assert torch.equal(b, torch.ones(3))
    for p in (w, b):
        assert not any(value.any() for value in optimizer.state[p].values())


def test_large_finite_gradients_are_no_overflow() -> None:
    # Their squares are infinite in fp32: a flag made from a sum of squares would void the step.
    w = nn.Parameter(torch.zeros(8, 4))
    optimizer = Aurora([w], lr=1.0)
    w.grad = torch.randn(8, 4) * 1e30
    optimizer.step()
    assert bool(optimizer.last_step_finite)
    assert float(w.detach().norm()) == pytest.approx(2 * 2**0.5, rel=0.02)


def test_a_void_step_factorises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the factorisation ran")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    spoiled, healthy = nn.Parameter(torch.zeros(4, 2)), nn.Parameter(torch.zeros(2, 4))
    optimizer = Aurora([spoiled, healthy], polar="svd")
    spoiled.grad, healthy.grad = torch.full((4, 2), float("nan")), torch.ones(2, 4)
    optimizer.step()
    assert not spoiled.any()
    assert not healthy.any()


def test_the_flag_survives_a_copy_of_the_optimizer() -> None:
    params, optimizer = build("svd", False)
    set_gradients(params, 1)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    assert bool(twin.last_step_finite)
    twin_params = [p for g in twin.param_groups for p in g["params"]]
    for each, owner in ((params, optimizer), (twin_params, twin)):
        set_gradients(each, 2)
        owner.step()
    assert same_bits(everything(params, optimizer), everything(twin_params, twin))
