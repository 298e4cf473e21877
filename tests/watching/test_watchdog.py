"""A run in which a rank hangs ends soon, with the name of the rank, the phase, and the stacks of all ranks."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.config.watch import WatchConfig
from pretrain.watching.heartbeat import cpu_seconds, read_heartbeats, write_heartbeat
from pretrain.watching.progress import Progress
from pretrain.watching.watchdog import Place, Watchdog
from tests.counting.where import configured, train
from tests.distributed.ranks import start_ranks
from tests.watching.beats import beat
from tests.watching.hanging import KINDS, QUICK, hang

LONG = pytest.mark.long


def ended(root: Path, world_size: int, kind: str, at_fault: int, **changes: Any) -> tuple[list[int], str]:
    """Let a rank hang; the exit codes, and what the other ranks printed."""
    processes, _ = start_ranks(world_size, hang, str(root), kind, at_fault, changes)
    try:
        for process in processes:
            process.join(60)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return codes, "".join((root / f"stderr-{rank}").read_text() for rank in range(world_size))


@pytest.mark.parametrize(
    ("kind", "world_size", "at_fault", "changes"),
    [
        pytest.param("stop", 2, 1, {}, id="stopped"),
        pytest.param("stop", 2, 0, {"engine.kind": "deepspeed", "engine.zero_stage": 2}, marks=LONG, id="rank 0"),
        pytest.param("stop", 3, 2, {"engine.kind": "deepspeed", "engine.zero_stage": 3}, marks=LONG, id="zero 3"),
        pytest.param("deadlock", 2, 1, {}, marks=LONG, id="deadlock"),
        pytest.param("deadlock", 1, 0, {}, marks=LONG, id="alone"),
        pytest.param("interpreter", 3, 1, {}, marks=LONG, id="interpreter"),
        pytest.param("read", 3, 0, {}, marks=LONG, id="read"),
    ],
)
def test_the_rank_that_hangs_is_named_and_every_rank_ends(
    kind: str, world_size: int, at_fault: int, changes: dict[str, Any], tmp_path: Path
) -> None:
    codes, printed = ended(tmp_path, world_size, kind, at_fault, **changes)
    frozen = kind in ("stop", "interpreter")
    assert codes == [-9 if frozen and rank == at_fault else 1 for rank in range(world_size)]
    first = next(line for line in printed.splitlines() if line.startswith("error: "))
    assert first.startswith(f"error: rank {at_fault} on "), printed
    assert "no progress for 1.5 seconds" in first
    if not frozen:  # the heartbeat of a process that does not run is a little old
        assert "hangs in phase forward of step 3" in first
    if kind == "stop":
        assert "its process is stopped by a signal" in first
    folder = configured(str(tmp_path), QUICK).run_folder / "heartbeats"
    for rank in range(world_size):
        stacks = (folder / f"rank-{rank:05d}.stacks.txt").read_text()
        assert "in fit" in stacks
        assert (f"in {KINDS[kind].__name__}" in stacks) == (rank == at_fault), stacks


def watchdog(folder: Path, settings: WatchConfig, world_size: int = 1, **options: Any) -> tuple[Watchdog, list[int]]:
    codes: list[int] = []
    return Watchdog(Place(folder, "one", 0, world_size), settings, Progress(), leave=codes.append, **options), codes


def test_limits_are_short_only_after_the_first_step(tmp_path: Path) -> None:
    dog, _ = watchdog(tmp_path, WatchConfig(hang_seconds=10, slow_seconds=100), data_seconds=7)
    limits = []
    for phase, step in [
        ("start", 0),
        ("data", 5),
        ("backward", 5),
        ("save", 5),
        ("data", 6),
        ("forward", 6),
        ("validation", 6),
        ("telemetry", 6),
        ("samples", 6),
        ("save", 6),
    ]:
        dog.progress.enter(phase, step)
        limits.append(dog.limit())
    assert limits == [107, 107, 100, 100, 17, 10, 107, 107, 100, 100]
    dog.progress.longest["save"] = 30.0  # it took so long before
    assert dog.limit() == 150
    assert watchdog(tmp_path, WatchConfig(hang_seconds=None))[0].limit() == float("inf")


@pytest.mark.parametrize(
    ("phase", "limit"), [("validation", 10), ("forward", 10), ("data", 10), ("save", 100), ("start", 107)]
)
def test_a_rank_that_is_silent_has_a_short_limit_but_in_a_save(phase: str, limit: float, tmp_path: Path) -> None:
    """A disk that is busy with a save may keep the heartbeats waiting, and the save may take its time."""
    dog, _ = watchdog(tmp_path, WatchConfig(hang_seconds=10, slow_seconds=100), data_seconds=7)
    if phase != "start":
        dog.progress.enter("data", 5)
        dog.progress.enter(phase, 6)
    assert dog.heartbeat().stopped_limit == limit


@pytest.mark.parametrize(("last_seen", "stopped_limit"), [("save", 100.0), ("records", 10.0)])
def test_a_slow_save_that_keeps_heartbeats_waiting_is_no_hang(
    last_seen: str, stopped_limit: float, tmp_path: Path
) -> None:
    """Also if the last heartbeat is from before the save."""
    dog, _ = watchdog(tmp_path, WatchConfig(hang_seconds=10, slow_seconds=100), world_size=2)
    for phase, step in (("data", 5), ("save", 6)):
        dog.progress.enter(phase, step)
    dog._wrote = True
    write_heartbeat(tmp_path, beat(1, phase=last_seen, step=6, limit=100.0, stopped_limit=stopped_limit))
    dog._read()
    found = []
    for dog._stalled in (50.0, 120.0):
        dog._clock = dog._looked = dog._stalled
        assert dog.silent() == {1}
        found.append(dog.judge())
    assert found[0] is None
    assert "no progress for 100 seconds" in str(found[1])


def test_a_compiled_model_has_longer_to_settle() -> None:
    progress = Progress(settling=3)
    settled = []
    for step in range(10, 15):
        progress.enter("data", step)
        settled.append(progress.settled)
    assert settled == [False, False, False, True, True]


def test_a_rank_that_stands_still_is_ended_and_one_that_ticks_is_not(tmp_path: Path) -> None:
    said: list[str] = []
    dog, codes = watchdog(tmp_path / "beats", WatchConfig(hang_seconds=1, slow_seconds=1), alert=said.append)
    with dog.watching():
        until = time.monotonic() + 1.6
        while time.monotonic() < until:
            dog.progress.tick()
            time.sleep(0.05)
        assert not codes
        assert read_heartbeats(tmp_path / "beats", "one")[0].stalled < 0.5
        until = time.monotonic() + 10
        while not codes and time.monotonic() < until:
            time.sleep(0.05)
    assert codes == [1]
    assert "rank 0 on" in said[0]
    assert "hangs in phase start" in said[0]


def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after Ctrl-Z and ``fg``, or on a machine that was suspended."""
    clock = iter([0.0, 0.1, 3600.0, 3600.1])
    dog, codes = watchdog(tmp_path, WatchConfig(hang_seconds=1, slow_seconds=1))
    monkeypatch.setattr("pretrain.watching.watchdog.time.monotonic", lambda: next(clock))
    monkeypatch.setattr(dog._ended, "wait", lambda seconds: dog._clock > 0.35)
    dog._wrote = True
    dog._keep_judging()
    assert not codes
    assert dog._stalled < 0.5


