"""A run of two processes whose checkpoints are scored beside it, with the real items: everything as users start it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from eval.results import read_result
from pretrain.checkpoint.store import CheckpointReader, list_checkpoints
from pretrain.config import parse_config
from tests.conftest import SMALL_VOCABULARY, TINY, merged
from tests.counting.test_wandb import history, offline_runs

pytestmark = pytest.mark.long


def test_every_checkpoint_is_scored_and_logged_before_the_command_ends(tmp_path: Path) -> None:
    changes = SMALL_VOCABULARY | {
        "run.root": str(tmp_path / "runs"),
        "train.total_tokens": 6 * 768,
        "schedule.warmup_tokens": 0,
        "checkpoint.save_every_steps": 2,
        "checkpoint.keep_last": 9,
        "wandb.mode": "offline",
        "evaluation": {"every_steps": 2, "tasks": ["winogrande"], "limit": 6},
    }
    config = parse_config(merged(TINY, changes))
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    command = [sys.executable, "-m", "pretrain", "train", "config.yaml", "--processes", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    log = config.run_folder / "eval" / "follow.log"
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in done.stdout, done.stdout + log.read_text()
    checkpoints = list_checkpoints(config.run_folder / "checkpoints")
    assert len(checkpoints) == 3
    for checkpoint in checkpoints:
        result = read_result(config.run_folder / "eval" / checkpoint.name)
        index = CheckpointReader(checkpoint).index
        assert result["model"]["provenance"]["checkpoint_sha256"] == index["digest"]
        assert [item["doc_id"] for item in result["tasks"]["winogrande"]["items"]] == [0, 211, 422, 633, 844, 1055]
    lines = [line for file in offline_runs(config.run_folder) for line in history(file)]
    assert sorted(line["eval/step"] for line in lines if "eval/step" in line) == [2, 4, 6]
    assert sorted(line["step"] for line in lines if "loss" in line) == [1, 2, 3, 4, 5, 6]
