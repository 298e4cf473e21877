"""What people do to the checkpoints of a run: links to other disks, other names, stray files."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from pretrain.checkpoint.store import clear_unfinished, list_checkpoints, newest_intact, prune, recover_replaced
from pretrain.cli import main
from pretrain.files import set_aside
from tests.checkpoint.test_store import save


def move_away(folder: Path, disk: Path) -> Path:
    """Move a checkpoint to another disk, and leave a link to it; returns where it is."""
    disk.mkdir(exist_ok=True)
    target = disk / folder.name
    shutil.move(folder, target)
    folder.symlink_to(target)
    return target


def test_a_link_to_a_checkpoint_is_pruned_and_its_target_stays(tmp_path: Path) -> None:
    root, kept = tmp_path / "run", []
    for step in (5, 10, 15, 20):
        folder = save(root, step)
        if step < 15:
            kept.append(move_away(folder, tmp_path / "disk"))
    assert [path.name for path in prune(root, 1, None)] == ["step-00000005", "step-00000010", "step-00000015"]
    assert [path.name for path in root.iterdir()] == ["step-00000020"]
    assert all((folder / "index.json").exists() for folder in kept)


def test_a_link_is_replaced_by_a_newer_checkpoint_of_its_step_and_does_not_come_back(tmp_path: Path) -> None:
    root = tmp_path / "run"
    target = move_away(save(root, 5), tmp_path / "disk")
    assert save(root, 5).is_symlink() is False
    assert [path.name for path in root.iterdir()] == ["step-00000005"]
    assert (target / "index.json").exists()
    # What an interrupted deletion leaves of a link.
    (root / "step-00000003.tmp").symlink_to(target)
    (root / "step-00000004.tmp").touch()
    clear_unfinished(root)
    assert recover_replaced(root) == []
    assert [path.name for path in root.iterdir()] == ["step-00000005"]


def test_a_link_is_set_aside_in_the_place_of_an_earlier_one(tmp_path: Path) -> None:
    root = tmp_path / "run"
    for _ in range(2):
        target = move_away(save(root, 5), tmp_path / "disk")
        set_aside(root / "step-00000005")
        assert (root / "discarded/step-00000005/index.json").exists()
        shutil.rmtree(target)


def test_a_checkpoint_under_the_name_of_another_step_is_damaged(tmp_path: Path) -> None:
    """It would be resumed from, and then set aside because its name is that of a later step."""
    for step in (5, 10):
        save(tmp_path, step)
    (tmp_path / "step-00000010").rename(tmp_path / "step-00000020")
    reader, damaged = newest_intact(tmp_path)
    assert reader is not None
    assert reader.index["step"] == 5
    assert damaged == [f"{tmp_path}/step-00000020/index.json: damaged: it is the index of step 10"]


def test_an_index_that_the_file_system_has_lost_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (5, 10):
        save(tmp_path, step)
    look = Path.is_file

    def looks(self: Path) -> bool:
        if self.parent.name == "step-00000010":
            raise OSError(errno.ESTALE, "Stale file handle")
        return look(self)

    monkeypatch.setattr(Path, "is_file", looks)
    reader, damaged = newest_intact(tmp_path)
    assert reader is not None
    assert reader.index["step"] == 5
    assert "Stale file handle" in damaged[0]


def test_a_stray_file_with_the_name_of_a_checkpoint_is_listed_as_one_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "checkpoints"
    save(root, 5)
    (root / "step-00000010").touch()
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    assert "cannot be read: Not a directory" in capsys.readouterr().out.splitlines()[-1]
    reader, damaged = newest_intact(root)
    assert reader is not None
    assert reader.index["step"] == 5
    assert "not a checkpoint" in damaged[0]
    assert list_checkpoints(root) == [root / "step-00000005"]