@pytest.mark.parametrize(
    ("phase", "share", "alive"), [("data", 0.5, True), ("data", 0.05, False), ("save", 0.5, False)]
)
def test_a_rank_that_computes_while_it_prepares_data_does_not_hang(
    phase: str, share: float, alive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when it scans a large file for the next batch."""
    dog, _ = watchdog(tmp_path, WatchConfig(hang_seconds=1, slow_seconds=1))
    dog.progress.enter(phase, 1)
    now = iter(number / 10 for number in range(100))
    monkeypatch.setattr("pretrain.watching.watchdog.time.monotonic", lambda: next(now))
    monkeypatch.setattr("pretrain.watching.watchdog.cpu_seconds", lambda: share * dog._clock)
    monkeypatch.setattr(dog, "judge", lambda: None)
    monkeypatch.setattr(dog._ended, "wait", lambda seconds: dog._clock > 5)
    dog._keep_judging()
    assert (dog._stalled < 0.5) is alive


def test_the_cpu_time_of_children_counts() -> None:
    code = "import sys, time\nwhile time.process_time() < 0.3: pass\nprint(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        assert cpu_seconds() - time.process_time() > 0.2
        child.communicate()


def test_a_run_without_a_limit_keeps_only_its_heartbeat(tmp_path: Path) -> None:
    dog, _ = watchdog(tmp_path / "beats", WatchConfig(hang_seconds=None))
    with dog.watching():
        assert list(read_heartbeats(tmp_path / "beats")) == [0]
        assert "keep_judging" not in {thread.name for thread in threading.enumerate()}
    assert not (tmp_path / "beats").exists()


def test_a_folder_that_does_not_answer_does_not_silence_the_watchdog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.watching.watchdog.DUMP_SECONDS", 0.1)
    dog, _ = watchdog(tmp_path, WatchConfig(hang_seconds=1, slow_seconds=1))
    dog._clock, dog._looked, dog._stalled = 9.0, 1.0, 8.0
    assert "the run folder does not answer" in str(dog.judge())


def test_a_full_disk_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path, written: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pretrain.watching.watchdog.write_heartbeat", full)
    dog, codes = watchdog(tmp_path / "beats", WatchConfig(hang_seconds=1, slow_seconds=1), world_size=2)
    with dog.watching():
        time.sleep(0.3)
        dog._stalled = 50.0
        assert dog.judge() is None
    assert not codes


def test_ranks_that_are_silent_or_were_never_heard_of_are_found(tmp_path: Path) -> None:
    dog, _ = watchdog(tmp_path, WatchConfig(hang_seconds=10, slow_seconds=10), world_size=3)
    dog._stalled = dog._clock = dog._looked = 20.0
    dog._wrote = True
    write_heartbeat(tmp_path, beat(1, beats=5))
    dog._read()
    assert dog.silent() == set()
    found = str(dog.judge())
    assert found.startswith("rank 2 on an unknown host")
    assert "shows no sign of life" in found
    dog._clock = dog._looked = 30.0
    write_heartbeat(tmp_path, beat(2))
    dog._read()
    assert dog.silent() == {1}
    assert str(dog.judge()).startswith("rank 1 on node1")


def test_a_run_that_ends_well_leaves_no_heartbeat(tmp_path: Path) -> None:
    config = configured(str(tmp_path), QUICK)
    assert train(config, "never", 2) == 75
    assert not (config.run_folder / "heartbeats").exists()
