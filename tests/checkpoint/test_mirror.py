"""Copies of checkpoints elsewhere: complete or absent, as many as are kept, and enough to resume from."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.format import CheckpointError
from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.store import CheckpointReader, list_checkpoints, newest_intact
from pretrain.cli import main
from pretrain.config import Config, ConfigError
from pretrain.launch import train
from pretrain.run.folder import RunError
from tests.checkpoint.test_store import save
from tests.data.s3_server import s3_server
from tests.distributed.scenarios import metrics

MakeConfig = Callable[..., Config]
SHORT = {
    "train.total_tokens": 6 * 768,
    "schedule.warmup_tokens": 0,
    "data.validation_fraction": 0.0,
    "checkpoint.save_every_steps": 2,
}


@pytest.fixture
def mirror(tmp_path: Path) -> Mirror:
    return Mirror(f"file://{tmp_path / 'copies' / 'tiny'}", warn=pytest.fail)


def push(mirror: Mirror, root: Path) -> None:
    mirror.push(root)
    mirror.settle()


def test_copies_follow_the_checkpoints(tmp_path: Path, mirror: Mirror) -> None:
    root = tmp_path / "run"
    assert mirror.steps() == []
    assert mirror.fetch_newest(root) is None
    save(root, 5)
    save(root, 10)
    push(mirror, root)
    assert mirror.steps() == ["step-00000005", "step-00000010"]
    shutil.rmtree(root / "step-00000005")
    save(root, 15)
    push(mirror, root)
    assert mirror.steps() == ["step-00000010", "step-00000015"]
    fetched = mirror.fetch_newest(tmp_path / "elsewhere")
    assert fetched == tmp_path / "elsewhere" / "step-00000015"
    CheckpointReader(fetched).verify()
    assert [path.name for path in fetched.parent.iterdir()] == ["step-00000015"]


def test_a_run_that_has_gone_back_takes_its_copies_back(tmp_path: Path, mirror: Mirror) -> None:
    root = tmp_path / "run"
    for step in (5, 10):
        save(root, step)
    push(mirror, root)
    before = mirror._system.cat_file(f"{mirror._root}/step-00000005/index.json")
    shutil.rmtree(root)
    save(root, 5)
    (root / "step-00000005" / "index.json").write_bytes(before + b" ")  # another checkpoint of the same step
    push(mirror, root)
    assert mirror.steps() == ["step-00000005"]
    assert mirror._system.cat_file(f"{mirror._root}/step-00000005/index.json") == before + b" "


def test_copies_outlive_the_loss_of_the_folder(tmp_path: Path) -> None:
    mirror, root = Mirror(f"file://{tmp_path / 'copies'}", keep_last=2, warn=pytest.fail), tmp_path / "run"
    for step in (5, 10):
        save(root, step)
    push(mirror, root)
    shutil.rmtree(root)
    mirror.fetch_newest(root)
    push(mirror, root)
    assert mirror.steps() == ["step-00000005", "step-00000010"]
    save(root, 15)
    push(mirror, root)
    assert mirror.steps() == ["step-00000010", "step-00000015"]


def test_what_an_interrupted_upload_left_is_not_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    mirror, root = Mirror(f"file://{tmp_path / 'copies'}", warn=warnings.append), tmp_path / "run"
    save(root, 5)
    put = type(mirror._system).put_file

    def fails(self: Any, source: str, target: str, **options: Any) -> None:
        if source.endswith("state-00000.safetensors"):
            raise ConnectionError("lost https://host/x?signature=abc")
        put(self, source, target, **options)

    with monkeypatch.context() as broken:
        broken.setattr(type(mirror._system), "put_file", fails)
        push(mirror, root)
    assert mirror.steps() == []
    assert len(warnings) == 1
    assert "checkpoint not copied: ConnectionError: lost https://host/x" in warnings[0]
    assert "signature" not in warnings[0]
    push(mirror, root)
    assert mirror.steps() == ["step-00000005"]


def test_a_damaged_copy_is_passed_over_and_none_at_all_is_an_error(tmp_path: Path, mirror: Mirror) -> None:
    root = tmp_path / "run"
    for step in (5, 10):
        save(root, step)
    push(mirror, root)
    copies = tmp_path / "copies" / "tiny"
    (copies / "step-00000010" / "state-00000.safetensors").write_bytes(b"x")
    assert mirror.fetch_newest(tmp_path / "a") == tmp_path / "a" / "step-00000005"
    (copies / "step-00000005" / "rng-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no intact checkpoint to resume from"):
        mirror.fetch_newest(tmp_path / "b")
    assert list_checkpoints(tmp_path / "b") == []


def test_a_run_resumes_from_its_copies_when_its_folder_is_lost(tmp_path: Path, tiny_config: MakeConfig) -> None:
    config = tiny_config({**SHORT, "checkpoint.mirror": f"file://{tmp_path}/copies"})
    assert train(config, stop_at=4) == 75
    shutil.rmtree(config.run_folder)
    with pytest.raises(RunError, match="holds copies of a run of this name"):
        train(config, "never")
    assert train(config) == 0
    assert metrics(config.run_folder.parent, "step") == [[5], [6]]
    reader, _ = newest_intact(config.run_folder / "checkpoints")
    assert reader is not None
    assert reader.index["step"] == 6


@pytest.mark.parametrize(
    "url", ["folder", "/folder", "s3://key:secret@bucket/x", "s3://bucket/x?token=secret", "http://host/x", "s3://", ""]
)
def test_other_urls_are_refused_without_showing_them(url: str, tiny_config: MakeConfig) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.mirror") as raised:
        tiny_config({"checkpoint.mirror": url})
    assert "secret" not in str(raised.value)


def test_training_does_not_wait_for_an_upload(tmp_path: Path, mirror: Mirror, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go = threading.Event(), threading.Event()
    copy = Mirror._copy

    def waits(self: Mirror, folder: Path) -> None:
        begun.set()
        assert go.wait(60)
        copy(self, folder)

    monkeypatch.setattr(Mirror, "_copy", waits)
    save(tmp_path / "run", 5)
    mirror.push(tmp_path / "run")
    assert begun.wait(60)
    save(tmp_path / "run", 10)
    mirror.push(tmp_path / "run")
    go.set()
    mirror.settle()
    assert mirror.steps() == ["step-00000005", "step-00000010"]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a server on loopback."""
    with s3_server(monkeypatch):
        yield "s3://data/runs"


@pytest.mark.long
def test_copies_in_a_bucket(tmp_path: Path, bucket: str) -> None:
    mirror, root = Mirror(f"{bucket}/tiny", warn=pytest.fail), tmp_path / "run"
    for step in (5, 10):
        save(root, step)
    push(mirror, root)
    shutil.rmtree(root / "step-00000005")
    save(root, 15)
    push(mirror, root)
    assert mirror.steps() == ["step-00000010", "step-00000015"]
    assert mirror.fetch_newest(tmp_path / "b") == tmp_path / "b" / "step-00000015"


def test_a_store_without_its_library_is_named(
    tmp_path: Path, tiny_config: MakeConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    file = tmp_path / "config.yaml"
    file.write_text(tiny_config({**SHORT, "checkpoint.mirror": "s3://bucket/runs"}).to_yaml())
    assert main(["train", str(file)]) == 2
    assert "error: checkpoint.mirror: s3://bucket/runs/tiny: ImportError" in capsys.readouterr().err
