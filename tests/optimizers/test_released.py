"""`preset="released"` against the released arithmetic, written out once more: plain torch, one weight at a time."""

import pytest
import torch
from torch import Tensor

from optimizers import Aurora
from optimizers.directions import aurora

ETA, MU, DECAY = 0.05, 0.95, 0.025


def released_polar(x: Tensor) -> Tensor:
    """12 quintic steps in bf16 on the wide orientation; the coefficients act on the products from the left."""
    is_tall = x.shape[0] > x.shape[1]
    y = x.to(torch.bfloat16)
    if is_tall:
        y = y.mT
    y = y / (y.norm() + 1e-7)
    for _ in range(12):
        gram = y @ y.mT
        correction = (-1.5) * gram + ((0.5 * gram) @ gram)
        y = 2 * y + correction @ y
    return y.mT if is_tall else y


def released_direction(u: Tensor) -> Tensor:
    """Two polar calls with one undamped tyler step between them; square matrices get one call."""
    if u.shape[0] == u.shape[1]:
        return released_polar(u)
    tall = u if u.shape[0] > u.shape[1] else u.mT
    scale = 1 / tall.norm(dim=-1, keepdim=True).clamp(min=1e-7)
    lengths = released_polar(scale * tall).float().pow(2).sum(dim=-1, keepdim=True)
    scale = scale * ((tall.shape[1] / tall.shape[0]) / lengths.clamp(min=1e-14)).pow(0.5)
    d = released_polar(scale * tall)
    return d if u.shape[0] > u.shape[1] else d.mT


def released_step(w: Tensor, momentum: Tensor, grad: Tensor, *, nesterov: bool = True) -> None:
    momentum.lerp_(grad, 1 - MU)
    u = grad.lerp(momentum, MU) if nesterov else momentum
    d = released_direction(u)
    d = d * max(1, w.shape[0] / w.shape[1]) ** 0.5
    w.mul_(1 - ETA * DECAY)
    w.add_(d, alpha=-ETA)


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_preset_repeats_the_released_steps_bit_for_bit(nesterov: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 6), (24, 6), (6, 24), (8, 8), (17, 16), (7, 1)]
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in shapes]
    expected = [w.detach().clone() for w in weights]
    momenta = [torch.zeros(shape) for shape in shapes]
    given = {} if nesterov else {"nesterov": False}
    optimizer = Aurora(weights, lr=ETA, preset="released", **given)
    for step in range(4):
        for w, wanted, momentum in zip(weights, expected, momenta, strict=True):
            # Gradients of uneven rows and of sizes from 1e-3 to 1, one row of them zero.
            grad = torch.randn(w.shape, generator=generator) * torch.rand(w.shape[0], 1, generator=generator)
            grad[0] = 0
            w.grad = grad * 10.0 ** (-step)
            released_step(wanted, momentum, w.grad.clone(), nesterov=nesterov)
        optimizer.step()
        for w, wanted, momentum in zip(weights, expected, momenta, strict=True):
            assert torch.equal(w, wanted), f"step {step}, shape {tuple(w.shape)}"
            assert torch.equal(optimizer.state[w]["momentum"], momentum)


LARGE: list[list[tuple[int, int]]] = [
    [(512, 128)],
    [(300, 299)] * 3,
    [(1024, 256)],
    [(256, 1024)] * 3,
    [(257, 64), (257, 64)],
    [(299, 300)],
]


@pytest.mark.parametrize("shapes", LARGE, ids=str)
def test_large_and_tall_matrices_repeat_the_released_directions_bit_for_bit(shapes: list[tuple[int, int]]) -> None:
    """From about 257 rows on a sum over a row depends on how the factor lies in memory."""
    generator = torch.Generator().manual_seed(3)
    u = torch.stack([torch.randn(shape, generator=generator) for shape in shapes])
    u *= torch.rand(len(u), u.shape[1], 1, generator=generator)
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    optimizer = Aurora(
        weights, lr=1.0, preset="released", momentum=0.0, nesterov=False, lr_scale="rms", weight_decay=0.0
    )
    found: list[Tensor] = []
    optimizer.direction_observer = lambda _, d: found.append(d.clone())
    for w, grad in zip(weights, u, strict=True):
        w.grad = grad.clone()
    optimizer.step()
    for d, grad in zip(found, u, strict=True):
        assert torch.equal(d, released_direction(grad.clone()).float())


def test_the_preset_is_what_the_options_say() -> None:
    w = torch.nn.Parameter(torch.randn(8, 2))
    group = Aurora([w], preset="released").param_groups[0]
    expected = {
        "direction": "aurora",
        "scope": "all",
        "row_balance": "polar",
        "balance_rule": "tyler",
        "beta": 0.5,
        "iterations": 2,
        "polar": "quintic_exact",
        "eps_mode": "absolute",
        "momentum": 0.95,
        "nesterov": True,
        "weight_decay": 0.025,
        "lr_scale": "aspect",
    }
    assert {key: group[key] for key in expected} == expected


def test_our_default_arithmetic_is_near_the_released_one() -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))
    ours = aurora(x, balance_rule="tyler", scope="all")
    assert float((ours - released_direction(x).float()).norm() / ours.norm()) < 0.02


def test_absolute_eps_has_the_released_range_and_relative_has_not() -> None:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(2)) * 1e-25
    tiny = aurora(x, eps_mode="absolute", balance_rule="tyler", polar="quintic_exact", row_balance="polar")
    assert torch.equal(tiny, released_direction(x).float())
    assert float(tiny.norm()) < 1.5
    assert float(aurora(x).norm()) == pytest.approx(2.0, rel=0.01)
