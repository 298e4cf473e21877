"""What a job counts as getting further: newer checkpoints of a run, or more evaluated ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.cli import slurm_job
from tests.processes.launching import write_config
from tests.slurm.test_job import Cluster


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(tmp_path, monkeypatch)


def test_the_step_is_that_of_the_newest_complete_checkpoint(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    write_config(cluster.folder)
    saved = (
        "for n in 2 4; do mkdir -p $1/step-0000000$n; touch $1/step-0000000$n/index.json; done; mkdir $1/step-00000009"
    )
    work = ["srun", "bash", "-c", f"set -- runs/tiny/checkpoints; {saved}; exit 1", "x"]
    assert slurm_job.main(["--", *work, "-m", "pretrain", "train", "config.yaml", "--stop-at", "3", "run.seed=7"]) == 1
    assert "newest checkpoint: step 4" in capsys.readouterr().out
    assert cluster.requeued


def test_an_evaluation_of_checkpoints_gets_further_with_each_result(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    scored = "for n in 2 4; do mkdir -p $1/step-0000000$n; touch $1/step-0000000$n/results.json; done; exit 1"
    for out, options in (("runs/tiny/eval", []), ("scores", ["--out", "scores"])):
        work = ["srun", "bash", "-c", f"set -- {out}; {scored}", "x", "-m", "pretrain", "eval", "runs/tiny"]
        assert slurm_job.main(["--", *work, "--every-checkpoint", "--follow", *options]) == 1
        assert "newest checkpoint: step 0" in (out_text := capsys.readouterr().out)
        assert "newest checkpoint: step 2" in out_text  # the number of results
        assert cluster.requeued
