"""metrics.jsonl is valid JSON whatever is logged, and holds each step once."""

from __future__ import annotations

import json
import math
from pathlib import Path

from pretrain.run.json_lines import JsonLines


def test_non_finite_numbers_become_null(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    file.append({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 0.5})
    assert json.loads(file.path.read_text()) == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.5}


def test_lines_past_a_step_are_moved_and_not_lost(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    for step in range(1, 6):
        file.append({"step": step})
    with file.path.open("a") as raw:
        raw.write('{"step": 6, "lo')  # cut off by a crash
    assert file.discard_after(3) == 3
    assert [record["step"] for record in file.read()] == [1, 2, 3]
    discarded = (tmp_path / "metrics.discarded.jsonl").read_text().splitlines()
    assert discarded == ['{"step": 4}', '{"step": 5}', '{"step": 6, "lo']
    file.append({"step": 4})
    assert file.discard_after(4) == 0
    assert [record["step"] for record in file.read()] == [1, 2, 3, 4]


def test_nothing_is_written_for_a_file_that_does_not_exist(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    assert file.discard_after(0) == 0
    assert file.read() == []
    assert list(tmp_path.iterdir()) == []


def test_a_line_whose_end_was_cut_off_is_not_joined_with_the_next(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    for step in (1, 2):
        file.append({"step": step})
    file.path.write_bytes(file.path.read_bytes()[:-1])
    assert file.discard_after(2) == 0
    file.append({"step": 3})
    assert [record["step"] for record in file.read()] == [1, 2, 3]


def test_lines_with_a_damaged_step_are_moved(tmp_path: Path) -> None:
    file = JsonLines(tmp_path / "metrics.jsonl")
    lines = ['{"step": "1"}', '{"step": null}', '{"step": NaN}', "{}", "[" * 100_000, '{"step": 1}']
    file.path.write_text("".join(f"{line}\n" for line in lines))
    assert file.discard_after(5) == 5
    assert file.path.read_text() == '{"step": 1}\n'
