from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from optimizers.directions import aurora_counted
from optimizers.directions.row_balance import balance
from optimizers.reference import leverage_scores


def true_leverage(u: Tensor) -> Callable[[Tensor], Tensor]:
    def leverage(D: Tensor) -> Tensor:
        return leverage_scores(D.double() * u.double()).float()[:, None]

    return leverage


def scripted(*answers: Tensor) -> Callable[[Tensor], Tensor]:
    """A leverage function that gives these answers in turn, whatever D is."""
    remaining = list(answers)
    return lambda _: remaining.pop(0)


def test_one_odds_step_sets_a_single_row_exactly() -> None:
    # l_i / (1 - l_i) is linear in D_i^2 while the other rows are held (Sherman-Morrison).
    u = torch.randn(12, 4, dtype=torch.float64)
    D = torch.ones(12, 1, dtype=torch.float64)
    before = leverage_scores(D * u)
    wanted = 0.4
    D[5] *= float((wanted / (1 - wanted) * (1 - before[5]) / before[5]).sqrt())
    assert float(leverage_scores(D * u)[5]) == pytest.approx(wanted, rel=1e-9)


def test_the_first_scale_is_one_over_the_row_norms() -> None:
    u = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-12, 0.0]])
    relative = balance(u, scripted(), updates=0).D
    assert torch.allclose(relative[:, 0], torch.tensor([0.2, 0.0, 1 / 5e-7]))
    absolute = balance(u, scripted(), updates=0, eps_mode="absolute").D
    assert torch.allclose(absolute[:, 0], torch.tensor([0.2, 0.0, 1e7]))


def test_both_rules_settle_at_even_leverage() -> None:
    u = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
    found = []
    for rule, updates in (("odds", 12), ("tyler", 60)):
        D = balance(u, true_leverage(u), updates=updates, rule=rule).D  # type: ignore[arg-type]
        leverage = leverage_scores((D * u).double())
        assert float((leverage - 6 / 24).abs().max()) < 1e-5
        found.append(D / D.norm())
    assert torch.allclose(found[0], found[1], rtol=1e-3)


def test_a_step_that_raises_the_spread_is_taken_back_for_a_tyler_step() -> None:
    u = torch.eye(4, 2) + 0.5
    even, uneven = torch.tensor([[0.4], [0.6], [0.5], [0.5]]), torch.tensor([[0.1], [0.9], [0.5], [0.5]])
    first = balance(u, scripted(), updates=0).D
    D, fallbacks = balance(u, scripted(even, uneven), updates=2)
    assert int(fallbacks) == 1
    assert torch.allclose(D, first * (0.5 / even).sqrt())

    # The same answers the other way round: each step lowers the spread, and both are odds steps.
    D, fallbacks = balance(u, scripted(uneven, even), updates=2)
    assert int(fallbacks) == 0
    assert torch.allclose(D, first * ((1 - uneven) / uneven * (1 - even) / even).sqrt())


def test_after_a_fallback_the_rule_goes_on_from_the_tyler_step() -> None:
    u = torch.eye(4, 2) + 0.5
    even, uneven, flat = (torch.tensor([[0.5 - e], [0.5 + e], [0.5], [0.5]]) for e in (0.1, 0.4, 0.05))
    first = balance(u, scripted(), updates=0).D
    D, fallbacks = balance(u, scripted(even, uneven, flat), updates=3)
    assert int(fallbacks) == 1
    assert torch.allclose(D, first * (0.5 / even).sqrt() * ((1 - flat) / flat).sqrt())


def test_fallbacks_are_counted_per_matrix_and_tyler_has_none() -> None:
    u = (torch.eye(4, 2) + 0.5).expand(2, 4, 2)
    even, uneven = torch.tensor([[0.4], [0.6], [0.5], [0.5]]), torch.tensor([[0.1], [0.9], [0.5], [0.5]])
    answers = torch.stack([even, uneven]), torch.stack([uneven, even])
    assert balance(u, scripted(*answers), updates=2).fallbacks.tolist() == [1, 0]
    assert balance(u, scripted(*answers), updates=2, rule="tyler").fallbacks.tolist() == [0, 0]


def test_differences_below_the_resolution_of_bf16_are_no_fallback() -> None:
    u = torch.eye(4, 2) + 0.5
    even, noisy = (torch.tensor([[0.5 - e], [0.5 + e], [0.5], [0.5]]) for e in (0.001, 0.002))
    assert int(balance(u, scripted(even, noisy), updates=2).fallbacks) == 0


def test_directions_report_their_fallbacks() -> None:
    # Leverage is 0 or 1 whatever D is: no even scaling exists, and nothing of it may become NaN.
    u = torch.block_diag(torch.eye(3), torch.ones(5, 1))
    for polar in ("svd", "quintic"):
        direction = aurora_counted(u, iterations=8, polar=polar)
        assert bool(direction.d.isfinite().all())
        assert direction.fallbacks.shape == ()
        assert direction.fallbacks.dtype == torch.int64
