"""Training under Slurm, on a cluster of two nodes that are both this machine: the same bits as without it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.distributed.scenarios import metrics, newest, tensors
from tests.slurm.cluster import Cluster, Job, missing

pytestmark = [pytest.mark.long, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "slurm/pretrain.sbatch"
CONFIG = REPOSITORY / "configs/quickstart.yaml"
STEPS = 60
# The quickstart, cut down, under ZeRO-1, with shapes of which two ranks do not get whole matrices only.
# The run lies in <root>/tiny, where `tensors` and `metrics` look for it.
CHANGES = [
    "run.name=tiny",
    *("model.hidden_size=64", "model.intermediate_size=192", "model.num_layers=3", "model.context_length=64"),
    *("train.global_batch_tokens=1024", f"train.total_tokens={STEPS * 1024}", "train.micro_batch_sequences=4"),
    *("schedule.warmup_tokens=10_240", "train.precision=fp32"),
    *("data.validation_fraction=0", "validation={}", "telemetry={}", "samples={}", "checkpoint.save_every_steps=1000"),
    *("engine.kind=deepspeed", "engine.zero_stage=1"),
]
# Two nodes, one process each, and what keeps everything on loopback: both nodes go by names that nothing resolves.
OPTIONS = ["--gpus-per-node=0", "--time=10"]
ENVIRONMENT = {
    "AURORA_VENV": sys.prefix,
    "AURORA_RENDEZVOUS_HOST": "127.0.0.1",
    "PET_LOCAL_ADDR": "127.0.0.1",  # torchrun's --local-addr
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(REPOSITORY),
}
JOB_SECONDS = 400


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where jobs are submitted; the paths of the config are relative to it."""
    (tmp_path / "assets").symlink_to(REPOSITORY / "assets")
    return tmp_path


def submit(cluster: Cluster, folder: Path, *arguments: str, nodes: int = 2) -> Job:
    return cluster.run(
        *(*OPTIONS, f"--nodes={nodes}", str(SCRIPT), str(CONFIG), *arguments),
        directory=folder,
        environment=ENVIRONMENT,
        timeout_seconds=JOB_SECONDS,
    )


def assert_same_run(first: Path, second: Path) -> None:
    a, b = tensors(first), tensors(second)
    assert newest(first).index["step"] == newest(second).index["step"] == STEPS
    assert a.keys() == b.keys()
    assert {slot for _, slot in a} > {"weight"}  # and the optimizer's states
    assert [key for key in a if not torch.equal(a[key], b[key])] == []
    keys = ("step", "loss", "grad_norm", "lr", "batch_sha256")
    assert metrics(first, *keys) == metrics(second, *keys)
    assert len(metrics(first, "step")) == STEPS


def test_jobs_train_to_the_bits_of_torchrun_in_one_go_and_resumed(cluster: Cluster, folder: Path) -> None:
    command = [sys.executable, "-m", "pretrain", "train", str(CONFIG), *CHANGES, "run.root=local", "--processes", "2"]
    subprocess.run(command, cwd=folder, env=os.environ | ENVIRONMENT, check=True, timeout=JOB_SECONDS)

    whole = submit(cluster, folder, *CHANGES, "run.root=whole")
    assert (whole.state, whole.exit_code) == ("COMPLETED", 0), whole.output
    assert newest(folder / "whole").index["world_size"] == 2
    assert re.search(r"at most [1-9][\d,]* bytes received", whole.output)  # matrices are exchanged
    assert_same_run(folder / "whole", folder / "local")

    stopped = submit(cluster, folder, "--stop-at", "30", *CHANGES, "run.root=parts")
    assert (stopped.state, stopped.exit_code) == ("FAILED", 75), stopped.output
    assert newest(folder / "parts").index["step"] == 30
    resumed = submit(cluster, folder, *CHANGES, "run.root=parts")
    assert (resumed.state, resumed.exit_code) == ("COMPLETED", 0), resumed.output
    assert "(step 30)" in resumed.output
    assert_same_run(folder / "parts", folder / "whole")

    # Every line of the job's output says whose it is, and each rank has its own file.
    assert "[rank 0]: done: 60 steps" in resumed.output
    logs = folder / "logs/slurm" / str(resumed.number)
    written = {node: list((logs / f"node-{node}").glob("*/attempt_0/0/stdout.log")) for node in (0, 1)}
    assert [len(files) for files in written.values()] == [1, 1]
    assert sum("done: 60 steps" in file.read_text() for files in written.values() for file in files) == 1
    for job in (whole, stopped, resumed):
        assert "Traceback" not in job.output


def test_a_job_ends_with_the_code_of_bad_input(cluster: Cluster, folder: Path) -> None:
    refused = submit(cluster, folder, *CHANGES, "optimizer.lr=-1")
    assert (refused.state, refused.exit_code) == ("FAILED", 2), refused.output
    assert "error: optimizer.lr" in refused.output
    assert "Traceback" not in refused.output


def test_one_node_with_one_process_is_no_special_case(cluster: Cluster, folder: Path) -> None:
    stopped = submit(cluster, folder, "--stop-at", "2", *CHANGES, nodes=1)
    assert (stopped.state, stopped.exit_code) == ("FAILED", 75), stopped.output
    assert "1 ranks" in stopped.output
