"""What may lie in the way in a run folder is refused before training, in one line, and nothing starts anew unasked."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.config import Config
from pretrain.launch import train
from pretrain.run.folder import RunError, RunFolder
from pretrain.run.lock import RunLock
from tests.distributed.scenarios import metrics

MakeConfig = Callable[..., Config]
SHORT = {
    "train.total_tokens": 8 * 768,
    "schedule.warmup_tokens": 0,
    "data.validation_fraction": 0.0,
    "checkpoint.save_every_steps": 2,
}


def put_folder(path: Path) -> None:
    (path / "below").mkdir(parents=True)


def put_file(path: Path) -> None:
    path.write_text("in the way")


def put_link(path: Path) -> None:
    path.symlink_to("/not mounted")


@pytest.mark.parametrize(
    ("name", "put", "message"),
    [
        ("checkpoints", put_file, "expected a folder; is the disk of the checkpoints not mounted?"),
        ("checkpoints", put_link, "expected a folder; is the disk of the checkpoints not mounted?"),
        ("metrics.jsonl", put_folder, "cannot be written: Is a directory"),
        ("config.yaml", put_folder, "cannot be written: Is a directory"),
        ("tokenizer.json", put_folder, "cannot be written: Is a directory"),
    ],
)
def test_what_is_in_the_way_is_named_before_training(
    tiny_config: MakeConfig, name: str, put: Callable[[Path], None], message: str
) -> None:
    """Otherwise a run trains for hours that cannot be saved."""
    config = tiny_config(SHORT)
    config.run_folder.mkdir(parents=True)
    put(config.run_folder / name)
    with pytest.raises(RunError) as raised:
        train(config)
    assert str(raised.value) == f"{config.run_folder / name}: {message}"


@pytest.mark.parametrize("content", ["", "null", "3", '{"a": 1}', "[1]", '["a", null]', "[" * 100_000])
def test_a_damaged_list_of_repaired_files_is_named_with_its_cure(tmp_path: Path, content: str) -> None:
    folder = RunFolder(tmp_path)
    assert folder.repairable == set()
    (tmp_path / "repairable.json").write_text(content)
    with pytest.raises(RunError, match=r"repairable\.json: .*; delete it if no data was repaired"):
        _ = folder.repairable
    (tmp_path / "repairable.json").unlink()
    folder.allow_repair("a.jsonl")
    assert folder.repairable == {"a.jsonl"}


def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(tiny_config: MakeConfig) -> None:
    """The disk on which they are may not be mounted."""
    config = tiny_config(SHORT)
    root = config.run_folder / "checkpoints"
    assert train(config, stop_at=2) == 75
    root.rename(aside := root.with_name("aside"))
    root.mkdir()
    with pytest.raises(RunError, match=r"holds no checkpoint, but the run has saved one, at step 2; restore it or"):
        train(config)
    assert metrics(config.run_folder.parent, "step") == [[1], [2]]
    root.rmdir()
    aside.rename(root)
    assert train(config, stop_at=3) == 75
    assert metrics(config.run_folder.parent, "step") == [[1], [2], [3]]


def test_a_run_that_died_before_its_first_checkpoint_starts_anew(
    tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(SHORT)

    def dies(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pretrain.checkpoint.saver.save_checkpoint", dies)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    shutil.rmtree(config.run_folder / "checkpoints", ignore_errors=True)
    assert train(config, stop_at=2) == 75


@pytest.mark.parametrize(("number", "raised"), [(errno.ENOSPC, OSError), (errno.EIO, OSError), (errno.EROFS, RunError)])
def test_only_what_stays_in_the_way_is_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, raised: type[Exception]
) -> None:
    """A batch job gives up after bad input, and tries again after a disk that is full for now."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    folder = RunFolder(tmp_path / "run")
    (folder.path / "checkpoints").mkdir(parents=True)
    monkeypatch.setattr(RunLock, "acquire", fail)
    monkeypatch.setattr(Path, "touch", fail)
    for work in (folder.lock, folder.check_checkpoints):
        with pytest.raises(raised, match=os.strerror(number)) as caught:
            work()
        assert isinstance(caught.value, RunError) == (raised is RunError)
