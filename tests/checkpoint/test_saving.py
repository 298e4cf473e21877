"""A save is written behind the training, one at a time, and an error of the disk does not end the run."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file as save_with_library

from pretrain.checkpoint import saver as saver_module
from pretrain.checkpoint import tensor_file, writer
from pretrain.checkpoint.format import Fragment
from pretrain.checkpoint.host_copy import HostCopy, share_of
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.store import CheckpointReader, list_checkpoints
from pretrain.checkpoint.tensor_file import save_file
from pretrain.config.checkpoint import CheckpointConfig
from pretrain.engine.ranks import Ranks
from tests.checkpoint.test_store import fragments, snapshot

GENERATORS = {"torch": torch.zeros(3, dtype=torch.uint8)}
FULL = OSError(errno.ENOSPC, "No space left on device")


def make_saver(root: Path, **settings: Any) -> tuple[Saver, list[str]]:
    """A saver, and the lines that it prints."""
    lines: list[str] = []

    def warn(line: str) -> None:
        lines.append(f"warning: {line}")

    return Saver(root, CheckpointConfig(**settings), Ranks(), say=lines.append, warn=warn), lines


def save(saver: Saver, step: int, values: list[Fragment] | None = None) -> None:
    saver.save(snapshot(step), values or fragments(), GENERATORS, Ranks())


def steps(root: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(root)]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Nothing is written before this is set."""
    opened, write = threading.Event(), writer._write_rank

    def waits(*arguments: Any) -> Any:
        assert opened.wait(60)
        return write(*arguments)

    monkeypatch.setattr(writer, "_write_rank", waits)
    yield opened
    opened.set()


def test_files_have_the_bytes_of_the_library_and_their_digest(tmp_path: Path) -> None:
    tensors = {
        f"{index % 3}.{dtype}:{shape}": torch.randint(0, 2, shape).to(dtype)
        for dtype in tensor_file._DTYPES
        for index, shape in enumerate(((), (3,), (2, 5), (0,)))
    }
    tensors |= {"größe": torch.ones(7), "large": torch.rand(tensor_file.BLOCK_BYTES // 4 + 5), "cut": torch.rand(9)[3:]}
    digest = save_file(tensors, tmp_path / "ours")
    save_with_library(tensors, tmp_path / "theirs")
    found = (tmp_path / "ours").read_bytes()
    assert found == (tmp_path / "theirs").read_bytes()
    assert digest == hashlib.sha256(found).hexdigest()


def test_a_file_is_not_read_again_for_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and str(tmp_path) in str(arguments[0]) and arguments[1] in ("r", "rb"):
            read.append(str(arguments[0]))

    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("hashed by reading"))
    sys.addaudithook(audit)
    saver, _ = make_saver(tmp_path, asynchronous=False)
    save(saver, 1)
    assert not [path for path in read if path.endswith(".safetensors")]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_files_have_the_mode_that_the_umask_leaves(mask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        saver, _ = make_saver(tmp_path)
        save(saver, 1)
        saver.settle()
    finally:
        os.umask(before)
    found = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "step-00000001").iterdir()}
    assert set(found.values()) == {mode}, found


def test_a_file_may_carry_texts(tmp_path: Path) -> None:
    texts = {"record": '{"step": 3}', "größe": "ä"}
    save_file({"a": torch.arange(3)}, tmp_path / "file", texts)
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == texts
        assert file.get_tensor("a").tolist() == [0, 1, 2]


def test_a_copy_keeps_its_values_in_memory_that_is_used_again() -> None:
    copy, values = HostCopy(), torch.arange(100.0)
    given = [Fragment("a", "weight", (), 0, torch.tensor(True)), Fragment("b", "weight", (100,), 0, values)]
    first = copy.take(given)[1].values
    values.neg_()
    assert torch.equal(first, torch.arange(100.0))
    address = first.data_ptr()
    second = copy.take(given)[1].values
    assert second.data_ptr() == address
    assert torch.equal(second, values)
    larger = copy.take([*given, Fragment("c", "weight", (3, 5), 0, torch.ones(5, 3, dtype=torch.bfloat16).T)])
    assert torch.equal(larger[2].values, torch.ones(3, 5, dtype=torch.bfloat16))
    assert torch.equal(larger[1].values, values)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 9), st.sampled_from([torch.bfloat16, torch.float32, torch.int64]))),
    world_size=st.integers(1, 7),
)
def test_ranks_share_what_all_of_them_hold(sizes: list[tuple[int, torch.dtype]], world_size: int) -> None:
    given = [Fragment(str(i), "weight", (n,), 0, torch.arange(n).to(dtype)) for i, (n, dtype) in enumerate(sizes)]
    shares = [list(share_of(given, rank, world_size)) for rank in range(world_size)]
    for whole in given:
        pieces = [piece for share in shares for piece in share if piece.name == whole.name]
        assert torch.equal(torch.cat([piece.values for piece in pieces]), whole.values)
        assert [piece.start for piece in pieces] == [
            sum(piece.values.numel() for piece in pieces[:index]) for index in range(len(pieces))
        ]
    total = sum(fragment.values.nbytes for fragment in given)
    for share in shares:
        assert abs(sum(piece.values.nbytes for piece in share) - total / world_size) <= 8


