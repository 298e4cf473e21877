"""Runs that were begun with the code of commit fb900ae resume, to the bit.

``fb900ae/`` holds a run a engine, stopped after step 3 of 6 (format 1, no digest), and what the code of that commit
made of it: hashes of the final tensors, and metrics. Equal bits can be asked for on the same kind of processor only,
and with what `before` brings back.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pretrain.checkpoint.store import CheckpointReader, list_checkpoints
from pretrain.config import load_config, parse_config
from pretrain.launch import train
from tests.conftest import REPOSITORY
from tests.distributed.ranks import run_ranks
from tests.recorded import before
from tests.recorded.record import tensors

FOLDER = Path(__file__).parent / "fb900ae"
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())
RANKS = {"plain": 1, "zero1": 2, "zero3": 2}


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return ""


@pytest.fixture(params=RANKS)
def old_run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A copy of a run, in the folder that its relative paths are meant from."""
    name = request.param
    shutil.copytree(FOLDER / name / "run", tmp_path / "runs" / name)
    shutil.copy(FOLDER / name / "config.yaml", tmp_path / "config.yaml")
    (tmp_path / "assets").symlink_to(REPOSITORY / "assets")
    monkeypatch.chdir(tmp_path)
    return name, tmp_path / "runs" / name


def resume(folder: str, as_before: bool) -> int:
    import os

    os.chdir(folder)
    with before.apply() if as_before else contextlib.nullcontext():
        return train(load_config("config.yaml"))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("as_before", [True, False])
def test_a_run_of_fb900ae_resumes(old_run: tuple[str, Path], as_before: bool) -> None:
    name, run = old_run
    assert "digest" not in CheckpointReader(list_checkpoints(run / "checkpoints")[-1]).index
    assert set(run_ranks(RANKS[name], resume, str(run.parents[1]), as_before)) == {0}
    expected = EXPECTED["runs"][name]
    found = metrics(run)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    for line, wanted in zip(found, expected["metrics"], strict=True):
        if as_before or line["step"] <= 3:
            assert line["batch_sha256"] == wanted["batch_sha256"]
        for key in ("tokens", "lr", "adamw_lr"):
            assert line[key] == wanted[key]
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(wanted[key], rel=1e-3)
    newest = list_checkpoints(run / "checkpoints")[-1]
    assert CheckpointReader(newest).index["format"] == 2
    if processor() == EXPECTED["processor"] and as_before:
        assert tensors(newest) == expected["tensors"]


def test_what_is_loaded_is_what_was_saved(old_run: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """On any processor: a rate of zero from step 4 on leaves the weights as they are, bit for bit."""
    name, run = old_run
    before = CheckpointReader(list_checkpoints(run / "checkpoints")[-1])
    assert set(run_ranks(RANKS[name], resume_at_rate_zero, str(run.parents[1]))) == {75}
    after = CheckpointReader(list_checkpoints(run / "checkpoints")[-1])
    assert (before.index["step"], after.index["step"]) == (3, 4)
    for parameter in before.index["parameters"]:
        assert torch.equal(before.read(parameter, "weight"), after.read(parameter, "weight")), parameter
        assert after.read(parameter, "step").item() == before.read(parameter, "step").item() + 1


def resume_at_rate_zero(folder: str) -> int:
    import os
    from unittest import mock

    from pretrain.training.trainer import Trainer

    os.chdir(folder)
    with mock.patch.object(Trainer, "set_learning_rates", _no_rates):
        return train(load_config("config.yaml"), "auto", 4)


def _no_rates(self: Any) -> dict[str, float]:
    for group in self.optimizer.param_groups:
        group["lr"] = 0.0
    return {"lr": 0.0}


def test_the_stored_configs_are_still_valid() -> None:
    for name in RANKS:
        parse_config(yaml.safe_load((FOLDER / name / "run/config.yaml").read_text()))
