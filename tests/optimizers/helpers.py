"""Matrices for the tests of the optimizers, and how far apart two of them are."""

from typing import Any

import pytest
import torch
from torch import Tensor

# A matrix group of Aurora with every extra off.
OPTIONS: dict[str, Any] = {
    "lr": 0.1,
    "weight_decay": 0.2,
    "direction": "muon",
    "momentum": 0.9,
    "nesterov": True,
    "lr_scale": "aspect",
    "scope": "tall",
    "iterations": 2,
    "beta": 0.5,
    "balance_rule": "odds",
    "eps_mode": "relative",
    "tolerance": None,
    "normuon_target": "graft",
    "running_norms": False,
    "beta2": 0.95,
    "riemannian": "exact",
    "outer_steps": 3,
    "contra": 0.0,
    "uw_floor": 0.0,
    "cautious": False,
}
DIRECTIONS = ("muon", "normuon", "u_normuon", "aurora", "riemannian_aurora")


def error(got: Tensor, wanted: Tensor) -> float:
    """|got - wanted|_F / |wanted|_F, absolute where wanted is zero."""
    size = float(wanted.double().norm())
    return float((got.double() - wanted.double()).norm()) / (size if size > 0 else 1.0)


def row_spread(d: Tensor) -> float:
    """Deviation over mean of the norms of the rows that are not zero."""
    norms = d.double().norm(dim=-1)
    norms = norms[norms > 0]
    return float(norms.std(correction=0) / norms.mean())


def with_condition(m: int, n: int, condition: float, seed: int = 0) -> Tensor:
    """A random m x n matrix in fp64 whose singular values run from 1 to 1/condition, evenly in the logarithm."""
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    u = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]
    sigma = condition ** (-torch.arange(k, dtype=torch.float64) / max(1, k - 1))
    return (u * sigma) @ v.T


def low_rank(m: int, n: int, rank: int, seed: int = 0) -> Tensor:
    """An fp32 matrix of small whole numbers and of exactly this rank."""
    generator = torch.Generator().manual_seed(seed)
    # A unit matrix in both factors makes the rank sure.
    left = torch.cat([torch.eye(rank), torch.randint(-3, 4, (m - rank, rank), generator=generator)])
    right = torch.cat([torch.eye(rank), torch.randint(-3, 4, (n - rank, rank), generator=generator)])
    return left[torch.randperm(m, generator=generator)] @ right[torch.randperm(n, generator=generator)].T


def gaussian(m: int, n: int, seed: int = 0) -> Tensor:
    """In fp64."""
    return torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uneven(m: int, n: int, seed: int = 0) -> Tensor:
    """Rows that differ in size as those of a gradient do."""
    return gaussian(m, n, seed) * gaussian(m, 1, seed + 1).exp()


def every_direction() -> list[Any]:
    """Options of every direction of the reference, for parametrize."""
    variants: list[dict[str, Any]] = [{"direction": name} for name in DIRECTIONS]
    variants += [{"direction": "normuon", "normuon_target": "unit"}, {"direction": "u_normuon", "running_norms": True}]
    variants += [{"direction": name, "scope": "all"} for name in ("aurora", "riemannian_aurora")]
    variants += [{"direction": "aurora", "scope": "wide"}, {"direction": "aurora", "balance_rule": "tyler"}]
    return [pytest.param(OPTIONS | variant, id="-".join(map(str, variant.values()))) for variant in variants]
