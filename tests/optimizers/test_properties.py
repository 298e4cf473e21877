"""Every direction by every polar backend against the reference, on matrices that hypothesis thinks of.

How near a direction must be to its twin follows from what its backend states (optimizers.polar.ERRORS) and from the
matrix: `allowed` adds up what each polar call and each row of leverage scores may be off. Where that leaves
nothing to compare (a singular value below the cut, more than m/n rows in one direction) only bounds are asked for.
"""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from optimizers import reference
from optimizers.directions import from_options, row_slot
from optimizers.directions.speedrun import contra, uw_floor
from optimizers.polar import ERRORS, polar
from tests.optimizers.helpers import OPTIONS, error, gaussian, low_rank, row_spread, with_condition

METHODS = sorted(ERRORS)
# Singular values below this share of the Frobenius norm are compared with nothing (see optimizers.polar).
CUT = 2.0**-10
# With a larger error than this, two directions do not resemble each other.
VACUOUS = 0.5

VARIANTS: dict[str, dict[str, Any]] = {
    "muon": {"direction": "muon"},
    "normuon": {"direction": "normuon"},
    "normuon_unit": {"direction": "normuon", "normuon_target": "unit"},
    "u_normuon": {"direction": "u_normuon"},
    "u_normuon_running": {"direction": "u_normuon", "running_norms": True},
    "aurora_1": {"direction": "aurora", "iterations": 1},
    "aurora_2": {"direction": "aurora", "row_balance": "auto"},
    "aurora_polar": {"direction": "aurora", "iterations": 3, "row_balance": "polar"},
    "aurora_leverage": {"direction": "aurora", "iterations": 3, "row_balance": "leverage"},
    "aurora_gram": {"direction": "aurora", "iterations": 3, "row_balance": "gram"},
    "aurora_tyler": {"direction": "aurora", "iterations": 3, "balance_rule": "tyler", "row_balance": "polar"},
    "aurora_damped": {"direction": "aurora", "iterations": 3, "balance_rule": "tyler", "beta": 0.3},
    "aurora_all": {"direction": "aurora", "scope": "all"},
    "aurora_wide": {"direction": "aurora", "scope": "wide"},
    "riemannian": {"direction": "riemannian_aurora"},
    "riemannian_all": {"direction": "riemannian_aurora", "scope": "all", "outer_steps": 1},
    "riemannian_released": {"direction": "riemannian_aurora", "riemannian": "released"},
}


@dataclass(frozen=True)
class Case:
    """A matrix by what it is made of."""

    kind: str
    m: int
    n: int
    condition: float
    row_deviation: float
    scale: float
    seed: int

    def matrix(self) -> Tensor:
        """[m, n] fp32."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.kind == "zero":
            return torch.zeros(self.m, self.n)
        if self.kind == "low rank":
            rank = 1 + self.seed % max(1, min(self.m, self.n) - 1)
            # A power of two keeps the whole numbers exact, and with them the rank.
            return low_rank(self.m, self.n, rank, self.seed) * 2.0 ** round(math.log2(self.scale))
        x = with_condition(self.m, self.n, self.condition, self.seed)
        x = x * (self.row_deviation * torch.randn(self.m, 1, generator=generator, dtype=torch.float64)).exp()
        if self.kind == "zero rows":
            x[torch.rand(self.m, generator=generator) < 0.3] = 0
        if self.kind == "repeated rows":
            x = x[torch.randint(0, 1 + self.m // 2, (self.m,), generator=generator)]
        return (x / x.abs().max().clamp(min=1e-30) * self.scale).float()


SMALL = st.tuples(st.integers(1, 12), st.integers(1, 12))
LARGER = st.sampled_from([(48, 16), (16, 48), (33, 32), (40, 40), (96, 24), (200, 1), (1, 200)])
LARGEST = [(512, 64), (64, 512), (64, 64)]
KINDS = ("full", "zero rows", "repeated rows", "low rank", "zero")


@st.composite
def cases(draw: st.DrawFn, shapes: st.SearchStrategy[tuple[int, int]] = SMALL | SMALL | LARGER) -> Case:
    m, n = draw(shapes)
    return Case(
        kind=draw(st.sampled_from(KINDS)),
        m=m,
        n=n,
        condition=10 ** draw(st.floats(0, 2.5)),
        row_deviation=draw(st.floats(0, 1.5)),
        scale=10 ** draw(st.floats(-20, 20)),
        seed=draw(st.integers(0, 10_000)),
    )


def options_of(variant: str, method: str, dtype: str) -> dict[str, Any]:
    return OPTIONS | {"row_balance": "auto"} | VARIANTS[variant] | {"polar": method, "polar_dtype": dtype}


def is_scaled(options: dict[str, Any]) -> bool:
    """Whether the released code's own arithmetic is asked for, which does depend on the scale of u."""
    return options["polar"] == "quintic_exact" or options["riemannian"] == "released"


