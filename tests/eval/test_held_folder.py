"""Folders that several processes use, that a kill leaves, and that nothing leaves for good."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from eval.errors import EvalError
from eval.held_folder import held_folder
from eval.sharing import Team
from pretrain.cli import evaluated_models
from pretrain.cli.evaluated_models import as_model
from tests.eval.forked import CONTEXT, run_forked


def filler(fills: Path) -> Callable[[Path], None]:
    """Creates the folder as an export does; counts how often."""

    def fill(folder: Path) -> None:
        with fills.open("a") as file:
            file.write("x")
        partial = folder.with_name(folder.name + ".tmp")
        partial.mkdir()
        (partial / "weights").write_text("w")
        time.sleep(0.05)
        partial.rename(folder)

    return fill


def names(parent: Path) -> list[str]:
    """Of what this host has below `parent`, where it has nothing else."""
    (host,) = parent.iterdir()
    assert host.name == re.sub(r"[^\w-]", "-", socket.gethostname())
    return sorted(path.name for path in host.iterdir())


def test_a_folder_ends_with_its_last_user(tmp_path: Path) -> None:
    parent, fills = tmp_path / "held", tmp_path / "fills"
    with held_folder(parent, "a", filler(fills)) as one:
        with held_folder(parent, "a", filler(fills)) as two:
            assert one == two
            assert (two / "weights").read_text() == "w"
        assert (one / "weights").exists()
        assert names(parent) == ["a", "a.lock"]
    assert names(parent) == []
    assert fills.read_text() == "x"


def test_processes_that_start_together_fill_it_once(tmp_path: Path) -> None:
    for attempt in range(4):
        parent, fills = tmp_path / f"held-{attempt}", tmp_path / f"fills-{attempt}"
        _start_together(parent, fills)
        assert fills.read_text() == "x"
        assert names(parent) == []


def _start_together(parent: Path, fills: Path) -> None:
    """Four processes that leave the folder only when all four have it."""
    ready = CONTEXT.Barrier(4)

    def work() -> None:
        ready.wait()
        with held_folder(parent, "a", filler(fills)) as folder:
            assert (folder / "weights").read_text() == "w"
            ready.wait()

    processes = [CONTEXT.Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * 4


def test_a_user_of_the_folder_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that did not see the folder, which another filled and uses since, gets it at once."""
    parent, fills = tmp_path / "held", tmp_path / "fills"
    with contextlib.ExitStack() as users:
        flock = fcntl.flock

        def filled_meanwhile(lock: int, operation: int) -> None:
            if operation & fcntl.LOCK_EX and not fills.exists():
                monkeypatch.setattr("eval.held_folder.fcntl.flock", flock)
                flock(lock, fcntl.LOCK_UN)  # what the system does before it waits for the exclusive lock
                users.enter_context(held_folder(parent, "a", filler(fills)))
                assert operation & fcntl.LOCK_NB, "waits for all users"
            flock(lock, operation)

        monkeypatch.setattr("eval.held_folder.fcntl.flock", filled_meanwhile)
        with held_folder(parent, "a", filler(fills)) as folder:
            assert (folder / "weights").read_text() == "w"
        assert (folder / "weights").exists()
    assert fills.read_text() == "x"
    assert names(parent) == []


def killed_in(parent: Path, name: str, fill: Callable[[Path], None]) -> None:
    def work() -> None:
        with held_folder(parent, name, fill):
            os.kill(os.getpid(), signal.SIGKILL)

    assert run_forked(work) == -signal.SIGKILL


def test_what_a_kill_leaves_is_used_again_or_deleted(tmp_path: Path) -> None:
    parent, fills = tmp_path / "held", tmp_path / "fills"
    killed_in(parent, "a", filler(fills))
    assert names(parent) == ["a", "a.lock"]
    killed_in(parent, "a", filler(fills))
    assert fills.read_text() == "x"  # was still good

    def half(folder: Path) -> None:
        folder.with_name(folder.name + ".tmp").mkdir()
        os.kill(os.getpid(), signal.SIGKILL)

    killed_in(parent, "b", half)  # deletes the first one
    assert names(parent) == ["b.lock", "b.tmp"]
    with held_folder(parent, "c", filler(fills)):
        assert names(parent) == ["c", "c.lock"]
    assert names(parent) == []


