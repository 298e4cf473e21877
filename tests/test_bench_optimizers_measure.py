"""What the optimizer benchmark measures: planted errors are seen at their size, memory and rounds are counted right."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optimizers import Aurora, blocks
from optimizers.options import complete

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from bench_optimizers_inputs import gaussian
from bench_optimizers_measure import Oracle, PeakMemory, Quality, orthogonality_error, timed_rounds, worst

MUON_OPTIONS = complete("matrix", {"direction": "muon"})
AURORA_OPTIONS = complete("matrix", {"direction": "aurora"})


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def polar(u: Tensor) -> Tensor:
    left, _, right = torch.linalg.svd(u.double(), full_matrices=False)
    return left @ right


def judge(d: Tensor, u: Tensor, options: dict[str, Any]) -> Quality:
    return Oracle(u).judge(d, options)


@pytest.mark.parametrize("shape", [(40, 10), (10, 40), (12, 12)])
def test_the_polar_factor_is_perfect_as_muon(shape: tuple[int, int]) -> None:
    u = torch.randn(shape)
    quality = judge(polar(u), u, MUON_OPTIONS)
    assert quality["orthogonality_error"] < 1e-6
    assert quality["direction_error"] is not None
    assert quality["direction_error"] < 1e-6
    assert quality["alignment"] == pytest.approx(1.0)


def test_planted_errors_are_seen_at_their_size() -> None:
    u = torch.randn(40, 10)
    left, sigma, right = torch.linalg.svd(u.double(), full_matrices=False)
    stretched = torch.ones(10, dtype=torch.float64)
    stretched[3] = 0.9
    quality = judge((left * stretched) @ right, u, MUON_OPTIONS)
    assert quality["orthogonality_error"] == pytest.approx(0.1)
    assert quality["direction_error"] == pytest.approx(0.1 / math.sqrt(10))
    assert quality["alignment"] == pytest.approx(1 - 0.1 * float(sigma[3] / sigma.sum()))
    # Orthogonal and wrong: only the direction error and the alignment tell.
    signs = torch.ones(10, dtype=torch.float64)
    signs[0] = -1
    flipped = judge((left * signs) @ right, u, MUON_OPTIONS)
    assert flipped["orthogonality_error"] < 1e-6
    assert flipped["direction_error"] == pytest.approx(2 / math.sqrt(10))
    assert math.isnan(judge(torch.full((40, 10), math.nan), u, MUON_OPTIONS)["orthogonality_error"])


def test_rows_are_judged_by_their_norms_and_those_of_a_wide_matrix_by_columns() -> None:
    u = torch.randn(40, 10)
    d = polar(u)
    norms = d.norm(dim=1)
    even = d / norms[:, None] * 0.5
    even[:10] *= 1.02  # a quarter of the rows is 2 % too long
    quality = judge(even, u, AURORA_OPTIONS)
    assert quality["rows_within_1_percent"] == pytest.approx(0.75)
    assert quality["row_variation"] == pytest.approx(0.02 * math.sqrt(0.25 * 0.75) / 1.005, rel=1e-6)
    assert judge(even.mT, u.mT, {**AURORA_OPTIONS, "scope": "all"}) == pytest.approx(quality)
    even[7] = 0
    assert judge(even, u, AURORA_OPTIONS)["row_variation"] < 0.01


def test_muon_in_the_place_of_aurora_is_flagged() -> None:
    u = gaussian(96, 24)[0]
    quality = judge(polar(u), u, AURORA_OPTIONS)
    assert quality["orthogonality_error"] < 1e-6
    assert quality["row_variation"] > 0.3
    assert quality["direction_error"] is not None
    assert quality["direction_error"] > 0.3


def test_what_lies_below_the_cut_is_not_asked_to_be_orthogonal() -> None:
    left = torch.linalg.qr(torch.randn(40, 10, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(10, 10, dtype=torch.float64)).Q
    sigma = torch.ones(10, dtype=torch.float64)
    sigma[7:] = 1e-4  # the cut is 2^-11 of about 2.6
    reached = torch.where(sigma < 1, 0.3, 1.0)
    quality = judge((left * reached) @ right.T, (left * sigma) @ right.T, MUON_OPTIONS)
    assert quality["orthogonality_error"] < 1e-9
    assert orthogonality_error((left * reached) @ right.T, torch.eye(10, dtype=torch.float64)) == pytest.approx(0.7)


def test_the_worst_of_several_is_kept_and_a_nan_is_the_worst() -> None:
    u = torch.randn(12, 4)
    good = judge(polar(u), u, MUON_OPTIONS)
    bad = judge(0.5 * polar(u), u, MUON_OPTIONS)
    assert worst([good, bad, good])["orthogonality_error"] == pytest.approx(0.5)
    assert worst([bad, good])["alignment"] == pytest.approx(0.5)
    nan = Quality(**{**good, "orthogonality_error": math.nan})  # type: ignore[typeddict-item]
    assert math.isnan(worst([good, nan, good])["orthogonality_error"])
    assert worst([good, Quality(**{**good, "direction_error": None})])["direction_error"] is None  # type: ignore[typeddict-item]


def test_peak_memory_is_that_of_the_tensors_alive_at_once() -> None:
    before = torch.ones(1000)
    with PeakMemory() as memory:
        first = before + 1  # 4,000 bytes
        second = torch.cat([first, first])  # 8,000 more: the peak
        first.add_(1)
        view = second[:10]
        del first, second  # the view keeps 8,000 alive
        third = before * 2  # 4,000
        del view, third
        fourth = torch.zeros(2000)
    assert memory.peak == 12_000
    assert fourth.numel() == 2000


def test_peak_memory_of_a_chain_of_temporaries_is_not_their_sum() -> None:
    x = torch.ones(1000)
    with PeakMemory() as memory:
        for _ in range(50):
            x = x * 2
    assert memory.peak == 8_000


def test_all_take_turns_in_every_round_and_preparing_is_not_timed() -> None:
    log: list[str] = []

    def make(name: str) -> Any:
        def prepare() -> Any:
            log.append(f"prepare {name}")
            return lambda: log.append(name)

        return prepare

    calls = {name: make(name) for name in "abc"}
    took = timed_rounds(calls, torch.device("cpu"), rounds=8, at_least=2, budget=60.0)
    assert {name: len(seconds) for name, seconds in took.items()} == dict.fromkeys("abc", 8)
    orders = {tuple(log[start : start + 6]) for start in range(0, len(log), 6)}
    assert all(sorted(order[1::2]) == ["a", "b", "c"] for order in orders)
    assert len(orders) > 1
    assert len(timed_rounds(calls, torch.device("cpu"), rounds=8, at_least=2, budget=0.0)["a"]) == 2


def peak_of_a_step(shapes: list[tuple[int, int]], **options: Any) -> int:
    """Bytes that a step of these matrices needs besides weights, gradients and state."""
    weights = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    # Not "auto": short types need a copy more.
    optimizer = Aurora(weights, **{"polar_dtype": "fp32", **options})
    optimizer.step()
    with PeakMemory() as memory:
        optimizer.step()
    return memory.peak


@pytest.mark.parametrize(
    ("options", "tensors"),
    [
        ({"direction": "aurora"}, {(96, 24): 6, (24, 24): 8.2}),
        ({"direction": "aurora", "row_balance": "gram"}, {(96, 24): 6, (24, 24): 8.2}),
        ({"direction": "aurora", "polar_dtype": "bf16"}, {(96, 24): 7, (24, 24): 8.7}),
        ({"direction": "normuon"}, {(96, 24): 5, (24, 24): 8.2}),
        ({"direction": "riemannian_aurora"}, {(96, 24): 10, (24, 24): 8.2}),
    ],
)
def test_a_step_needs_the_memory_that_is_stated_and_no_more_for_more_buckets(
    options: dict[str, Any], tensors: dict[tuple[int, int], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    for shape, most in tensors.items():
        elements = shape[0] * shape[1]
        monkeypatch.setattr(blocks, "BUCKET_ELEMENTS", 64 * elements)
        bucket = 4 * 64 * elements
        one = peak_of_a_step([shape] * 64, **options)
        assert one < most * bucket
        # Four buckets instead of one: nothing stays.
        assert peak_of_a_step([shape] * 256, **options) < one + 0.1 * bucket
