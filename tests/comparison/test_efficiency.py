"""The definitions of data efficiency, on figures whose answer is known."""

from __future__ import annotations

import math
import random

import pytest

from pretrain.comparison.efficiency import extrapolate, fit, public_runs, shortest, token_ratio
from pretrain.comparison.facts import Facts
from tests.comparison.files import facts


def made_up(**changes: object) -> Facts:
    return Facts.model_validate(facts(**changes))


def test_the_ratio_of_token_counts() -> None:
    found = made_up()
    assert token_ratio(found, found.claims[0]) == pytest.approx(360)


def test_the_shortest_run_must_be_as_good_even_at_the_low_end() -> None:
    runs = list(public_runs(made_up(), "hellaswag"))
    assert {run.name for run in runs} == {
        *("ref 1B on good text", "ref 1B on nearly", "ref 1B on bad text", "long 1B", "theirs")
    }
    assert [run.name for run in shortest(runs, 0.676)] == ["ref 1B on good text"]  # 0.678 - 0.003 is less
    assert [run.name for run in shortest(runs, 0.675)] == ["ref 1B on good text", "ref 1B on nearly"]
    assert len(shortest(runs, 0.5)) == 3
    assert [run.tokens for run in shortest(runs, 0.4)] == [1e11]
    assert shortest(runs, 0.9) == []
    assert list(public_runs(made_up(), "winogrande")) == []


def test_runs_of_other_optimizers_are_no_baseline() -> None:
    found = made_up(by_data__0__optimizer="Muon", by_tokens__0__optimizer="Muon", models__theirs__optimizer="unknown")
    assert list(public_runs(found, "hellaswag")) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_power_law_is_found(seed: int) -> None:
    generator = random.Random(seed)
    exponent, scale = generator.uniform(0.05, 0.5), generator.uniform(0.3, 1)
    tokens = sorted(10 ** generator.uniform(10, 13) for _ in range(4))
    scores = [1 - scale * (count / 1e10) ** -exponent for count in tokens]
    found = fit(tokens, scores)
    assert found is not None
    assert found.exponent == pytest.approx(exponent, rel=1e-6)
    assert found.largest_deviation < 1e-9
    wanted = 1 - scale * 1e4**-exponent
    assert found.tokens_for(wanted) == pytest.approx(1e14, rel=1e-5)


def test_an_extrapolation_states_how_far_it_goes_and_how_unsure_it_is() -> None:
    series = made_up().by_tokens[0]
    exact = extrapolate(series, 0.7)
    assert exact is not None
    assert exact.tokens == pytest.approx(1e11 * 2**10, rel=1e-4)
    assert exact.beyond == pytest.approx(exact.tokens / 3e12)
    assert exact.low == pytest.approx(exact.high, rel=1e-4)
    shaken = extrapolate(made_up(by_tokens__0__points__1__value=0.49).by_tokens[0], 0.7)
    assert shaken is not None
    assert shaken.high is not None
    assert shaken.low < shaken.tokens < shaken.high
    assert shaken.deviation > 0.005


def test_without_a_trend_there_is_no_estimate() -> None:
    points = facts()["by_tokens"][0]["points"]
    assert extrapolate(made_up(by_tokens__0__points=points[:2]).by_tokens[0], 0.7) is None
    falling = [{**point, "value": 0.9 - 0.1 * place} for place, point in enumerate(points)]
    assert extrapolate(made_up(by_tokens__0__points=falling).by_tokens[0], 0.95) is None
    same = [{**point, "tokens": 1e12} for point in points]
    assert extrapolate(made_up(by_tokens__0__points=same).by_tokens[0], 0.95) is None
    assert fit([1e10, 1e11, 1e12], [0.5, 0.9, 1.0]) is None
    flat = fit([1e10, 1e11, 1e12], [0.5, 0.5000001, 0.5000002])
    assert flat is None or flat.tokens_for(0.9) is None
    steep = fit([1e10, 1e11], [0.5, 0.6])
    assert steep is not None
    assert steep.tokens_for(1.0) is None
    assert math.isfinite(steep.tokens_for(0.99) or math.inf)


def test_a_fit_that_no_longer_rises_without_one_point_has_no_upper_end() -> None:
    points = facts()["by_tokens"][0]["points"]
    scores = (0.6, 0.59, 0.58, 0.7)
    series = [{**point, "value": score} for point, score in zip(points, scores, strict=True)]
    found = extrapolate(made_up(by_tokens__0__points=series).by_tokens[0], 0.8)
    assert found is not None
    assert found.high is None
