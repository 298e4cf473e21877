import itertools
import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from optimizers import Aurora, Settings, directions, reference, routes
from optimizers.directions import aurora, aurora_counted, leverage, lr_scale, muon
from optimizers.options import DEFAULTS
from optimizers.polar.precision import gram_matrix
from tests.optimizers.helpers import error, gaussian, low_rank, row_spread, with_condition

TALL = [(16, 4), (64, 16), (33, 30), (9, 1), (40, 36)]
RULES: list[dict[str, Any]] = [
    {"balance_rule": "odds"},
    {"balance_rule": "tyler"},
    {"balance_rule": "tyler", "beta": 0.3},
]


def uneven(m: int, n: int, seed: int = 0, batch: tuple[int, ...] = ()) -> Tensor:
    """Random matrices whose rows differ in size as those of a gradient do."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*batch, m, n, generator=generator)
    return x * torch.randn(*batch, m, 1, generator=generator).exp()


def oracle(x: Tensor, iterations: int, rule: dict[str, Any]) -> Tensor:
    return reference.aurora(x, iterations=iterations, **rule)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@pytest.mark.parametrize(("m", "n"), TALL)
def test_aurora_equals_the_reference_on_tall_matrices(m: int, n: int, iterations: int, rule: dict[str, Any]) -> None:
    x = uneven(m, n)
    wanted = oracle(x, iterations, rule)
    for row_balance, bound in (("polar", 2e-5), ("leverage", 2e-4), ("gram", 2e-3)):
        assert error(aurora(x, polar="svd", iterations=iterations, row_balance=row_balance, **rule), wanted) < bound


@pytest.mark.parametrize("rule", RULES)
def test_aurora_equals_the_reference_on_wide_matrices_by_transposition(rule: dict[str, Any]) -> None:
    x = uneven(18, 5).mT
    for scope in ("all", "wide"):
        got = aurora(x, polar="svd", iterations=3, scope=scope, **rule)
        assert error(got, oracle(x.mT, 3, rule).T) < 2e-5


@pytest.mark.parametrize("rule", RULES)
def test_aurora_equals_the_reference_on_deficient_matrices(rule: dict[str, Any]) -> None:
    for m, n, rank in ((24, 8, 5), (24, 8, 1), (30, 4, 3)):
        x = low_rank(m, n, rank, seed=3)
        d = aurora(x, polar="svd", iterations=3, **rule)
        assert error(d, oracle(x, 3, rule)) < 1e-4
        assert float(d.double().square().sum()) == pytest.approx(rank, abs=1e-4)


@pytest.mark.parametrize("rule", RULES)
def test_zero_rows_stay_zero_and_disturb_no_other(rule: dict[str, Any]) -> None:
    x = uneven(20, 5)
    gaps = torch.cat([x[:7], torch.zeros(3, 5), x[7:], torch.zeros(1, 5)])
    d = aurora(gaps, polar="svd", iterations=3, **rule)
    assert error(d, oracle(gaps, 3, rule)) < 2e-5
    assert not d[7:10].any()
    assert not d[-1].any()
    without = aurora(x, polar="svd", iterations=3, **rule)
    assert torch.allclose(torch.cat([d[:7], d[10:-1]]), without, atol=1e-5)
    assert not aurora(gaps, iterations=3, **rule)[7:10].any()


@pytest.mark.parametrize("polar", ["svd", "quintic"])
@pytest.mark.parametrize("rule", RULES)
def test_as_few_live_rows_as_columns_have_no_freedom(polar: str, rule: dict[str, Any]) -> None:
    # t = 1: the odds rule alone would divide by zero.
    x = torch.cat([uneven(4, 4), torch.zeros(6, 4)])
    d = aurora(x, polar=polar, iterations=4, **rule)
    assert error(d, oracle(x, 4, rule)) < (1e-5 if polar == "svd" else 0.05)
    assert error(d[:4], reference.polar(x[:4] / x[:4].norm(dim=1, keepdim=True))) < (1e-5 if polar == "svd" else 0.05)


@pytest.mark.parametrize("exponent", [-20, -8, 18, 20])
def test_extreme_scales_give_the_same_direction(exponent: int) -> None:
    x = uneven(24, 6)
    wanted = oracle(x, 3, RULES[0])
    scaled = (x.double() * 10.0**exponent).float()
    assert error(aurora(scaled, polar="svd", iterations=3), wanted) < 2e-5
    assert error(aurora(scaled, iterations=3), wanted) < 0.03


def test_a_stack_of_different_scales_is_its_single_matrices() -> None:
    stack = uneven(24, 6, batch=(2, 3)) * torch.tensor([1e-20, 1.0, 1e20])[:, None, None]
    stack[1, 1] = 0
    d = aurora(stack, polar="svd", iterations=3)
    for i, j in itertools.product(range(2), range(3)):
        assert torch.allclose(d[i, j], aurora(stack[i, j], polar="svd", iterations=3), atol=1e-6)
        assert error(d[i, j], oracle(stack[i, j], 3, RULES[0])) < 2e-5


def test_quintic_direction_is_near_the_oracle() -> None:
    for m, n in ((64, 16), (96, 32), (40, 36)):
        x = torch.randn(m, n, generator=torch.Generator().manual_seed(5))
        # A condition number of up to about 50, for which the backend states 3 %; two calls.
        assert error(aurora(x), oracle(x, 2, RULES[0])) < 0.06
        assert error(muon(x), reference.polar(x)) < 0.03


def test_two_iterations_leave_rows_within_a_few_percent_and_columns_orthonormal() -> None:
    x = torch.randn(256, 64, generator=torch.Generator().manual_seed(6))
    d = aurora(x)
    assert row_spread(d) < 0.016 < row_spread(muon(x))
    assert row_spread(aurora(x, iterations=3)) < 0.003
    assert torch.allclose(d.T @ d, torch.eye(64), atol=0.02)
    assert float(d.norm(dim=1).mean()) == pytest.approx(math.sqrt(64 / 256), rel=0.01)


def test_odds_beats_tyler_on_nearly_square_matrices() -> None:
    x = uneven(40, 36, seed=7)
    first, odds, tyler = (
        row_spread(aurora(x, polar="svd", iterations=k, balance_rule=rule))  # type: ignore[arg-type]
        for k, rule in ((1, "odds"), (2, "odds"), (2, "tyler"))
    )
    assert odds < first / 5
    assert tyler > first / 5


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_invariances_of_the_direction(iterations: int, rule: dict[str, Any]) -> None:
    x = uneven(20, 6, seed=8)
    generator = torch.Generator().manual_seed(9)

    def direction(u: Tensor) -> Tensor:
        return aurora(u, polar="svd", iterations=iterations, **rule)

    d = direction(x)
    rows = torch.rand(20, 1, generator=generator) * 10 + 0.1
    assert torch.allclose(direction(rows * x), d, atol=1e-5)
    order = torch.randperm(20, generator=generator)
    assert torch.allclose(direction(x[order]), d[order], atol=1e-5)
    signs = torch.where(torch.rand(20, 1, generator=generator) < 0.5, -1.0, 1.0)
    assert torch.allclose(direction(signs * x), signs * d, atol=1e-5)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0].float()
    assert torch.allclose(direction(x @ rotation), d @ rotation, atol=1e-4)


@pytest.mark.parametrize(("scope", "balanced"), [("tall", {"tall"}), ("wide", {"wide"}), ("all", {"tall", "wide"})])
def test_forms_outside_the_scope_get_muon(scope: Any, balanced: set[str]) -> None:
    for form, (m, n) in {"tall": (12, 4), "wide": (4, 12), "square": (6, 6)}.items():
        x = uneven(m, n)
        for polar in ("svd", "quintic"):
            same = torch.equal(aurora(x, scope=scope, polar=polar), muon(x, polar=polar))
            assert same == (form not in balanced)


@pytest.mark.parametrize("polar", ["svd", "quintic", "quintic_exact"])
def test_a_zero_matrix_has_a_zero_direction(polar: str) -> None:
    zeros = torch.zeros(2, 8, 3)
    assert torch.equal(muon(zeros, polar=polar), zeros)
    for scope, eps_mode in itertools.product(("tall", "all"), ("relative", "absolute")):
        d = aurora(zeros, polar=polar, scope=scope, iterations=3, eps_mode=eps_mode)  # type: ignore[arg-type]
        assert torch.equal(d, zeros)
    mixed = torch.stack([torch.zeros(8, 3), uneven(8, 3)])
    assert torch.equal(aurora(mixed, polar=polar)[0], zeros[0])
    assert error(aurora(mixed, polar=polar)[1], oracle(mixed[1], 2, RULES[0])) < 0.1


def test_a_matrix_that_is_not_finite_spoils_only_itself() -> None:
    x = uneven(8, 3, batch=(3,))
    clean = aurora(x, polar="svd", iterations=3)
    x[1, 4, 1] = float("nan")
    d = aurora(x, polar="svd", iterations=3)
    assert bool(d[1].isnan().all())
    assert torch.equal(d[[0, 2]], clean[[0, 2]])


def test_directions_are_pure() -> None:
    for shape in ((8, 3), (3, 8), (5, 5)):
        u = uneven(*shape)
        before = u.clone()
        for d in (muon(u), aurora(u), aurora(u, scope="all", eps_mode="absolute")):
            assert d.dtype == torch.float32
            d.zero_()
            assert torch.equal(u, before)


def test_bf16_input_gives_fp32_directions() -> None:
    u = uneven(16, 4).bfloat16()
    d = aurora(u, polar="svd")
    assert d.dtype == torch.float32
    assert error(d, oracle(u.float(), 2, RULES[0])) < 2e-5


def test_fp64_input_keeps_its_rank() -> None:
    generator = torch.Generator().manual_seed(4)
    left, right = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((20, 3), (3, 7)))
    d = aurora(left @ right, polar="svd")
    assert d.dtype == torch.float32
    assert error(d, oracle(left @ right, 2, RULES[0])) < 1e-5
    assert error(aurora(uneven(16, 4).double()), oracle(uneven(16, 4), 2, RULES[0])) < 0.05


def test_unknown_options_are_refused() -> None:
    x = torch.randn(6, 2)
    for bad in (
        {"scope": "tal"},
        {"balance_rule": "odd"},
        {"row_balance": "lev"},
        {"eps_mode": "abs"},
        {"iterations": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            aurora(x, **bad)
    with pytest.raises(ValueError, match="polar is 'cubic': expected one of gram"):
        aurora(x, polar="cubic")
    with pytest.raises(ValueError, match="lr_scale"):
        lr_scale("aspct", 2, 3)


@pytest.mark.parametrize(
    ("kind", "m", "n", "value"),
    [
        ("aspect", 1024, 256, 2.0),
        ("aspect", 256, 1024, 1.0),
        ("aspect", 256, 256, 1.0),
        ("rms", 1024, 256, 6.4),
        ("rms", 256, 1024, 6.4),
        ("spectral", 1024, 256, 2.0),
        ("spectral", 256, 1024, 0.5),
    ],
)
def test_lr_scales(kind: str, m: int, n: int, value: float) -> None:
    assert lr_scale(kind, m, n) == pytest.approx(value)


def test_group_options_reach_the_direction() -> None:
    u = uneven(18, 6)
    changed = {"scope": "all", "iterations": 3, "beta": 0.4, "balance_rule": "tyler", "row_balance": "polar"}
    options = DEFAULTS["matrix"] | changed | {"polar": "svd"}
    expected = aurora(u, polar="svd", **changed)  # type: ignore[arg-type]
    assert torch.equal(directions.from_options(u, options).d, expected)
    assert torch.equal(directions.from_options(u, {**options, "direction": "muon"}).d, muon(u, polar="svd"))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 8), more=st.integers(1, 16), seed=st.integers(0, 999), exponent=st.integers(-60, 60))
def test_aurora_equals_the_reference_everywhere(n: int, more: int, seed: int, exponent: int) -> None:
    x = uneven(n + more, n, seed=seed)
    got = aurora(x * 2.0**exponent, polar="svd", row_balance="polar", iterations=3)
    # One row more than columns: leverages near 1, of which fp32 holds 1 - l to few digits.
    assert error(got, oracle(x, 3, RULES[0])) < 1e-3


@pytest.mark.parametrize("ratio", [1.001, 1.004, 1.01, 1.02, 1.03, 1.04, 1.1])
@pytest.mark.parametrize("wide", [False, True])
def test_nearly_square_matrices_are_muons_and_the_table_says_so(ratio: float, wide: bool) -> None:
    """Their scores near 1 lose digits in fp32, and the direction would be 5 to 30 % off its definition."""
    n = 96
    m = max(n + 1, round(n * ratio))
    x = gaussian(m, n, 5).float()
    x = x.T.contiguous() if wide else x
    options = DEFAULTS["matrix"] | {"scope": "all"}
    row = routes(nn.Sequential(nn.Linear(*reversed(x.shape)), nn.LayerNorm(len(x))), Settings(matrix={"scope": "all"}))[
        0
    ]
    d = directions.from_options(x, options).d
    assert row.direction == ("muon" if m < 1.03 * n else "aurora")
    assert error(d, reference.aurora(x, scope="all")) < 0.02
    assert torch.equal(d, muon(x)) == (row.direction == "muon")


@pytest.mark.parametrize(("row_balance", "polar"), [("leverage", "gram"), ("polar", "quintic")])
def test_hard_matrices_reach_the_fallback_which_is_counted(row_balance: str, polar: str) -> None:
    u = torch.stack([with_condition(40, 12, 1e5, seed).float() for seed in range(12)])
    found = aurora_counted(u, iterations=6, row_balance=row_balance, polar=polar)  # type: ignore[arg-type]
    assert int(found.fallbacks.sum()) >= 3
    assert bool(found.d.isfinite().all())
    # It is rounding that raises the spread of these: exact scores never do.
    assert not aurora_counted(u, iterations=6, row_balance="polar", polar="svd").fallbacks.any()
    weights = [torch.nn.Parameter(torch.zeros(40, 12)) for _ in u]
    optimizer = Aurora(weights, iterations=6, polar=polar, row_balance=row_balance, momentum=0.0, nesterov=False)
    for p, grad in zip(weights, u, strict=True):
        p.grad = grad

    optimizer.step()
    assert int(optimizer.last_step_fallbacks) == int(found.fallbacks.sum())
    assert int(optimizer.last_step_retries) == int(found.retries.sum())


def test_a_failed_factorisation_is_retried_and_counted() -> None:
    x = torch.randn(3, 20, 4)
    x[1, :, 3] = x[1, :, 2] * (1 + 1e-7)
    bad = -torch.eye(4)

    def planted(stack: torch.Tensor) -> torch.Tensor:
        gram = gram_matrix(stack)
        gram[2] = bad
        return gram

    with mock.patch.object(leverage, "gram_matrix", planted):
        scores, retries = leverage.from_cholesky(x, lambda stack: (torch.full((len(stack), 20, 1), 0.5), stack))
    assert retries.tolist()[0] == 0
    # Not positive definite with any ridge: one retry for the second ridge, one for the polar factor in its place.
    assert retries.tolist()[2] == 2
    assert torch.equal(scores[2], torch.full((20, 1), 0.5))
    assert float(scores[0].sum()) == pytest.approx(4, rel=1e-4)


def test_a_missing_second_moment_is_no_silent_muon() -> None:
    for named in ({"direction": "normuon"}, {"direction": "u_normuon", "running_norms": True}):
        options = DEFAULTS["matrix"] | named
        with pytest.raises(ValueError, match="needs its second moment"):
            directions.from_options(torch.randn(6, 2), options)
        # A wide matrix has unit rows without it.
        x = torch.randn(2, 6)
        assert torch.equal(directions.from_options(x, options).d, muon(x))


@pytest.mark.parametrize(("m", "n"), [(23, 7), (31, 10), (64, 24), (129, 51), (300, 100), (513, 130)])
def test_with_svd_a_direction_has_the_same_bits_in_any_stack(m: int, n: int) -> None:
    """Other numbers of ranks make other stacks."""
    x = uneven(m, n, batch=(5,))
    together = aurora(x, polar="svd")
    assert all(torch.equal(aurora(x[i].clone(), polar="svd"), together[i]) for i in range(5))
    assert torch.equal(aurora(x[1:4], polar="svd"), together[1:4])