def test_a_folder_in_use_is_not_deleted_by_others(tmp_path: Path) -> None:
    parent, fills = tmp_path / "held", tmp_path / "fills"
    with held_folder(parent, "a", filler(fills)) as one, held_folder(parent, "b", filler(fills)):
        assert (one / "weights").exists()


def test_a_host_deletes_nothing_of_another_whose_locks_it_does_not_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent, fills = tmp_path / "held", tmp_path / "fills"
    with held_folder(parent, "a", filler(fills)) as one:
        with monkeypatch.context() as node:
            node.setattr("eval.held_folder.socket.gethostname", lambda: "node-2.cluster")
            node.setattr("eval.held_folder.fcntl.flock", lambda *_: None)
            with held_folder(parent, "b", filler(fills)), held_folder(parent, "a", filler(fills)) as other:
                assert other != one
        assert (one / "weights").exists()
        assert not other.exists()


def test_without_locks_each_process_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("eval.held_folder.fcntl.flock", refuse)
    parent, fills = tmp_path / "held", tmp_path / "fills"
    with held_folder(parent, "a", filler(fills)) as one, held_folder(parent, "a", filler(fills)) as two:
        assert one != two
        assert (one / "weights").exists()
    assert not one.exists()
    assert names(parent) == []


def test_a_folder_that_cannot_be_filled_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        raise ValueError("no checkpoint")

    with pytest.raises(ValueError, match="no checkpoint"), held_folder(tmp_path / "held", "a", fail):
        pass

    def miss(folder: Path) -> None:
        raise FileNotFoundError(2, "No such file", "weights.safetensors")

    with pytest.raises(FileNotFoundError, match=r"weights\.safetensors"), held_folder(tmp_path / "held", "a", miss):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(EvalError, match="set AURORA_CACHE"), held_folder(tmp_path / "file", "a", fail):
        pass


def test_a_run_is_exported_to_the_cache_and_a_killed_evaluation_leaves_the_export_to_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path / "cache"))
    run, fills = tmp_path / "run", tmp_path / "fills"
    checkpoint = run / "checkpoints" / "step-1"
    checkpoint.mkdir(parents=True)
    (checkpoint / evaluated_models.INDEX).write_text("{}")
    monkeypatch.setattr(evaluated_models, "open_checkpoint", lambda source: SimpleNamespace(folder=checkpoint))
    monkeypatch.setattr(evaluated_models, "export_checkpoint", lambda source, out: filler(fills)(out))

    def work() -> None:
        with as_model(str(run), Team()):
            os.kill(os.getpid(), signal.SIGKILL)

    assert run_forked(work) == -signal.SIGKILL
    with as_model(str(run), Team()) as folder:
        assert Path(folder).is_relative_to(tmp_path / "cache" / "eval-exports")
    assert fills.read_text() == "x"
    assert names(tmp_path / "cache" / "eval-exports") == []
    (checkpoint / evaluated_models.INDEX).write_text("{ }")  # trained anew
    with as_model(str(run), Team()) as other:
        assert other != folder
    with as_model("org/name", Team()) as name:
        assert name == "org/name"

    def vanish(*_: object) -> None:
        shutil.rmtree(checkpoint)
        raise FileNotFoundError(2, "No such file", "weights.safetensors")

    monkeypatch.setattr(evaluated_models, "export_checkpoint", vanish)
    with pytest.raises(EvalError, match=r"cannot export .*step-1 to .*deleted meanwhile"), as_model(str(run), Team()):
        pass
    run.joinpath("checkpoints").mkdir(exist_ok=True)
    monkeypatch.setattr(evaluated_models, "is_run_or_checkpoint", lambda _: True)
    with pytest.raises(EvalError, match=r"cannot read the checkpoint .*step-1"), as_model(str(run), Team()):
        pass
