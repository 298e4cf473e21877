"""The manifest names the code that ran, and nothing else, and costs a save nothing."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import Config
from pretrain.launch import train
from pretrain.run import manifest
from pretrain.run.manifest import DISTRIBUTION, PACKAGES, commit_of, environment, git_commit

MakeConfig = Callable[..., Config]
MODULE = Path("pretrain/run/manifest.py")


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=nobody", "-c", "user.email=nobody@localhost")
    done = subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def copied(root: Path, project: bool = True) -> Path:
    """Our source at `root`, or as much of it as matters."""
    (root / MODULE).parent.mkdir(parents=True)
    shutil.copy(manifest.__file__, root / MODULE)
    if project:
        (root / "pyproject.toml").write_text(f'[project]\nname = "{DISTRIBUTION}"\n')
    return root / MODULE


def committed(folder: Path) -> str:
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "all")
    return git(folder, "rev-parse", "HEAD")


def test_the_commit_is_that_of_our_own_repository(tmp_path: Path) -> None:
    module = copied(tmp_path)
    assert commit_of(module) is None
    commit = committed(tmp_path)
    assert commit_of(module) == commit
    (tmp_path / "untracked").touch()
    assert commit_of(module) == commit
    module.write_text("changed")
    assert commit_of(module) == f"{commit}+changes"


@pytest.mark.parametrize("tracked", [False, True])
def test_the_commit_of_a_repository_around_an_installed_copy_is_not_ours(tracked: bool, tmp_path: Path) -> None:
    module = copied(tmp_path / "lib/site-packages", project=False)
    (tmp_path / "theirs").touch()
    if not tracked:
        (tmp_path / ".gitignore").write_text("lib/")
    committed(tmp_path)
    assert commit_of(module) is None
    (tmp_path / "lib/site-packages/pyproject.toml").write_text(f'name = "{DISTRIBUTION}"')
    assert commit_of(module) is None


def test_source_at_the_top_of_a_repository_of_another_project_is_not_ours(tmp_path: Path) -> None:
    module = copied(tmp_path, project=False)
    committed(tmp_path)
    assert commit_of(module) is None
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "theirs"\n')
    assert commit_of(module) is None


def test_variables_of_a_git_hook_do_not_point_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ours").mkdir()
    module = copied(tmp_path / "ours")
    commit = committed(tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    copied(tmp_path / "theirs")
    assert committed(tmp_path / "theirs")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "theirs/.git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "theirs"))
    assert commit_of(module) == commit


def test_git_is_asked_once_however_often_is_saved(tiny_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = subprocess.run

    def counted(command: list[str], **options: Any) -> Any:
        calls.append(command)
        return run(command, **options)

    monkeypatch.setattr(manifest.subprocess, "run", counted)
    git_commit.cache_clear()
    assert train(tiny_config({"checkpoint.save_every_steps": 1, "checkpoint.keep_last": 9}), stop_at=3) == 75
    config = tiny_config({})
    saved = sorted(config.run_folder.glob("checkpoints/step-*"))
    assert len(saved) == 3
    commits = {json.loads((path / "index.json").read_text())["provenance"]["git_commit"] for path in saved}
    assert commits == {git_commit()}
    assert len([command for command in calls if command[0] == "git"]) <= 4  # the last for what differs
    assert len({tuple(command) for command in calls}) == len(calls)


def test_every_package_that_decides_results_is_listed() -> None:
    assert {"torch", "accelerate", "deepspeed", "safetensors", "transformers", "tokenizers"} <= set(PACKAGES)
    versions = environment()["packages"]
    assert all(versions.values()), versions
    assert list(versions) == list(PACKAGES)


def test_a_package_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "PACKAGES", ("torch", "no-such-package"))
    assert environment()["packages"]["no-such-package"] is None
