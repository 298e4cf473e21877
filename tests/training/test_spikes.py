"""The detector of loss spikes: robust, exactly resumable, and blind to NaN."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch

from pretrain.training.spikes import LEAST_DEVIATION, MAD_TO_DEVIATION, SpikeDetector

CPU = torch.device("cpu")


def found(losses: list[float], window: int = 32, threshold: float = 10.0) -> list[int]:
    detector = SpikeDetector(window, threshold, [], CPU)
    return [index for index, loss in enumerate(losses) if bool(detector.observe(torch.tensor(loss)))]


def noisy(count: int, seed: int = 0, start: float = 4.0, slope: float = 0.002) -> list[float]:
    draw = random.Random(seed)
    return [start - slope * index + draw.gauss(0, 0.03) for index in range(count)]


def expected(losses: list[float], window: int, threshold: float) -> list[int]:
    """The definition, with Python's own median."""
    known: list[float] = []
    spikes = []
    for index, loss in enumerate(losses):
        recent = known[-window:]
        if len(recent) >= min(16, window) and math.isfinite(loss):
            median = statistics.median_low(recent)
            deviation = MAD_TO_DEVIATION * statistics.median_low([abs(value - median) for value in recent])
            if loss > median + threshold * max(deviation, LEAST_DEVIATION * abs(median)):
                spikes.append(index)
        if math.isfinite(loss):
            known.append(torch.tensor(loss).item())
    return spikes


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("window", [8, 31, 64])
def test_spikes_are_those_of_the_definition(window: int, seed: int) -> None:
    draw = random.Random(seed)
    losses = noisy(150, seed)
    for index in draw.sample(range(150), 12):
        losses[index] *= draw.choice([1.02, 1.2, 3.0, 1000.0, math.nan, math.inf])
    threshold = draw.choice([3.0, 10.0])
    spikes = found(losses, window, threshold)
    assert spikes == expected(losses, window, threshold)
    assert spikes


def test_ordinary_noise_and_the_fall_at_the_start_are_no_spikes() -> None:
    falling = [10.8 * math.exp(-index / 30) + 3 for index in range(100)]
    assert found([*falling, *noisy(400)]) == []


def test_a_loss_that_stays_high_becomes_the_new_normal() -> None:
    """The data has changed: alarms end when half the window has seen it."""
    spikes = found([*noisy(64, slope=0.0), *noisy(64, seed=1, start=6.0, slope=0.0)], window=32)
    assert spikes == list(range(64, 64 + 16))


def test_losses_that_are_not_finite_are_no_spikes_and_not_remembered() -> None:
    """Fault of a famous trainer: one NaN poisons a rolling average and a hundred steps are skipped."""
    clean, poisoned = (SpikeDetector(16, 10.0, [], CPU) for _ in range(2))
    for loss in noisy(40):
        for bad in (math.nan, math.inf, -math.inf):
            assert not bool(poisoned.observe(torch.tensor(bad)))
            assert poisoned.losses() == clean.losses()
        assert bool(poisoned.observe(torch.tensor(loss))) == bool(clean.observe(torch.tensor(loss)))
    assert poisoned.losses() == clean.losses()
    assert len(clean.losses()) == 16


@pytest.mark.parametrize("at", [0, 5, 15, 16, 17, 40])
def test_a_detector_continues_from_its_losses_to_the_bit(at: int) -> None:
    losses = noisy(80)
    losses[60] = 9.0
    whole, before = SpikeDetector(16, 3.0, [], CPU), SpikeDetector(16, 3.0, [], CPU)
    expected = [bool(whole.observe(torch.tensor(loss))) for loss in losses]
    first = [bool(before.observe(torch.tensor(loss))) for loss in losses[:at]]
    after = SpikeDetector(16, 3.0, before.losses(), CPU)
    assert first + [bool(after.observe(torch.tensor(loss))) for loss in losses[at:]] == expected
    assert after.losses() == whole.losses()


def test_a_history_with_bad_values_is_cleaned() -> None:
    detector = SpikeDetector(16, 10.0, [math.nan, 3.0, math.inf, *[3.0] * 20], CPU)
    assert detector.losses() == [3.0] * 16
    assert bool(detector.observe(torch.tensor(4.0)))
