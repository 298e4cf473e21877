"""Every backend in every dtype against the reference, over shapes, condition numbers and spectra."""

from typing import Any

import pytest
import torch
from torch import Tensor

from optimizers import Aurora
from optimizers.flops import counter
from optimizers.polar import ERRORS, GRADED_ERRORS, gram, polar, precision

SHAPES = [(512, 64), (64, 512), (96, 96), (300, 256), (33, 32), (40, 2), (3, 3)]
SPECTRA = ["log", "power", "half", "first", "last"]
CONDITIONS = [1.0, 3.0, 10.0, 30.0, 100.0, 500.0, 2000.0]


def with_spectrum(m: int, n: int, spectrum: str, condition: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A matrix in fp64 with its singular vectors and values: log-uniform, a power law, two-valued in three ways."""
    generator = torch.Generator().manual_seed(m * n)
    k = min(m, n)
    left = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]
    place = torch.arange(k, dtype=torch.float64) / max(1, k - 1)
    low = torch.tensor(1 / condition, dtype=torch.float64)
    sigma = {
        "log": low**place,
        "power": (1 + place * (k - 1)) ** (low.log() / torch.tensor(float(max(2, k)), dtype=torch.float64).log()),
        "half": torch.where(place < 0.5, 1.0, low),
        "first": torch.where(place == 0, 1.0, low),
        "last": torch.where(place == 1, low, 1.0),
    }[spectrum]
    return (left * sigma) @ right.T, left, sigma, right


CASES = [(*key, "default") for key in sorted(ERRORS)] + [("gram", dtype, how) for how, dtype in sorted(GRADED_ERRORS)]


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize(("method", "dtype", "accuracy"), CASES)
def test_a_backend_is_within_its_stated_error(
    method: str, dtype: Any, accuracy: Any, m: int, n: int, spectrum: str
) -> None:
    check_error(method, dtype, accuracy, m, n, spectrum)


@pytest.fixture
def by_polynomials(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 as on a GPU."""
    spelled = precision.SPELLINGS["cpu", torch.float32]
    monkeypatch.setitem(precision.SPELLINGS, ("cpu", torch.float32), spelled._replace(factorises=False))
    monkeypatch.setattr(gram, "rational_polar", lambda *_: pytest.fail("not by polynomials"))


@pytest.mark.usefixtures("by_polynomials")
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("m", "n"), SHAPES[1:5])
@pytest.mark.parametrize("accuracy", ["loose", "default", "tight"])
def test_fp32_without_factorisations_is_within_the_same_error(accuracy: Any, m: int, n: int, spectrum: str) -> None:
    check_error("gram", "fp32", accuracy, m, n, spectrum)


def check_error(method: str, dtype: Any, accuracy: Any, m: int, n: int, spectrum: str) -> None:
    stated = ERRORS[method, dtype] if accuracy == "default" else GRADED_ERRORS[accuracy, dtype]
    for condition in CONDITIONS:
        x, left, sigma, right = with_spectrum(m, n, spectrum, condition)
        d = polar(x.float(), method, dtype=dtype, accuracy=accuracy).double()
        counted = sigma > (2.0**-8 if accuracy == "loose" else 2.0**-10) * sigma.norm()
        bound = stated.at(float(sigma.norm() / sigma[counted].min()))
        # d between the singular vectors that count: an identity in exact arithmetic.
        inner = left[:, counted].T @ d @ right[:, counted]
        identity = torch.eye(len(inner), dtype=torch.float64)
        assert float((torch.linalg.svdvals(inner) - 1).abs().max()) < bound, condition
        assert float((inner - identity).norm() / identity.norm()) < bound, condition
        assert float(torch.linalg.svdvals(d).max()) < 1 + bound, condition


def test_accuracies_cost_what_they_are_for() -> None:
    """Loose is less work and less exact than the default, tight is more of both."""
    x, *_ = with_spectrum(512, 128, "log", 50.0)
    costs, errors = [], []
    for accuracy in ("loose", "default", "tight"):
        with counter() as count:
            d = polar(x.float(), "gram", dtype="fp32", accuracy=accuracy)  # type: ignore[arg-type]
        costs.append(count.get_total_flops())
        sigma = torch.linalg.svdvals(d.double())
        errors.append(float((sigma - 1).abs().max()))
    assert costs == sorted(costs)
    assert costs[0] < 0.85 * costs[1]
    assert errors[0] > 10 * errors[1] > 20 * errors[2]


def test_what_has_one_accuracy_refuses_another() -> None:
    x = torch.randn(6, 4)
    for given, told in (
        ({"method": "cans", "accuracy": "loose"}, "one accuracy"),
        ({"method": "gram", "accuracy": "tight", "dtype": "bf16"}, "accuracy 'tight'"),
        ({"method": "gram", "accuracy": "looser"}, "expected one of loose, default, tight"),
    ):
        with pytest.raises(ValueError, match=told):
            polar(x, **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="one accuracy only"):
        Aurora([x.requires_grad_()], polar="cans", polar_accuracy="loose")
    with pytest.raises(ValueError, match="computes in fp32"):
        Aurora([{"params": [x], "kind": "matrix", "polar_accuracy": "tight", "polar_dtype": "bf16"}])


@pytest.mark.parametrize("condition", [3.0, 10.0, 30.0])
@pytest.mark.parametrize(("m", "n"), [(1024, 512), (512, 512)])
def test_gram_in_bf16_survives_spectra_of_two_values(m: int, n: int, condition: float) -> None:
    # Restarting every second step from the start, results of 1e6 were seen here.
    x, *_ = with_spectrum(m, n, "half", condition)
    sigma = torch.linalg.svdvals(polar(x.float(), "gram", dtype="bf16").double())
    assert float((sigma - 1).abs().max()) < 0.03


@pytest.mark.usefixtures("by_polynomials")
def test_gram_needs_its_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, *_ = with_spectrum(512, 128, "log", 500.0)
    errors = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        for segments in (gram.SEGMENTS["default"][dtype], (7,)):
            monkeypatch.setitem(gram.SEGMENTS["default"], dtype, segments)
            sigma = torch.linalg.svdvals(polar(x.float(), "gram", dtype=name).nan_to_num(1e9).double())
            errors[dtype, segments] = float((sigma - 1).abs().max())
    assert errors[torch.float32, (3, 4)] < 1e-3
    assert errors[torch.bfloat16, (1, 1, 1, 2, 2)] < 0.2
    assert errors[torch.bfloat16, (7,)] > 1


def test_inverse_sqrt_inverts_the_root() -> None:
    x, _, sigma, right = with_spectrum(200, 40, "log", 100.0)
    a = (x.mT @ x)[None].float()
    root = gram.inverse_sqrt(a)[0].double()
    wanted = (right / sigma) @ right.T
    assert float((root - wanted).norm() / wanted.norm()) < 1e-3
