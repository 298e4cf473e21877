"""The committed loss curves are met.

The tolerance is 1e-5 of any loss. Other vector instructions (ATEN_CPU_CAPABILITY=default and avx2,
MKL_CBWR=COMPATIBLE) and two threads instead of one, so other orders of summation, moved these ten fp32 steps by 7e-8 at
most, as did two ranks under ZeRO 1 instead of one. A learning rate that is 1 % off moves them by far more, which a test
below shows.
"""

from __future__ import annotations

import json
from unittest import mock

import pytest

from tests.golden import curves

TOLERANCE = 1e-5
COMMITTED = json.loads(curves.FILE.read_text())


def test_every_run_has_a_curve_of_its_length() -> None:
    assert COMMITTED.keys() == curves.RUNS.keys()
    for lines in COMMITTED.values():
        assert len(lines["loss"]) == curves.STEPS
        assert lines["loss"][-1] < lines["loss"][0] - 0.5


@pytest.mark.parametrize("name", curves.RUNS)
def test_the_curve_is_the_committed_one(name: str) -> None:
    assert curves.distance(curves.curve(name), COMMITTED[name]) < TOLERANCE


@pytest.mark.parametrize("change", [{"optimizer.lr": 0.0202}, {"optimizer.momentum": 0.94}])
def test_a_setting_that_is_one_percent_off_is_seen(change: dict[str, float]) -> None:
    shipped, changes, ranks = curves.RUNS["quickstart"]
    with mock.patch.dict(curves.RUNS, {"quickstart": (shipped, changes | change, ranks)}):
        assert curves.distance(curves.curve("quickstart"), COMMITTED["quickstart"]) > 2 * TOLERANCE


def test_zero_follows_the_curve_of_one_process() -> None:
    assert curves.distance(COMMITTED["quickstart-zero1-2"], COMMITTED["quickstart"]) < TOLERANCE
