import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizers import reference
from optimizers.polar import BACKENDS, polar, prescale
from tests.optimizers.helpers import error, low_rank, with_condition

SHAPES = [(64, 16), (16, 64), (24, 24), (33, 32), (7, 1), (1, 7), (1, 1)]


@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_svd_equals_the_reference(m: int, n: int) -> None:
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(1))
    assert error(polar(x, "svd"), reference.polar(x)) < 1e-6


@pytest.mark.parametrize("rank", [1, 3, 7])
@pytest.mark.parametrize(("m", "n"), [(20, 8), (8, 20), (12, 12)])
def test_svd_of_a_deficient_matrix_is_the_partial_isometry(m: int, n: int, rank: int) -> None:
    x = low_rank(m, n, rank)
    d = polar(x, "svd")
    assert error(d, reference.polar(x)) < 1e-6
    assert float(d.double().square().sum()) == pytest.approx(rank, abs=1e-5)


# The error of the quintic backend as its docstring states it, on singular values above 2^-10 |x|_F.
@pytest.mark.parametrize(
    ("condition", "direction_error"), [(1, 0.01), (10, 0.01), (50, 0.03), (100, 0.05), (500, 0.15), (5000, 0.6)]
)
@pytest.mark.parametrize(("m", "n"), [(128, 32), (32, 128), (48, 48)])
def test_quintic_is_within_its_stated_error(m: int, n: int, condition: float, direction_error: float) -> None:
    x = with_condition(m, n, condition)
    d = polar(x.float(), "quintic")
    assert error(d, reference.polar(x)) < direction_error
    above = int((torch.linalg.svdvals(x) > 2.0**-10 * x.norm()).sum())
    sigma = torch.linalg.svdvals(d.double())
    assert float((sigma[:above] - 1).abs().max()) < 0.01
    assert float(sigma[above:].amax() if above < len(sigma) else 0.0) < 1.01


@pytest.mark.parametrize("method", ["quintic", "quintic_exact"])
def test_quintic_leaves_no_singular_value_between_zero_and_one_of_a_full_rank_matrix(method: str) -> None:
    # Muon's own 3.4445 coefficients would leave 0.7 to 1.2.
    sigma = torch.linalg.svdvals(polar(torch.randn(48, 12), method).double())
    assert float((sigma - 1).abs().max()) < 0.02


@pytest.mark.parametrize("method", ["svd", "quintic", "polar_express", "cans", "gram"])
@pytest.mark.parametrize("exponent", [-38, -20, -8, 0, 8, 18, 20, 38])
def test_direction_has_no_scale(method: str, exponent: int) -> None:
    x = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(2)).clamp(-3, 3)
    scaled = (x.double() * 10.0**exponent).float()
    scaled = scaled.clamp(-torch.finfo(torch.float32).max, torch.finfo(torch.float32).max)
    wanted = [reference.polar(matrix) for matrix in scaled]
    tolerance = 1e-6 if method == "svd" else 0.02
    for got, want in zip(polar(scaled, method), wanted, strict=True):
        assert error(got, want) < tolerance


def test_the_smallest_numbers_still_have_a_direction() -> None:
    x = torch.tensor([[1e-45, 0.0], [0.0, -2.8e-45], [0.0, 0.0]])
    assert torch.allclose(polar(x), torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.0, 0.0]]), atol=0.01)


def test_powers_of_two_outside_the_range_change_no_bit() -> None:
    x = torch.randn(4, 9, 4)
    for method, exponent in itertools.product(("svd", "quintic"), (-100, -60, 50, 100)):
        expected = polar(prescale(x * 2.0**-60), method)
        assert torch.equal(polar(x * 2.0**exponent, method), expected)


def test_prescale_brings_the_largest_entry_into_one_to_two_and_only_from_outside() -> None:
    x = torch.randn(3, 2)
    inside = torch.stack([x / x.abs().max() * 2.0**-19, x / x.abs().max() * 2.0**39])
    assert torch.equal(prescale(inside), inside)
    outside = torch.stack([x * 1e-30, x * 1e-44, x * 1e30])
    largest = prescale(outside).abs().amax((-2, -1))
    assert bool(((largest >= 1) & (largest < 2)).all())
    ratio = prescale(outside)[0].double() / outside[0].double()
    assert bool((ratio == ratio[0, 0]).all())
    assert float(torch.frexp(ratio[0, 0]).mantissa) == 0.5
    tiny = (x.double() * 1e-300)[None]
    assert 1 <= float(prescale(tiny).abs().max()) < 2


