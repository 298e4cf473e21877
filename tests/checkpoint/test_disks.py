"""A run outlives a full disk, a disk that goes away, and a disk that can only be read."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import save_file

from pretrain.checkpoint import writer
from pretrain.checkpoint.store import CheckpointReader, list_checkpoints, newest_intact
from pretrain.cli import main
from pretrain.config import Config
from pretrain.launch import train
from pretrain.run.folder import RunError, RunFolder
from pretrain.run.json_lines import JsonLines
from pretrain.training.trainer import Trainer
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import metrics, run

MakeConfig = Callable[..., Config]
SHORT = {
    "train.total_tokens": 8 * 768,
    "schedule.warmup_tokens": 0,
    "data.validation_fraction": 0.0,
    "checkpoint.save_every_steps": 2,
}


def saved(root: Path) -> list[int]:
    return [CheckpointReader(folder).index["step"] for folder in list_checkpoints(root)]


def await_saves() -> None:
    """Wait until no checkpoint is being written."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join(60)


def at_step(number: int, work: Callable[[], object]) -> Any:
    """Do something in the middle of a training, before the step after `number`."""
    rates = Trainer.set_learning_rates

    def patched(self: Trainer) -> dict[str, float]:
        if self.state.step == number:
            work()
        return rates(self)

    return mock.patch.object(Trainer, "set_learning_rates", patched)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, tiny_config: MakeConfig) -> None:
    """A save of step 2 is written only when step 4 is reached, which a save that blocks would never see."""
    reached, write, seen = threading.Event(), writer._write_rank, []

    def waits(folder: Path, *arguments: Any) -> Any:
        if "step-00000002" in folder.name:
            seen.append(reached.wait(60))
        return write(folder, *arguments)

    with mock.patch.object(writer, "_write_rank", waits), at_step(3, reached.set):
        assert train(tiny_config(SHORT), stop_at=4) == 75
    assert seen == [True]
    assert saved(tiny_config().run_folder / "checkpoints") == [2, 4]


def fails_on_one_rank(root: str, changes: dict[str, Any], step: int, rank: int) -> int:
    """Train on ranks of which one cannot write the checkpoint of a step."""
    write = writer._write_rank

    def breaks(folder: Path, *arguments: Any) -> Any:
        if int(os.environ["RANK"]) == rank and folder.name == f"step-{step:08d}.tmp":
            raise OSError(errno.EIO, "Input/output error")
        return write(folder, *arguments)

    with mock.patch.object(writer, "_write_rank", breaks):
        return run(root, changes)


def test_all_ranks_outlive_an_error_of_the_disk_on_one(tmp_path: Path) -> None:
    changes = {**SHORT, "checkpoint.keep_last": 9}
    assert run_ranks(2, fails_on_one_rank, str(tmp_path), changes, 4, 1) == [0, 0]
    root = tmp_path / "tiny" / "checkpoints"
    assert saved(root) == [2, 6, 8]
    assert sorted(path.name for path in root.iterdir()) == [f"step-{step:08d}" for step in (2, 6, 8)]
    reader = CheckpointReader(root / "step-00000008")
    reader.verify()
    # Both ranks wrote their share.
    assert {"state-00000.safetensors", "state-00001.safetensors"} <= reader.index["files"].keys()
    sizes = [(reader.folder / f"state-0000{rank}.safetensors").stat().st_size for rank in range(2)]
    assert max(sizes) / min(sizes) < 1.2


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of a few megabytes."""
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mounted, capture_output=True, check=False).returncode != 0:
        pytest.skip("needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_up_and_is_emptied_again(
    tmp_path: Path, tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saves and metrics fail from step 3 to step 6; the run ends with all of its lines."""
    with small_disk(tmp_path / "disk", 24) as disk:
        ballast = disk / "ballast"

        def fill() -> None:
            await_saves()
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 12))

        config = tiny_config({**SHORT, "run.root": str(disk / "runs")})
        with at_step(3, fill), at_step(6, ballast.unlink):
            assert train(config) == 0
        out = capsys.readouterr().out
        assert "warning: checkpoint of step 4 not saved: [Errno 28] No space left on device" in out
        assert "the newest checkpoint is step-00000002" in out
        assert metrics(disk / "runs", "step") == [[step] for step in range(1, 9)]
        assert saved(config.run_folder / "checkpoints")[-1] == 8
        reader, damaged = newest_intact(config.run_folder / "checkpoints")
        assert reader is not None
        assert damaged == []


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), RunError("cannot be read")])
def test_a_complete_run_ends_well_although_its_manifest_cannot_be_written(
    tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str], failure: Exception
) -> None:
    """Nor does the next launch fail, which only looks; the first one that can write it completes the record."""
    config = tiny_config({**SHORT, "train.total_tokens": 2 * 768})
    with mock.patch.object(RunFolder, "mark_finished", mock.Mock(side_effect=failure)):
        for _ in range(2):
            assert train(config) == 0
            warning = f"the run is complete and saved, but this could not be written to the manifest: {failure}"
            assert capsys.readouterr().out.count(warning) == 1
    assert saved(config.run_folder / "checkpoints") == [2]
    assert not RunFolder(config.run_folder).finished
    assert train(config) == 0
    assert RunFolder(config.run_folder).finished
    assert "could not be written" not in capsys.readouterr().out


