"""What is written in the place of something else is complete or absent, whatever happens on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain import files
from pretrain.files import publish_folder, replace_text, replacing
from pretrain.run.folder import RunFolder


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


def contents(root: Path) -> dict[str, str]:
    return {path.name: (path / "file").read_text() for path in root.iterdir()}


def test_what_a_folder_replaces_is_there_until_the_new_one_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rename and deletion is followed by a look: the old or the new folder is on the disk, whole."""
    partial, final = folder(tmp_path / "a.tmp", "new"), folder(tmp_path / "a", "old")
    seen = []
    remove, rename = files.shutil.rmtree, Path.rename

    def removes(path: Path, **options: bool) -> None:
        there = path.exists()
        remove(path, **options)
        if there:
            seen.append(("deleted", contents(tmp_path)))

    def renames(self: Path, target: Path) -> Path:
        done = rename(self, target)
        seen.append(("renamed", contents(tmp_path)))
        return done

    monkeypatch.setattr(files.shutil, "rmtree", removes)
    monkeypatch.setattr(Path, "rename", renames)
    publish_folder(partial, final)
    assert seen == [
        ("renamed", {"a.tmp": "new", "a.old": "old"}),
        ("renamed", {"a": "new", "a.old": "old"}),
        ("deleted", {"a": "new"}),
    ]


def test_a_folder_that_cannot_be_renamed_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial, final = folder(tmp_path / "a.tmp", "new"), folder(tmp_path / "a", "old")
    rename = Path.rename

    def fails(self: Path, target: Path) -> Path:
        if self == partial:
            raise OSError(28, "No space left on device")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="No space left"):
        publish_folder(partial, final)
    assert contents(tmp_path) == {"a": "old", "a.tmp": "new"}


def test_a_file_is_synced_before_it_takes_the_place_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    synced = []
    monkeypatch.setattr(files, "sync", lambda partial: synced.append((partial.read_text(), path.read_text())))
    replace_text(path, "new")
    assert synced == [("new", "old")]
    assert path.read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_file_stays_as_it_was_if_its_successor_is_not_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def breaks() -> None:
        with replacing(path) as partial:
            partial.write_text("ne")
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        breaks()
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_what_a_killed_launch_was_writing_is_deleted_by_the_next_one(tmp_path: Path) -> None:
    left = [tmp_path / "manifest.json.0a1b2c3d.tmp", tmp_path / "telemetry" / "step-00000004.safetensors.00000000.tmp"]
    names = ("notes.tmp", "manifest.json", "eval/results.json.0a1b2c3d.tmp", ".lock.claim.0a1b2c3d.tmp")
    kept = [tmp_path / name for name in names]
    for path in (*left, *kept):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    run = RunFolder(tmp_path)
    run.lock()
    run.unlock()
    assert [path.exists() for path in (*left, *kept)] == [False] * 2 + [True] * 4
