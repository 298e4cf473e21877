"""``aurora status``: what it says of runs in every state."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import main
from pretrain.run.status import duration, find_runs, read_status
from pretrain.watching.heartbeat import heartbeat_file, write_heartbeat
from tests.conftest import REPOSITORY
from tests.report.folders import LAUNCH, records, write_run
from tests.watching.beats import beat


def written(path: Path, seconds_ago: float) -> None:
    os.utime(path, (time.time() - seconds_ago,) * 2)


def old(run: Path) -> Path:
    for name in ("metrics.jsonl", "manifest.json"):
        written(run / name, 3600)
    return run


def checkpoint(run: Path, step: int, seconds_ago: float = 0.0) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "index.json").write_text("{}")
    written(folder / "index.json", seconds_ago)


def heartbeat(run: Path, rank: int = 0, seconds_ago: float = 0.0, **changes: Any) -> None:
    folder = run / "heartbeats"
    folder.mkdir(exist_ok=True)
    write_heartbeat(folder, beat(rank, **{"stalled": 0.0, **changes}))
    written(heartbeat_file(folder, rank), seconds_ago)


def locked(run: Path) -> Any:
    lock = (run / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def test_a_running_run(tmp_path: Path) -> None:
    run = old(write_run(tmp_path / "run", records(100, seconds=2.0), finished=False, launches=[LAUNCH] * 3))
    checkpoint(run, 40)
    checkpoint(run, 80, seconds_ago=300)
    (run / "checkpoints" / "step-00000090.tmp").mkdir()
    (run / "checkpoints" / "step-00000090").mkdir()  # without an index it is none
    heartbeat(run, phase="save")
    with locked(run):
        found = read_status(run)
    assert (found.state, found.step, found.total_steps, found.tokens) == ("running", 100, 500, 100 * 4096)
    assert found.tokens_per_second == 2048
    assert found.seconds_left == pytest.approx(400 * 2.0)
    assert (found.checkpoint_step, found.restarts, found.phase) == (80, 2, "save")
    assert found.checkpoint_seconds == pytest.approx(300, abs=30)
    assert found.health == ()


def test_a_run_whose_heart_beats_is_running_although_its_lock_cannot_be_seen(tmp_path: Path) -> None:
    run = old(write_run(tmp_path / "run", records(3), finished=False))
    assert read_status(run).state == "stopped"
    heartbeat(run)
    assert read_status(run).state == "running"
    heartbeat(run, seconds_ago=3600)
    found = read_status(run)
    assert found.state == "stopped"
    assert found.health == ("ended without a word: rank 0 on node0 (process 1000) was in phase backward of step 7",)


@pytest.mark.parametrize(
    ("changes", "seconds_ago", "problem"),
    [
        ({}, 100, "has been silent for 100 s, last in phase backward of step 7"),
        ({"stalled": 90.0, "limit": 120.0, "phase": "data"}, 0, "no progress for 90 s in phase data of step 7"),
        ({"forward_seconds": 0.5}, 0, "2.5 times as long as those of the median rank (0.2 s)"),
        ({"verdict": "rank 1 hangs\n more"}, 0, "rank 1 hangs"),
    ],
)
def test_what_is_wrong_with_a_rank_is_said(
    changes: dict[str, Any], seconds_ago: float, problem: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", records(3), finished=False)
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "\nwatch:\n  straggler_factor: 1.5\n")
    for rank in (0, 2, 3):
        heartbeat(run, rank, forward_seconds=0.2)
    heartbeat(run, 1, seconds_ago, **{"forward_seconds": 0.2, **changes})
    with locked(run):
        [found] = read_status(run).health
    assert found.endswith(problem)


def test_a_loss_that_is_not_finite_and_skipped_steps(tmp_path: Path) -> None:
    rows = [*records(2), {"step": 3, "tokens": 3, "loss": None, "skipped": True}]
    found = read_status(write_run(tmp_path / "run", rows, finished=False))
    assert found.skipped_steps == 1
    assert found.health == ("the loss of step 3 is not finite", "step 3 was skipped")


def test_all_runs_of_a_root_in_one_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "b-done", records(500))
    old(write_run(tmp_path / "sweep" / "runs" / "a", records(5), finished=False))
    (tmp_path / "c-broken").mkdir()
    (tmp_path / "c-broken" / "manifest.json").write_text("{")
    (tmp_path / "empty").mkdir()
    assert [path.name for path in find_runs(tmp_path)] == ["b-done", "c-broken", "a"]
    assert main(["status", str(tmp_path)]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["run", "state", "step"]
    assert [line.split()[1] for line in lines[:3]] == ["done", "unreadable", "stopped"]
    assert lines[0].endswith("ok")
    assert len(lines) == 4
    assert "manifest.json: cannot be read" in lines[3]
    assert main(["status", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [one["state"] for one in found] == ["done", "unreadable", "stopped"]
    assert main(["status", str(tmp_path / "b-done")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert main(["status", str(tmp_path / "empty")]) == 2
    assert "holds no run" in capsys.readouterr().err


ODD = [None, 10**400, 1e308, "\ud800", {"a": 1}]


@pytest.mark.parametrize("value", ODD, ids=[str(number) for number in range(len(ODD))])
def test_one_damaged_value_of_a_run_does_not_hide_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: Any
) -> None:
    write_run(tmp_path / "good", records(3))
    run = write_run(tmp_path / "odd", records(3))
    heartbeat(run)
    beating = heartbeat_file(run / "heartbeats", 0)
    files = {
        run / "manifest.json": json.loads((run / "manifest.json").read_text()),
        run / "metrics.jsonl": records(3)[-1],
        beating: json.loads(beating.read_text()),
    }
    for path, content in files.items():
        whole = path.read_bytes()
        for key in content:
            path.write_bytes(json.dumps({**content, key: value}).encode("utf-8", "surrogatepass"))
            for words in ([], ["--json"]):
                assert main(["status", str(tmp_path), *words]) == 0, (path.name, key)
                assert "good" in capsys.readouterr().out
        path.write_bytes(whole)


def test_a_run_behind_a_link_is_found_and_a_circle_of_links_is_not_followed(tmp_path: Path) -> None:
    root, disk = tmp_path / "runs", tmp_path / "disk"
    write_run(disk / "moved", records(3), finished=False)
    write_run(disk / "deep/below", records(3), finished=False)
    root.mkdir()
    (root / "run").symlink_to(disk / "moved")
    (root / "circle").symlink_to(root)
    (root / "other").symlink_to(disk / "deep")
    (root / "gone").symlink_to(disk / "nothing")
    assert find_runs(root) == [root / "run"]


def test_status_does_not_import_torch(tmp_path: Path) -> None:
    write_run(tmp_path / "run", records(3))
    code = (
        "import sys; from pretrain.cli import main\n"
        "assert main(['status', sys.argv[1]]) == 0; assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60)
    assert done.returncode == 0, done.stderr


def test_durations() -> None:
    texts = [duration(seconds) for seconds in (9.4, 61, 3600 * 4 + 600, 86400 * 3 + 3600 * 4)]
    assert texts == ["9 s", "1 min", "4 h 10 min", "3 d 4 h"]