def spread_of(x: Tensor) -> float:
    """The Frobenius norm over the smallest singular value that is not zero."""
    sigma = torch.linalg.svdvals(x.double())
    return float(sigma.norm() / sigma[sigma > max(x.shape) * 2.0**-52 * sigma[0]][-1])


def is_deficient(x: Tensor) -> bool:
    """Whether a singular value lies below the cut."""
    sigma = torch.linalg.svdvals(x.double())
    return bool(sigma[-1] < CUT * sigma.norm())


def is_balanced(m: int, n: int, options: dict[str, Any]) -> bool:
    form = "tall" if m > n else "wide"
    is_aurora = options["direction"] in ("aurora", "riemannian_aurora")
    return is_aurora and m != n and options["scope"] in ("all", form)


def allowed(u: Tensor, options: dict[str, Any]) -> float:
    """How far the direction of u may be from the reference, relative; infinity where they cannot be compared."""
    stated = ERRORS[options["polar"], options["polar_dtype"]]
    is_svd = options["polar"] == "svd"
    if is_deficient(u) and not (is_svd and options["direction"] != "riemannian_aurora"):
        return math.inf
    own = stated.at(spread_of(u))
    if options["direction"] in ("normuon", "u_normuon") and u.shape[0] > u.shape[1]:
        return own * enlargement(u)
    if not is_balanced(*u.shape, options):
        return own
    tall = u.double() if u.shape[0] > u.shape[1] else u.double().T
    if options["direction"] == "riemannian_aurora":
        if options["riemannian"] == "released" or stated.floor > 1e-3:
            # The released M is indefinite, and conjugate gradients make of rounding what they like (see the last
            # test); the exact one is solved in at most 20 steps, which enlarge an error of some per cent.
            return math.inf
        # The first polar factor, two for each step of near orthonormal matrices, and the rounding of the multipliers.
        later = 2 * options["outer_steps"] * stated.at(2 * math.sqrt(tall.shape[1]))
        return (2 * own + later) * enlargement(tall) + 1e-3
    return _allowed_of_balance(tall, options, is_svd)


def enlargement(u: Tensor) -> float:
    """How much the shortest row of polar(u), and the error in it, is enlarged where rows are made even."""
    norms = reference.polar(u).norm(dim=1)
    return max(1.0, math.sqrt(u.shape[1] / u.shape[0]) / float(norms[norms > 0].min()))


def _allowed_of_balance(tall: Tensor, options: dict[str, Any], is_svd: bool) -> float:
    """The last polar factor of D u, and what wrong leverage scores make of D.

    A relative error in D_i is one of 1/(1 - l_i) times that of l_i, and turns the direction by no more than itself.
    """
    stated = ERRORS[options["polar"], options["polar_dtype"]]
    total, spread = 0.0, math.inf
    for k in range(1, options["iterations"] + 1):
        D, _ = reference.row_scale(tall, **{key: options[key] for key in BALANCE_KEYS}, iterations=k)
        X = D[:, None] * tall
        if is_deficient(X) and not is_svd:
            return math.inf
        if k == options["iterations"]:
            return 2 * (total + stated.at(spread_of(X)))
        factor = reference.polar(X)
        before, spread = spread, row_spread(factor)
        if abs(spread - before - 2.0**-8) < 1e-3:
            # Rounding decides whether the step is taken back.
            return math.inf
        # fp32 and the ridge for the scores without a polar factor, on the square of the spread.
        of_scores = 2e-4 if options["row_balance"] == "gram" else 1e-6
        of_scores += 1e-7 * spread_of(X) ** 2
        if options["row_balance"] == "polar":
            of_scores = 2 * stated.at(spread_of(X))
        total += of_scores / max(1 - float(factor.square().sum(dim=1).max()), 1e-6)
    raise AssertionError("no iteration")


BALANCE_KEYS = ("beta", "balance_rule", "eps_mode", "tolerance")


