"""The reference from a direction to a new weight, against torch's optimizers and formulas put together by hand."""

import math
from typing import Any

import pytest
import torch

from optimizers import reference
from tests.optimizers.helpers import DIRECTIONS, OPTIONS, error, every_direction, gaussian, uneven, with_condition


def test_contra_subtracts_the_share_of_the_momentum_and_keeps_the_size() -> None:
    u = with_condition(12, 5, 1000)
    d = reference.muon(u)
    got = reference.contra(d, u, 0.2)
    wanted = d - 0.2 * u / torch.linalg.svdvals(u)[0]
    assert error(got, wanted * (d.norm() / wanted.norm())) < 0.01
    assert error(reference.contra(d, u * 1e-20, 0.2), got) < 1e-12
    assert not reference.contra(torch.zeros(3, 2), torch.zeros(3, 2), 0.2).any()
    assert error(reference.contra(d, u, 0.0), d) < 1e-12


def test_the_floor_lengthens_short_steps_only() -> None:
    step, w = gaussian(4, 3), gaussian(4, 3, 1)
    short = reference.uw_floor(step * 1e-3, w, 0.35)
    assert float(short.norm()) == pytest.approx(0.35 * float(w.norm()))
    assert torch.allclose(torch.cosine_similarity(short, step), torch.ones(4, dtype=torch.float64))
    assert torch.equal(reference.uw_floor(step, w, 0.01), step)
    assert not reference.uw_floor(torch.zeros(4, 3), w, 0.35).any()
    assert torch.equal(reference.uw_floor(step, torch.zeros(4, 3), 0.35), step)


@pytest.mark.parametrize(
    ("m", "n", "aspect", "rms", "spectral"), [(8, 2, 2, 0.4 * 2**0.5, 2), (2, 8, 1, 0.4 * 2**0.5, 0.5)]
)
def test_lr_scales(m: int, n: int, aspect: float, rms: float, spectral: float) -> None:
    assert [reference.lr_scale(kind, m, n) for kind in ("aspect", "rms", "spectral")] == pytest.approx(
        [aspect, rms, spectral]
    )


def test_cautious_decay_leaves_entries_that_the_step_enlarges() -> None:
    w, d = torch.tensor([2.0, -2.0, 2.0, -2.0]), torch.tensor([1.0, 1.0, -1.0, 0.0])
    assert reference.decayed(w, d, lr=0.5, weight_decay=0.2).tolist() == pytest.approx([1.8, -1.8, 1.8, -1.8])
    cautious = reference.decayed(w, d, lr=0.5, weight_decay=0.2, cautious=True)
    assert cautious.tolist() == pytest.approx([1.8, -2.0, 2.0, -1.8])


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_weight_moves_by_the_polar_factor_of_the_blended_momentum(nesterov: bool) -> None:
    w, b, momentum = gaussian(6, 6), torch.zeros(6, 6), torch.zeros(6, 6, dtype=torch.float64)
    for seed in range(3):
        g = gaussian(6, 6, seed + 2)
        before = w
        w, b, v = reference.step(w, g, b, OPTIONS | {"nesterov": nesterov})
        momentum.lerp_(g, 0.1)
        u = g.lerp(momentum, 0.9) if nesterov else momentum
        assert error((before * (1 - 0.1 * 0.2) - w) / 0.1, reference.polar(u)) < 1e-9
        assert error(b, momentum) < 1e-12
        assert v is None


def test_a_step_puts_the_parts_in_their_order() -> None:
    w, g, b = gaussian(12, 3), uneven(12, 3), gaussian(12, 3, 4)
    options = OPTIONS | {"direction": "normuon", "contra": 0.2, "uw_floor": 5.0, "cautious": True}
    new_w, new_b, v = reference.step(w, g, b, options, torch.full((12,), 0.1))
    assert v is not None
    # The floor of 5 |w| dominates, and the decay is small compared with it.
    assert float((w - new_w).norm()) == pytest.approx(0.1 * 5 * float(w.norm()), rel=0.05)
    u = g + 0.9 * (new_b - g)
    d, wanted_v = reference.normuon(u, torch.full((12,), 0.1))
    d = 2 * reference.contra(d, u, 0.2)
    d = d * 5 * w.norm() / d.norm()
    assert error(v, wanted_v) < 1e-12
    assert error(new_w, w - 0.1 * 0.2 * torch.where(d * w >= 0, w, 0.0) - 0.1 * d) < 1e-12


def test_adamw_equals_torchs() -> None:
    w = gaussian(4, 3)
    theirs = torch.nn.Parameter(w.clone())
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([theirs], **options)  # type: ignore[arg-type]
    first, second = torch.zeros(4, 3), torch.zeros(4, 3)
    for count in (1, 2, 3):
        theirs.grad = gaussian(4, 3, count)
        optimizer.step()
        w, first, second = reference.adamw_step(w, theirs.grad, first, second, count, options)
        assert error(w, theirs.detach()) < 1e-12


def test_a_bad_gradient_changes_nothing() -> None:
    w, b, g = gaussian(4, 2), gaussian(4, 2, 1), gaussian(4, 2, 2)
    g[1, 1] = math.inf
    for name in DIRECTIONS:
        after = reference.step(w, g, b, OPTIONS | {"direction": name}, torch.ones(4))
        assert all(torch.equal(x.double(), y) for x, y in zip((w, b, torch.ones(4)), after, strict=True))  # type: ignore[arg-type]
    options = {"lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-8, "weight_decay": 0.1}
    assert all(torch.equal(x, y) for x, y in zip((w, b, b), reference.adamw_step(w, g, b, b, 3, options), strict=True))


@pytest.mark.parametrize("options", every_direction())
def test_arguments_are_not_changed_nor_shared(options: dict[str, Any]) -> None:
    options = options | {"contra": 0.2, "uw_floor": 0.1, "weight_decay": 0.1, "nesterov": False}
    given = [uneven(8, 3), uneven(8, 3, 1), uneven(8, 3, 2), torch.rand(8, dtype=torch.float64)]
    before = [x.clone() for x in given]
    w, g, b, v = given
    for result in reference.step(w, g, b, options, v):
        if result is not None:
            result.zero_()
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


def test_bad_arguments_are_refused_by_name() -> None:
    u = gaussian(6, 2)
    for name, call in {
        "scope": lambda: reference.aurora(u, scope="tal"),
        "balance_rule": lambda: reference.aurora(u, balance_rule="odd"),
        "eps_mode": lambda: reference.aurora(u, eps_mode="abs"),
        "iterations": lambda: reference.aurora(u, iterations=0),
        "riemannian": lambda: reference.riemannian_aurora(u, riemannian="real"),
        "outer_steps": lambda: reference.riemannian_aurora(u, outer_steps=-1),
        "target": lambda: reference.normuon(u, torch.zeros(6), target="one"),
        "lr_scale": lambda: reference.lr_scale("aspct", 2, 3),
        "direction": lambda: reference.direction(u, {"direction": "moun"}),
        "one real matrix": lambda: reference.polar(torch.zeros(2, 3, 4)),
    }.items():
        with pytest.raises(ValueError, match=name):
            call()
