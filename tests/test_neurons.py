"""Leverage against an independent SVD in fp64, and the shares that are read off it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pretrain.neurons import measures as neurons

SHAPES = [(2, 1), (64, 16), (512, 128), (300, 299), (256, 7)]
SPECTRA = ["flat", "one small", "one large", "geometric"]


def matrix(m: int, n: int, spectrum: str, condition: float, seed: int = 0) -> Tensor:
    """An fp64 matrix with the given singular values, and rows of very different size."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(m, n, dtype=torch.float64, generator=generator) * row_sizes(m, generator))[0]
    v = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))[0]
    sigma = torch.ones(n, dtype=torch.float64)
    if spectrum == "one small":
        sigma[-1] = 1 / condition
    elif spectrum == "one large":
        sigma[1:] = 1 / condition
    elif spectrum == "geometric":
        sigma = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), n, dtype=torch.float64)
    return u * sigma @ v.T


def row_sizes(m: int, generator: torch.Generator) -> Tensor:
    return torch.randn(m, 1, dtype=torch.float64, generator=generator).mul(1.5).exp()


def by_svd(b: Tensor) -> Tensor:
    """The definition: squared row norms of U, over their mean."""
    u, sigma, _ = torch.linalg.svd(b.double(), full_matrices=False)
    scores = u[:, sigma > 1e-13 * sigma[0]].square().sum(dim=1)
    return scores / scores.mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_leverage_equals_the_svd_up_to_condition_1e4(shape: tuple[int, int], spectrum: str, dtype: torch.dtype) -> None:
    for condition in (1.0, 100.0, 1e4):
        b = (matrix(*shape, spectrum, condition) * 3e-7).to(dtype)
        found = neurons.leverage(b)
        assert found is not None
        assert float((found - by_svd(b)).abs().max()) < 1e-4 * (10 if dtype is torch.bfloat16 else 1)
        assert float(found.mean()) == pytest.approx(1, abs=1e-12)


def test_leverage_survives_any_scale() -> None:
    b = matrix(64, 16, "geometric", 1e4)
    expected = neurons.leverage(b)
    assert expected is not None
    for scale in (1e-30, 1e30):
        found = neurons.leverage((b * scale).float())
        assert found is not None
        assert float((found - expected).abs().max()) < 1e-4


def test_what_says_nothing_is_none() -> None:
    generator = torch.Generator().manual_seed(1)
    low_rank = torch.randn(64, 7, generator=generator) @ torch.randn(7, 16, generator=generator)
    half_rank = torch.randn(64, 8, generator=generator) @ torch.randn(8, 16, generator=generator)
    assert neurons.leverage(torch.zeros(8, 4)) is None
    assert neurons.leverage(torch.full((8, 4), torch.nan)) is None
    assert neurons.leverage(low_rank) is None
    found = neurons.leverage(half_rank)
    assert found is not None
    # The product was rounded to fp32, so in fp64 it has full rank: only the first 8 singular vectors mean anything.
    u, _, _ = torch.linalg.svd(half_rank.double(), full_matrices=False)
    scores = u[:, :8].square().sum(dim=1)
    assert float((found - scores / scores.mean()).abs().max()) < 1e-6
    with pytest.raises(ValueError, match="all equal"):
        neurons.leverage(torch.randn(4, 4))


def test_planted_dead_rows_are_found_and_a_random_momentum_has_none() -> None:
    generator = torch.Generator().manual_seed(2)
    b = torch.randn(512, 128, generator=generator)
    assert neurons.share_below(neurons.leverage(b), neurons.DEAD) == 0
    planted = torch.tensor([0, 17, 255, 511])
    b[planted] = 0
    found = neurons.leverage(b)
    assert found is not None
    assert (found < neurons.DEAD).nonzero().flatten().tolist() == planted.tolist()


def test_shares_variation_and_percentiles_by_hand() -> None:
    values = neurons.relative(torch.tensor([0.0, 1.0, 3.0, 4.0]))
    assert values is not None
    assert values.tolist() == [0.0, 0.5, 1.5, 2.0]
    assert neurons.share_below(values, 0.1) == 0.25
    assert neurons.variation(values) == pytest.approx(0.625**0.5)
    assert neurons.percentiles(values)["p50"] == 1.0
    assert neurons.relative(torch.zeros(3)) is None
    assert neurons.relative(torch.tensor([1.0, torch.inf])) is None
    assert neurons.share_below(None, 0.1) is neurons.variation(None) is neurons.percentiles(None)["p01"] is None