def test_a_run_whose_last_state_is_not_saved_does_not_end_well(
    tmp_path: Path, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, write = tiny_config(SHORT), writer._write_rank

    def full(folder: Path, *arguments: Any) -> Any:
        if folder.name >= "step-00000005":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(folder, *arguments)

    monkeypatch.setattr(writer, "_write_rank", full)
    with pytest.raises(OSError, match="checkpoint of step 5 not saved"):
        train(config, stop_at=5)
    assert saved(config.run_folder / "checkpoints") == [2, 4]
    monkeypatch.undo()
    assert train(config) == 0
    assert metrics(config.run_folder.parent, "step") == [[step] for step in range(1, 9)]


def test_a_disk_that_goes_away_is_not_replaced_by_the_folder_below_it(
    tmp_path: Path, tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """As after `umount -l`: the root of the runs is an empty folder of another disk, and comes back later."""
    config = tiny_config({**SHORT, "telemetry.every_steps": 1})
    folder, aside = config.run_folder, tmp_path / "aside"
    root = folder.parent

    def unmount() -> None:
        await_saves()
        root.rename(aside)
        root.mkdir()

    def mount() -> None:
        await_saves()
        root.rmdir()  # it is empty: nothing was written to the disk below
        aside.rename(root)

    with at_step(3, unmount), at_step(5, mount):
        assert train(config) == 0
    out = capsys.readouterr().out
    assert f"checkpoint of step 4 not saved: {folder} is not there any more; was its disk unmounted?" in out
    assert out.count("its lines wait in memory until it can be written") == 1
    assert "warning: the measurements of step 4 were not kept" in out
    assert saved(folder / "checkpoints") == [6, 8]
    assert metrics(root, "step") == [[step] for step in range(1, 9)]


def test_a_checkpoint_that_cannot_be_deleted_is_no_failed_save(
    tmp_path: Path, tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on NFS while somebody, such as an evaluation, reads one of its files."""
    remove = shutil.rmtree

    def busy(path: str | Path, **options: Any) -> None:
        if Path(path).name == "step-00000002.tmp" and not options:
            raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))
        remove(path, **options)

    monkeypatch.setattr("pretrain.checkpoint.store.shutil.rmtree", busy)
    copies = {"checkpoint.mirror": f"file://{tmp_path}/copies"}
    changes = {"checkpoint.keep_last": 1, "checkpoint.max_failed_saves": 1, "train.total_tokens": 6 * 768}
    config = tiny_config({**SHORT, **changes, **copies})
    assert train(config) == 0
    assert capsys.readouterr().out.count("is saved, but the work after the save failed: [Errno 39]") == 1
    assert [path.name for path in (config.run_folder / "checkpoints").iterdir()] == ["step-00000006"]
    assert [path.name for path in (tmp_path / "copies/tiny").iterdir()] == ["step-00000006"]


def test_a_manifest_that_is_damaged_during_a_run_does_not_end_it(
    tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only where the run stands in its data is recorded there; the next launch says what to do."""
    config = tiny_config({**SHORT, "checkpoint.asynchronous": False})
    manifest = config.run_folder / "manifest.json"

    def damage() -> None:
        manifest.write_text("{ damaged")

    with at_step(3, damage):
        assert train(config, stop_at=6) == 75
    out = capsys.readouterr().out
    assert f"step-00000004 is saved, but the work after the save failed: {manifest}: cannot be read" in out
    assert saved(config.run_folder / "checkpoints") == [4, 6]
    with pytest.raises(RunError, match=r"manifest\.json: cannot be read"):
        train(config)


def test_measurements_that_a_full_disk_does_not_take_end_no_run(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor do files of earlier ones that cannot be read."""

    def full(tensors: Any, path: Path) -> None:
        if "step-00000002" in path.name:
            path.write_bytes(b"part")
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr("pretrain.neurons.telemetry.save_file", full)
    config = tiny_config({**SHORT, "telemetry.every_steps": 1, "telemetry.reference_step": 1})
    assert train(config, stop_at=4) == 75
    assert capsys.readouterr().out.count("warning: the measurements of step") == 1
    found = sorted(path.name for path in (config.run_folder / "telemetry").iterdir())
    assert found == [f"step-{step:08d}.safetensors" for step in (1, 3, 4)]
    (config.run_folder / "telemetry" / found[0]).write_bytes(b"damaged")
    assert train(config, stop_at=6) == 75
    assert "warning: the measurements of step 5 were not kept" in capsys.readouterr().out
    assert metrics(config.run_folder.parent, "step") == [[step] for step in range(1, 7)]


def test_a_folder_that_can_only_be_read_is_refused_before_training(tmp_path: Path, tiny_config: MakeConfig) -> None:
    with small_disk(tmp_path / "disk", 24) as disk:
        config = tiny_config({**SHORT, "run.root": str(disk)})
        assert train(config, stop_at=2) == 75
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(RunError, match="cannot be written"):
            train(config)
        reader, damaged = newest_intact(config.run_folder / "checkpoints")  # reading needs no more
        assert reader is not None
        assert damaged == []


def test_old_checkpoints_are_pruned_from_a_disk_that_is_full(
    tmp_path: Path, tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path / "disk", 24) as disk:
        config = tiny_config({**SHORT, "run.root": str(disk)})
        assert train(config, stop_at=4) == 75
        with contextlib.suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))
        assert main(["checkpoint", "prune", str(config.run_folder), "--keep-last", "1"]) == 0, capsys.readouterr().err
        assert saved(config.run_folder / "checkpoints") == [4]


def test_a_checkpoint_is_not_complete_before_the_lines_up_to_its_step(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, flush = tiny_config(SHORT), JsonLines.flush
    full: list[bool] = []

    def fails(self: JsonLines) -> None:
        if full and self.path.name == "metrics.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(self)

    def fill() -> None:
        await_saves()
        full.append(True)

    monkeypatch.setattr(JsonLines, "flush", fails)
    with at_step(3, fill), pytest.raises(OSError, match="checkpoint of step 4 not saved"):
        train(config, stop_at=4)
    assert saved(config.run_folder / "checkpoints") == [2]


def test_lines_wait_until_the_file_can_be_written(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1) as disk:
        file = JsonLines(disk / "metrics.jsonl")
        file.append({"step": 1})
        ballast = disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as full:
            while True:
                full.write(bytes(1 << 12))
        for step in (2, 3):
            file.append({"step": step, "text": "x" * 5000})  # more than what is left of the file's last page
        assert file.problem is not None
        with pytest.raises(OSError, match="No space left"):
            file.flush()
        assert [json.loads(line)["step"] for line in file.path.read_text().splitlines()] == [1]
        ballast.unlink()
        file.append({"step": 4})
        assert file.problem is None
        assert [record["step"] for record in file.read()] == [1, 2, 3, 4]