def test_a_save_is_written_behind_and_holds_what_was_there_then(tmp_path: Path, gate: threading.Event) -> None:
    saver, lines = make_saver(tmp_path)
    values = torch.arange(6.0)
    save(saver, 3, [Fragment("w", "weight", (6,), 0, values)])
    assert saver.in_flight
    values.zero_()  # the next step
    assert (steps(tmp_path), lines) == ([], [])
    gate.set()
    saver.settle()
    assert not saver.in_flight
    assert steps(tmp_path) == [3]
    assert lines == [f"saved {tmp_path / 'step-00000003'}"]
    assert torch.equal(CheckpointReader(tmp_path / "step-00000003").read("w", "weight"), torch.arange(6.0))


def test_a_save_that_falls_due_meanwhile_waits_and_none_is_dropped(
    tmp_path: Path, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    take, write = HostCopy.take, saver_module.save_checkpoint

    def taken(self: HostCopy, given: Any) -> Any:
        events.append("copy")
        return take(self, given)

    def written(root: Path, *rest: Any) -> Any:
        events.append("begin")
        found = write(root, *rest)
        events.append("end")
        return found

    monkeypatch.setattr(HostCopy, "take", taken)
    monkeypatch.setattr(saver_module, "save_checkpoint", written)
    saver, _ = make_saver(tmp_path)
    save(saver, 1)
    threading.Timer(0.05, gate.set).start()
    for step in (2, 3, 4):  # the memory of a copy is not written to before its save has ended
        save(saver, step, [Fragment("w", "weight", (1,), 0, torch.tensor([float(step)]))])
    saver.settle()
    assert events == ["copy", "begin", "end"] * 4
    assert steps(tmp_path) == [1, 2, 3, 4]
    for step in (2, 3, 4):
        assert CheckpointReader(tmp_path / f"step-{step:08d}").read("w", "weight").item() == step


def test_without_asynchronous_nothing_is_copied_and_a_save_is_complete_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HostCopy, "take", lambda *_: pytest.fail("copied"))
    saver, _ = make_saver(tmp_path, asynchronous=False)
    save(saver, 2)
    assert steps(tmp_path) == [2]
    assert not saver.in_flight


def test_both_kinds_of_save_write_the_same_bytes(tmp_path: Path) -> None:
    for name, asynchronous in (("a", True), ("b", False)):
        saver, _ = make_saver(tmp_path / name, asynchronous=asynchronous)
        save(saver, 2)
        saver.settle()
    first, second = ({p.name: p.read_bytes() for p in tmp_path.glob(f"{name}/*/*")} for name in "ab")
    assert first == second
    assert len(first) == 3


@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("place", ["save_file", "sync", "_publish", "build_index"])
def test_a_full_disk_is_a_warning_and_the_earlier_checkpoint_stays(
    place: str, asynchronous: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, lines = make_saver(tmp_path, asynchronous=asynchronous)
    save(saver, 1)
    saver.settle()
    with monkeypatch.context() as broken:
        broken.setattr(writer, place, lambda *_, **__: (_ for _ in ()).throw(FULL))
        save(saver, 2)
        save(saver, 3)
        with pytest.raises(OSError, match=r"checkpoint of step 3 not saved.*No space left"):
            saver.settle()
        assert (saver.failed, saver.failed_in_a_row) == (2, 2)
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert warnings[0].startswith("warning: checkpoint of step 2 not saved: [Errno 28] No space left on device")
    assert warnings[0].endswith("the newest checkpoint is step-00000001")
    assert "(2 saves in a row have failed)" in warnings[1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]  # what was written gives its space back
    CheckpointReader(tmp_path / "step-00000001").verify()
    save(saver, 4)
    saver.settle()
    assert steps(tmp_path) == [1, 4]
    assert (saver.failed, saver.failed_in_a_row) == (2, 0)


def test_too_many_failed_saves_end_the_run_if_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "save_file", lambda *_: (_ for _ in ()).throw(FULL))
    saver, _ = make_saver(tmp_path, max_failed_saves=2)
    save(saver, 1)
    save(saver, 2)
    with pytest.raises(OSError, match="step 2 not saved"):
        save(saver, 3)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_an_error_that_is_not_of_the_disk_ends_the_run(asynchronous: bool, tmp_path: Path) -> None:
    saver, _ = make_saver(tmp_path, asynchronous=asynchronous)
    with pytest.raises(ValueError, match="cover 2 of 3 elements"):  # noqa: PT012
        save(saver, 1, [Fragment("w", "weight", (3,), 0, torch.ones(2))])
        saver.settle()


def test_a_disk_that_is_too_small_is_noticed_before_it_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(fragment.values.nbytes for fragment in fragments())
    saver, lines = make_saver(tmp_path, asynchronous=False)
    with monkeypatch.context() as small:
        small.setattr(writer, "_write_rank", lambda *_: pytest.fail("written"))
        small.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": needed - 1}))
        save(saver, 1)
    assert f"{needed} bytes are needed, {needed - 1} are free" in lines[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": needed}))
    save(saver, 2)
    assert steps(tmp_path) == [2]


def test_what_a_killed_save_left_is_deleted_by_the_next_one(tmp_path: Path) -> None:
    saver, _ = make_saver(tmp_path)
    save(saver, 1)
    saver.settle()
    (tmp_path / "step-00000007.tmp").mkdir()
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000001.old")
    (tmp_path / "step-00000001").rename(tmp_path / "step-00000005.old")  # killed between the renames
    shutil.copytree(tmp_path / "step-00000001.old", tmp_path / "step-00000001")
    save(saver, 9)
    saver.settle()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["step-00000001", "step-00000005", "step-00000009"]
