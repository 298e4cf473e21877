"""Which rank is named, from the heartbeats of all."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.watching.heartbeat import heartbeat_file, read_heartbeats, remove_heartbeats, write_heartbeat
from pretrain.watching.verdict import suspects, verdict
from tests.watching.beats import beat


def three(**of_rank_1: object) -> dict[int, object]:
    return {0: beat(0), 1: beat(1, **of_rank_1), 2: beat(2)}


def named(found: str | None) -> str:
    assert found is not None
    return found.splitlines()[0]


def test_the_rank_that_has_come_least_far_is_named_with_its_phase() -> None:
    beats = three(marks=69, phase="forward")
    for rank in range(3):  # every rank comes to the same conclusion
        line = named(verdict(beats[rank], beats, set()))
        assert line == "rank 1 on node1 (process 1001) hangs in phase forward of step 7: no progress for 10 seconds"


def test_among_equals_the_one_that_waits_for_nobody_is_named() -> None:
    beats = three(waiting=False, where="pretrain/data/stream.py:5 in read")
    found = verdict(beats[0], beats, set())
    assert named(found).startswith("rank 1 on node1 (process 1001) hangs in phase backward")
    assert "  rank 1 on node1: step 7, backward, pretrain/data/stream.py:5 in read" in found.splitlines()
    assert found.count("waits for other ranks") == 2


def test_where_nothing_sets_a_rank_apart_all_are_named() -> None:
    assert named(verdict(beat(0), three(), set())).startswith("all ranks hang in phase backward of step 7")
    alone = {0: beat(0, world_size=1, waiting=False)}
    assert named(verdict(alone[0], alone, set())).startswith("rank 0 on node0 (process 1000) hangs in phase backward")


def test_a_silent_rank_is_named_whatever_it_said_last() -> None:
    beats = three(marks=90, step=9, phase="data", stalled=0.0)
    found = verdict(beats[0], beats, {1})
    assert named(found).startswith("rank 1 on node1 (process 1001) hangs, last seen in phase data of step 9; ")
    assert "  rank 1 on node1: step 9, data, no sign of life" in found.splitlines()


@pytest.mark.parametrize(
    "of_rank_1",
    [
        {"stalled": 3.0},  # it makes progress, for example by reading while the others wait for it
        {"marks": 69, "phase": "save", "limit": 100.0},  # what it does may take longer than what the others do
    ],
)
def test_a_run_that_may_still_go_on_is_left_alone(of_rank_1: dict[str, object]) -> None:
    beats = three(**of_rank_1)
    assert verdict(beats[0], beats, set()) is None
    assert verdict(beats[1], beats, set()) is None


def test_a_phase_that_may_take_long_has_no_longer_for_a_process_that_is_stopped() -> None:
    beats = three(phase="validation", limit=100.0)
    line = named(verdict(beats[0], beats, {1}))
    assert "rank 1 on node1" in line
    assert "no progress for 10 seconds" in line


def test_a_stale_heartbeat_from_the_first_step_does_not_make_a_stopped_rank_slow() -> None:
    """Steps may be shorter than the time between heartbeats. This rank is farther, so the other one has been too."""
    early = {"step": 1, "limit": 60.0, "stopped_limit": 60.0}
    beats = three(**early)
    assert named(verdict(beats[0], beats, {1})).endswith("no progress for 10 seconds")
    started = {0: beat(0, **early), 1: beat(1, **early), 2: beat(2, **early)}
    assert verdict(started[0], started, {1}) is None


def test_the_reason_that_another_rank_gave_is_taken_over() -> None:
    assert verdict(beat(0, stalled=0.0), three(verdict="rank 2 hangs"), set()) == "rank 2 hangs"


def test_many_ranks_do_not_hide_the_first_line() -> None:
    beats = {rank: beat(rank, marks=70 - (rank > 100)) for rank in range(1000)}
    found = verdict(beats[0], beats, set())
    assert "rank 101 on node101" in named(found)
    assert "and 883 more" in named(found)
    assert len(found.splitlines()) < 20
    assert len(suspects(beats, set())) == 899


def test_heartbeats_of_other_launches_and_damaged_ones_are_left_out(tmp_path: Path) -> None:
    for rank, launch in enumerate(["one", "two", "one"]):
        write_heartbeat(tmp_path, beat(rank, launch=launch))
    heartbeat_file(tmp_path, 3).write_text('{"rank": 3')
    heartbeat_file(tmp_path, 4).write_text('["rank", 4]')
    heartbeat_file(tmp_path, 5).write_text(heartbeat_file(tmp_path, 0).read_text())
    heartbeat_file(tmp_path, 0).write_text(heartbeat_file(tmp_path, 0).read_text().replace("{", '{"later": 1, ', 1))
    assert list(read_heartbeats(tmp_path, "one")) == [0, 2]
    assert list(read_heartbeats(tmp_path)) == [0, 1, 2]
    assert read_heartbeats(tmp_path)[2] == beat(2)
    remove_heartbeats(tmp_path, range(6))
    assert not tmp_path.exists()