def fast(u: Tensor, options: dict[str, Any], v: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The direction of the package and its new second moment, for a stack or one matrix."""
    keeps = row_slot(options, *u.shape[-2:])
    found = from_options(u, options, v if keeps else None)
    return found.d, found.row_state


@pytest.mark.parametrize(("method", "dtype"), METHODS)
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=15, deadline=None, derandomize=True)
@given(case=cases(), starts=st.booleans())
def test_directions_agree_with_the_reference(variant: str, method: str, dtype: str, case: Case, starts: bool) -> None:
    agrees(case, options_of(variant, method, dtype), starts)


@pytest.mark.parametrize(("method", "dtype"), METHODS)
@pytest.mark.parametrize("variant", ["muon", "u_normuon", "aurora_2", "aurora_all", "riemannian"])
@pytest.mark.parametrize(("m", "n"), LARGEST)
def test_larger_matrices_agree_with_the_reference(m: int, n: int, variant: str, method: str, dtype: str) -> None:
    agrees(Case("full", m, n, 20.0, 1.0, 1e-9, 7), options_of(variant, method, dtype), True)


def agrees(case: Case, options: dict[str, Any], starts: bool) -> None:
    """Assert that a direction is finite, bounded, zero where it must be, and near the reference if requested."""
    u = case.matrix()
    if is_scaled(options):
        u = u / u.abs().max().clamp(min=1e-30)
    v = torch.zeros(case.m) if starts else torch.rand(case.m, generator=torch.Generator().manual_seed(case.seed)) / 10
    d, new_v = fast(u, options, v)
    assert d.shape == u.shape
    assert d.dtype == torch.float32
    assert bool(d.isfinite().all())
    assert not d[(u == 0).all(dim=1)].any()
    assert not d[:, (u == 0).all(dim=0)].any()
    wanted, wanted_v = reference.direction(u, options, v)
    if not u.any():
        assert not d.any()
        return
    stated = ERRORS[options["polar"], options["polar_dtype"]]
    if options["direction"] in ("muon", "aurora", "riemannian_aurora"):
        assert float(torch.linalg.svdvals(d.double())[0]) < 1 + stated.floor
    nearness = allowed(u, options)
    if nearness < VACUOUS:
        assert error(d, wanted) < nearness
        if new_v is not None and wanted_v is not None:
            assert error(new_v, wanted_v) < 2 * nearness


# One exact backend, the default one, and the least precise: their invariances differ by rounding only.
SOME_METHODS = [("svd", "auto"), ("gram", "fp32"), ("quintic", "auto")]
UNSCALED = [name for name in VARIANTS if not is_scaled(options_of(name, "svd", "auto"))]


@pytest.mark.parametrize(("method", "dtype"), SOME_METHODS)
@pytest.mark.parametrize("variant", UNSCALED)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(case=cases(), shift=st.floats(-19, 19))
def test_positive_scaling_permutations_and_rotations_pass_through(
    variant: str, method: str, dtype: str, case: Case, shift: float
) -> None:
    options = options_of(variant, method, dtype)
    u = case.matrix()
    if not u.any() or (nearness := allowed(u, options)) >= VACUOUS:
        return
    generator = torch.Generator().manual_seed(case.seed)
    v = torch.rand(case.m, generator=generator) / 10
    rows, columns = (torch.randperm(k, generator=generator) for k in u.shape)
    d, _ = fast(u, options, v)
    permuted, _ = fast(u[rows][:, columns], options, v[rows])
    assert error(permuted, d[rows][:, columns]) <= 2 * nearness
    if case.kind != "low rank":
        largest = float(u.abs().max().clamp(min=1e-30))
        assert error(fast(u.double().div(largest).mul(10**shift).float(), options, v)[0], d) <= 2 * nearness + 1e-4
    if not is_deficient(u) and not (case.m < case.n and is_balanced(case.m, case.n, options)):
        rotation = torch.linalg.qr(gaussian(case.n, case.n, case.seed))[0]
        turned = (u.double() @ rotation).float()
        # Rounding the turned matrix to fp32 is one more change of u.
        rounding = 1e-6 * spread_of(u) * nearness / ERRORS[method, dtype].floor
        assert error(fast(turned, options, v)[0].double() @ rotation.T, d) <= 2 * nearness + rounding


@pytest.mark.parametrize(("method", "dtype"), SOME_METHODS)
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("aurora")])
@settings(max_examples=8, deadline=None, derandomize=True)
@given(case=cases(), deviation=st.floats(0, 3))
def test_positive_row_scaling_changes_no_balanced_direction(
    variant: str, method: str, dtype: str, case: Case, deviation: float
) -> None:
    options = options_of(variant, method, dtype)
    u = case.matrix()
    factors = (deviation * gaussian(max(case.m, case.n), 1, case.seed)).exp().clamp(0.1, 10)
    other = (u.double() / u.abs().max().clamp(min=1e-30) * (factors if case.m > case.n else factors.T)).float()
    if is_balanced(case.m, case.n, options) and u.any() and not is_deficient(u) and not is_deficient(other):
        nearness = allowed(u, options)
        if nearness < VACUOUS:
            assert error(fast(other, options, None)[0], fast(u, options, None)[0]) <= 2 * nearness + 1e-4


@pytest.mark.parametrize(("method", "dtype"), METHODS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_matrix_that_is_not_finite_spoils_only_itself(variant: str, method: str, dtype: str) -> None:
    for shape, bad in (
        ((9, 4), math.nan),
        ((9, 4), math.inf),
        ((4, 9), -math.inf),
        ((5, 5), math.nan),
        ((1, 1), math.inf),
    ):
        spoils_only_itself(shape, bad, options_of(variant, method, dtype))


def spoils_only_itself(shape: tuple[int, int], bad: float, options: dict[str, Any]) -> None:
    stack = torch.stack([gaussian(*shape, seed).float() for seed in range(3)])
    v = torch.full((3, shape[0]), 0.1)
    clean, clean_v = fast(stack, options, v)
    stack[1, -1, 0] = bad
    d, new_v = fast(stack, options, v)
    assert bool(d[1].isnan().all())
    assert error(d[[0, 2]], clean[[0, 2]]) < 1e-6
    if new_v is not None and clean_v is not None:
        assert error(new_v[[0, 2]], clean_v[[0, 2]]) < 1e-6


@pytest.mark.parametrize(("method", "dtype"), METHODS)
@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=5, deadline=None, derandomize=True)
@given(n=st.integers(4, 16), times=st.integers(3, 8), deviation=st.floats(0, 1.5), seed=st.integers(0, 999))
def test_columns_are_orthonormal_and_rows_have_the_norms_that_are_promised(
    variant: str, method: str, dtype: str, n: int, times: int, deviation: float, seed: int
) -> None:
    m, steps = n * times, VARIANTS[variant].get("iterations", 2)
    options = options_of(variant, method, dtype)
    u = (gaussian(m, n, seed) * (deviation * gaussian(m, 1, seed + 1)).exp()).float()
    d = fast(u, options, torch.zeros(m))[0].double()
    floor = ERRORS[method, dtype].floor
    orthogonality = float(torch.linalg.svdvals(d).sub(1).abs().max())
    norms = d.norm(dim=1) / math.sqrt(n / m)
    if options["direction"] in ("muon", "aurora", "riemannian_aurora"):
        assert orthogonality < floor
    else:
        # Row-normalised: as long as a matrix with orthonormal columns, which it no longer is.
        unit = math.sqrt(m / n) if options["normuon_target"] == "unit" else 1.0
        assert float(d.norm()) == pytest.approx(unit * math.sqrt(n), rel=2 * floor)
        assert float((norms / unit - 1).abs().max()) < max(1e-5, 2 * floor)
        assert deviation < 0.5 or float(torch.linalg.svdvals(d / unit).sub(1).abs().max()) > 0.01
    if is_balanced(m, n, options) and options["direction"] == "aurora":
        settled, _ = fast(u, options | {"iterations": 8 * steps, "balance_rule": "odds"}, None)
        norms = settled.double().norm(dim=1) / math.sqrt(n / m)
        assert float((norms - 1).abs().max()) < 0.01 + 4 * floor


@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=cases(), strength=st.floats(0, 0.9), floor=st.floats(0, 2))
# The size of real gradients, whose sigma_1 squared is below any clamp.
@example(case=Case("full", 12, 5, 10.0, 0.5, 1e-6, 0), strength=0.2, floor=0.35)
def test_contra_and_the_floor_agree_with_the_reference(case: Case, strength: float, floor: float) -> None:
    u, w = case.matrix(), gaussian(case.m, case.n, case.seed).float()
    d = polar(u, "svd")
    leaning = contra(d, u, strength)
    assert bool(leaning.isfinite().all())
    assert float(leaning.norm()) == pytest.approx(float(d.norm()), rel=1e-4)
    # From a constant vector that u maps to nearly nothing, rounding decides where the power iteration goes.
    if float((u.double() / u.abs().max().clamp(min=1e-30)).sum(dim=1).norm()) > 1e-2:
        assert error(leaning, reference.contra(d, u, strength)) < 1e-3
    assert error(uw_floor(d, w, floor), reference.uw_floor(d, w, floor)) < 1e-5


@pytest.mark.parametrize(("m", "n"), [(16, 4), (48, 16), (96, 24), (40, 30)])
def test_one_released_riemannian_step_agrees_with_the_reference(m: int, n: int) -> None:
    # Later steps do not always: they amplify 1e-7 of rounding to several per cent.
    options = options_of("riemannian_released", "svd", "auto") | {"outer_steps": 1}
    for seed in range(3):
        u = gaussian(m, n, seed).float()
        assert error(fast(u, options, None)[0], reference.direction(u, options)[0]) < 1e-5