@pytest.mark.parametrize("method", sorted(BACKENDS))
def test_zero_gives_zero(method: str) -> None:
    assert torch.equal(polar(torch.zeros(2, 6, 3), method), torch.zeros(2, 6, 3))
    mixed = torch.stack([torch.zeros(6, 3), torch.randn(6, 3)])
    d = polar(mixed, method)
    assert torch.equal(d[0], torch.zeros(6, 3))
    assert float(d[1].norm()) == pytest.approx(3**0.5, rel=0.02)


def test_zero_is_not_factorised(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a zero matrix was factorised")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    assert not polar(torch.zeros(3, 8, 4), "svd").any()


@pytest.mark.parametrize("method", sorted(BACKENDS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_matrix_that_is_not_finite_spoils_only_itself(method: str, bad: float) -> None:
    x = torch.randn(3, 6, 4)
    clean = polar(x, method)
    x[1, 2, 3] = bad
    d = polar(x, method)
    assert bool(d[1].isnan().all())
    assert torch.equal(d[[0, 2]], clean[[0, 2]])
    assert bool(polar(torch.full((2, 2), bad), method).isnan().all())


@pytest.mark.parametrize("method", sorted(BACKENDS))
def test_any_batch_shape_strides_and_dtype(method: str) -> None:
    x = torch.randn(2, 3, 10, 4)
    d = polar(x, method)
    assert d.shape == x.shape
    assert d.dtype == torch.float32
    tolerance = 1e-6 if method == "svd" else 0.02
    assert torch.allclose(d[1, 2], polar(x[1, 2], method), atol=tolerance)
    strided = x.mT.contiguous().mT
    assert torch.allclose(polar(strided, method), d, atol=tolerance)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        typed = x[0, 0].to(dtype)
        got = polar(typed, method)
        assert got.dtype == torch.float32
        assert error(got, reference.polar(typed)) < max(tolerance, 1e-6)
    assert polar(torch.zeros(0, 3, 2), method).shape == (0, 3, 2)
    assert polar(torch.zeros(3, 0), method).shape == (3, 0)


@pytest.mark.parametrize("method", sorted(BACKENDS))
def test_the_input_is_untouched_and_not_shared(method: str) -> None:
    x = torch.randn(2, 5, 3, requires_grad=True)
    before = x.detach().clone()
    d = polar(x, method)
    assert not d.requires_grad
    d.fill_(7)
    assert torch.equal(x.detach(), before)


@pytest.mark.parametrize("method", sorted(BACKENDS))
def test_autocast_changes_neither_results_nor_dtypes(method: str) -> None:
    x = torch.randn(2, 16, 8)
    expected = polar(x, method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(polar(x, method), expected)


def test_stacked_equals_single_for_svd() -> None:
    x = torch.randn(5, 12, 7)
    for got, matrix in zip(polar(x, "svd"), x, strict=True):
        assert torch.allclose(got, polar(matrix, "svd"), atol=1e-7)


def test_stacked_and_single_quintic_differ_by_summation_order_only() -> None:
    x = torch.randn(4, 64, 16)
    stacked = polar(x)
    for got, matrix in zip(stacked, x, strict=True):
        assert float((got - polar(matrix)).norm() / got.norm()) < 0.006


def test_exact_is_the_released_form_of_quintic_only() -> None:
    x = torch.randn(2, 9, 4)
    assert torch.equal(polar(x, exact=True), polar(x, "quintic_exact"))
    with pytest.raises(ValueError, match="svd"):
        polar(x, "svd", exact=True)


def test_exact_takes_one_matrix_at_a_time() -> None:
    x = torch.randn(3, 9, 4)
    assert torch.equal(polar(x, exact=True), torch.stack([polar(matrix, exact=True) for matrix in x]))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one of .*quintic"):
        polar(torch.randn(3, 3), "quintik")
    with pytest.raises(ValueError, match="dtype 'fp32' has no effect: 'quintic' computes in"):
        polar(torch.randn(3, 3), "quintic", dtype="fp32")
    for x in (torch.randn(3), torch.ones(2, 2, dtype=torch.int64), torch.ones(2, 2, dtype=torch.complex64)):
        with pytest.raises(ValueError, match="real floating point"):
            polar(x)


@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 12), n=st.integers(1, 12), seed=st.integers(0, 99), exponent=st.integers(-60, 60))
def test_svd_equals_the_reference_everywhere(m: int, n: int, seed: int, exponent: int) -> None:
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    assert error(polar(x, "svd"), reference.polar(x)) < 1e-6
