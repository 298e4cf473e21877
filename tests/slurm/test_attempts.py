"""The record of a job's starts."""

from __future__ import annotations

from pathlib import Path

from pretrain.slurm.attempts import Attempts, Verdict


def test_the_record_is_read_back(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path / "attempts.json")
    attempts.begin(0, "n0", 10)
    attempts.end(1, 10, Verdict(True, "failed"))
    again = Attempts(tmp_path / "attempts.json")
    assert again.stalled(10) == 1
    assert again.stalled(11) == 0
