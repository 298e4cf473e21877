"""What a person sees of a step."""

from __future__ import annotations

import math
from typing import Any

import pytest

from pretrain.run.display import Display, step_line

RECORD: dict[str, Any] = {
    "step": 30,
    "tokens": 30_000,
    "loss": 3.25,
    "lr": 0.02,
    "grad_norm": 0.5,
    "tokens_per_second": 500.0,
}


def test_the_line_counts_what_is_left_at_the_present_speed() -> None:
    """Fault of a famous trainer: a speed from the time since the start, wrong after every resume."""
    assert "left 2:20" in step_line(RECORD, total_steps=100)  # 70 steps of 1,000 tokens at 500 a second
    assert "left 1:36:00" in step_line(RECORD, total_steps=2910)
    assert "500 tok/s" in step_line(RECORD, total_steps=100)


def test_the_line_shows_what_is_known_and_nothing_else() -> None:
    line = step_line(RECORD, total_steps=100)
    assert "mfu" not in line
    assert "SKIPPED" not in line
    line = step_line({**RECORD, "mfu": 0.4123, "skipped": True, "loss": math.nan}, total_steps=100)
    assert "mfu 41.2%" in line
    assert "SKIPPED" in line
    assert "loss nan" in line


@pytest.mark.parametrize(("rank", "shown"), [(0, True), (1, False)])
def test_only_rank_0_speaks(rank: int, shown: bool, capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(rank, every_steps=10)
    display.start(0, 100)
    display.step(RECORD)
    display.warn("look")
    display.close()
    assert ("step  30/100" in capsys.readouterr().out) is shown


def test_plain_lines_come_every_nth_step_and_whenever_something_happened(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display(0, every_steps=10)
    display.start(0, 100)
    for step in range(1, 101):
        display.step({**RECORD, "step": step, **({"skipped": True} if step == 55 else {})})
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, 10, 20, 30, 40, 50, 55, 60, 70, 80, 90, 100]
