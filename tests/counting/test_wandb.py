"""What reaches Weights & Biases: an offline run's records, read back from its file."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.run.wandb import NoTracker, SavedSteps
from pretrain.training.guards import Guards
from pretrain.training.state import TrainState
from tests.counting.ranks import counted
from tests.counting.where import configured, metrics, run_ranks, train

SHORT = {"train.total_tokens": 4 * 768, "schedule.warmup_tokens": 0, "validation.max_tokens": 6 * 32}
BLOCK, FULL, LAST = 32768, 1, 4
NUMBERS = ("loss", "lr", "grad_norm", "tokens", "tokens_per_second", "train_seconds")


def offline_runs(folder: Path) -> list[Path]:
    return sorted(folder.glob("wandb/offline-run-*/*.wandb"))


def chunks(content: bytes) -> Iterator[bytes]:
    """The records of wandb's file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    assert content[:4] == b":W&B", "not an offline run of wandb"
    at, parts = 7, []
    while at + 7 <= len(content):
        if BLOCK - at % BLOCK < 7:  # too little room for a header: padding
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        parts.append(content[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []


def records(file: Path) -> list[Any]:
    """Every record of an offline run."""
    from wandb.proto.wandb_internal_pb2 import Record

    return [Record.FromString(chunk) for chunk in chunks(file.read_bytes())]


def history(file: Path) -> list[dict[str, Any]]:
    """The logged steps of an offline run."""
    lines = [record.history for record in records(file) if record.WhichOneof("record_type") == "history"]
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in line.item} for line in lines
    ]


def test_every_step_is_logged_with_its_numbers_against_our_step(tmp_path: Path) -> None:
    """A stop and a resume continue the same run and the same axis."""
    config = configured(str(tmp_path), SHORT | {"wandb.mode": "offline", "wandb.project": "counted"})
    assert train(config, "auto", 2) == 75
    assert train(config, "auto") == 0
    first, second = offline_runs(config.run_folder)
    lines = history(first) + history(second)
    written = metrics(config)
    assert [line["step"] for line in lines] == [line["step"] for line in written] == [1, 2, 3, 4]
    for line, record in zip(lines, written, strict=True):
        for key in NUMBERS:
            assert line[key] == pytest.approx(record[key]), key
    assert lines[-1]["validation_loss"] == pytest.approx(written[-1]["validation_loss"])
    runs = [record.run for file in (first, second) for record in records(file) if record.HasField("run")]
    assert {(run.project, run.display_name) for run in runs} == {("counted", "tiny")}
    assert len({run.run_id for run in runs}) == 1
    axes = [record.metric for file in (first, second) for record in records(file) if record.HasField("metric")]
    assert {metric.step_metric for metric in axes if metric.glob_name == "*" or metric.name == "*"} == {"step"}


def test_a_disabled_tracker_neither_writes_nor_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import fails
    config = configured(str(tmp_path), SHORT)
    assert train(config, "auto", 1) == 75
    assert not (config.run_folder / "wandb").exists()


def test_only_rank_0_logs(tmp_path: Path) -> None:
    changes = SHORT | {"wandb.mode": "offline"}
    run_ranks(2, counted, str(tmp_path), changes, 2)
    [file] = offline_runs(configured(str(tmp_path), changes).run_folder)
    assert [line["step"] for line in history(file)] == [1, 2]


def test_steps_that_are_rolled_back_are_never_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch that dies leaves the steps after its last checkpoint to the next one; each step is sent once."""
    changes = SHORT | {"wandb.mode": "offline", "checkpoint.save_every_steps": 2}
    config = configured(str(tmp_path), changes)

    def die(self: Guards, state: TrainState) -> None:
        if state.step == 3:
            raise RuntimeError("killed")

    with monkeypatch.context() as patched:
        patched.setattr(Guards, "check", die)
        with pytest.raises(RuntimeError, match="killed"):
            train(config)
    assert [line["step"] for line in metrics(config)] == [1, 2, 3]
    [first] = offline_runs(config.run_folder)
    assert [line["step"] for line in history(first)] == [1, 2]
    # What a process that is killed has not sent yet is sent by the next one.
    (config.run_folder / "wandb" / "aurora-sent.json").write_text('{"step": 1}')
    assert train(config) == 0
    second = next(file for file in offline_runs(config.run_folder) if file != first)
    assert [line["step"] for line in history(second)] == [2, 3, 4]


def test_a_roll_back_within_a_launch_drops_what_was_held(tmp_path: Path) -> None:
    sent: list[tuple[int, float]] = []

    class Recorder(NoTracker):
        def log(self, record: dict[str, Any]) -> None:
            sent.append((record["step"], record["loss"]))

    note, saved = tmp_path / "note.json", 0
    tracker = SavedSteps(Recorder(), note, lambda: saved, 0, list)
    for step, loss in [(1, 1.0), (2, 2.0), (3, 9.0), (4, 9.0), (3, 3.0), (4, 4.0), (5, 5.0)]:
        tracker.log({"step": step, "loss": loss})
    assert sent == []
    saved = 4
    tracker.close()
    assert sent == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    # A launch from an older checkpoint does not repeat them.
    tracker = SavedSteps(Recorder(), note, lambda: saved, 2, list)
    for step in (3, 4, 5):
        tracker.log({"step": step, "loss": float(step)})
    saved = 5
    tracker.close()
    assert sent[4:] == [(5, 5.0)]


def test_training_does_not_depend_on_wandb_and_the_next_launch_sends_what_is_missing(tmp_path: Path) -> None:
    """As when wandb's own process has died: every call raises from then on."""
    sent, warnings = list[int](), list[str]()

    class Breaks(NoTracker):
        def log(self, record: dict[str, Any]) -> None:
            if record["step"] >= 3:
                raise BrokenPipeError("lost https://user:secret@host/x")
            sent.append(record["step"])

        def close(self) -> None:
            raise BrokenPipeError("gone")

    note, records = tmp_path / "note.json", [{"step": step, "loss": 1.0} for step in range(1, 6)]
    tracker = SavedSteps(Breaks(), note, lambda: 4, 0, list, warn=warnings.append)
    for record in records:
        tracker._looked = -1e9 if record["step"] == 4 else 1e9  # when to look
        tracker.log(record)
    tracker.close()
    assert sent == [1, 2]
    assert len(warnings) == 1
    assert "BrokenPipeError" in warnings[0]
    assert "secret" not in warnings[0]

    class Works(NoTracker):
        def log(self, record: dict[str, Any]) -> None:
            sent.append(record["step"])

    SavedSteps(Works(), note, lambda: 4, 4, lambda: records, warn=warnings.append).close()
    assert sent == [1, 2, 3, 4]
    assert len(warnings) == 1


def test_a_full_disk_does_not_keep_steps_from_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent, warnings = list[int](), list[str]()

    class Works(NoTracker):
        def log(self, record: dict[str, Any]) -> None:
            sent.append(record["step"])

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device", str(path))

    note = tmp_path / "note.json"
    tracker = SavedSteps(Works(), note, lambda: 3, 0, list, warn=warnings.append)
    with monkeypatch.context() as patched:
        patched.setattr("pretrain.run.wandb.replace_text", full)
        for step in (1, 2, 3):
            tracker.log({"step": step})
            tracker._looked = -1e9  # time to look
    tracker.close()
    assert sent == [1, 2, 3]
    assert warnings == []
    assert json.loads(note.read_text()) == {"step": 3}
