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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "config.yaml", "--stop-att", "3"], "unrecognized arguments: --stop-att 3"),
        (["eval", "--limit", "0", "runs/tiny"], "argument --limit: expected a whole number of at least 1"),
        (["eval"], "the following arguments are required: MODEL"),
        (["sweep", "run", "config.yaml", "--jobs", "many"], "argument --jobs: "),
    ],
)
def test_a_command_that_cannot_be_parsed_ends_the_job_with_one_line(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    """Without a traceback, as bad input, and before a node is checked."""
    with pytest.raises(SystemExit) as ended:
        slurm_job.main(["--", "srun", "-m", "pretrain", *words])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]
    assert "Traceback" not in error
    assert not cluster.requeued


def test_work_that_is_not_for_jobs_is_refused(cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert slurm_job.main(["--", "srun", "-m", "pretrain", "status", "runs"]) == 2
    assert capsys.readouterr().err == "error: expected train, sweep run or eval as the work of a job, got status\n"
