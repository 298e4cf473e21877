"""The learning-rate factor: counted in tokens, never zero where a step is taken for nothing."""

from __future__ import annotations

import math

import pytest

from pretrain.config.schedule import ScheduleConfig
from pretrain.training.schedule import lr_factor

BATCH, TOTAL = 10, 1000


def factors(**settings: object) -> list[float]:
    config = ScheduleConfig(**settings)  # type: ignore[arg-type]
    return [lr_factor(config, tokens, BATCH, TOTAL) for tokens in range(0, TOTAL, BATCH)]


def test_wsd_rises_stays_and_falls_where_the_tokens_say() -> None:
    found = factors(kind="wsd", warmup_tokens=100, decay_fraction=0.3)
    assert found[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert found[10:71] == [1.0] * 61
    assert found[70:] == pytest.approx([1 - i / 30 for i in range(30)])


def test_the_factor_depends_on_tokens_and_not_on_the_batch() -> None:
    config = ScheduleConfig(kind="wsd", decay_fraction=0.5)
    assert lr_factor(config, 800, 10, TOTAL) == lr_factor(config, 800, 200, TOTAL) == pytest.approx(0.4)


def test_linear_and_cosine_end_at_the_final_fraction() -> None:
    linear = factors(kind="linear", warmup_tokens=200, final_fraction=0.1)
    cosine = factors(kind="cosine", warmup_tokens=200, final_fraction=0.1)
    assert linear[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert cosine[60] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 2)) / 2)
    config = ScheduleConfig(kind="cosine", final_fraction=0.1)
    assert lr_factor(config, TOTAL, BATCH, TOTAL) == pytest.approx(0.1)


def test_no_step_of_any_kind_has_rate_zero() -> None:
    for kind in ("wsd", "linear", "cosine", "constant"):
        assert min(factors(kind=kind, warmup_tokens=100)) > 0


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert factors(kind="constant") == [1.0] * 100
    assert factors(kind="wsd")[0] == 1.0


def test_a_decay_over_the_whole_run_and_none_at_all() -> None:
    assert factors(kind="wsd", decay_fraction=1.0)[50] == pytest.approx(0.5)
    assert factors(kind="wsd", decay_fraction=0.0) == [1.0] * 100
    assert factors(kind="linear", warmup_tokens=TOTAL)[-1] == 1.0
