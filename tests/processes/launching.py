"""Start the command line as real processes, in every way that people do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import REPOSITORY, TINY, merged

FAULTS = Path(__file__).parent / "faults"
TIMEOUT_SECONDS = 240
# What a launcher or a test run may have left in this process's environment.
FOREIGN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SHORT = {"train.total_tokens": 4 * 768, "schedule.warmup_tokens": 0, "data.validation_fraction": 0}

LAUNCHERS: dict[str, list[str]] = {
    "none": ["-m", "pretrain"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "{n}", "-m", "pretrain"],
    "pretrain.processes": ["-m", "pretrain.processes", "--standalone", "--nproc-per-node", "{n}", "-m", "pretrain"],
    "accelerate": [
        *("-m", "accelerate.commands.launch", "--num_processes", "{n}", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "-m", "pretrain"),
    ],
    # With --local_rank=N in front of the verb.
    "deepspeed": [
        *("-m", "deepspeed.launcher.runner", "--num_accelerators", "{n}", "--master_port", "{port}"),
        *("--module", "pretrain"),
    ],
    "deepspeed --no_local_rank": [
        *("-m", "deepspeed.launcher.runner", "--num_accelerators", "{n}", "--master_port", "{port}"),
        *("--no_local_rank", "--module", "pretrain"),
    ],
}


def write_config(folder: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """A tiny config of four steps, whose run lies in `folder`/runs/tiny."""
    file = folder / "config.yaml"
    data = merged(TINY, {"run.root": str(folder / "runs"), **SHORT, **(changes or {})})
    # Without validation data there is nothing to validate.
    file.write_text(yaml.safe_dump(data))
    return file


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, cleaned, with `changes`."""
    kept = {name: value for name, value in os.environ.items() if name not in FOREIGN}
    # deepspeed's launcher starts what it finds as `python` on PATH, in some versions.
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ours = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(REPOSITORY), "PATH": path}
    return kept | ours | {"TOKENIZERS_PARALLELISM": "false", **changes}


def launch(
    *arguments: str | Path, launcher: str = "none", count: int = 1, port: int = 0, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run ``aurora ARGUMENTS`` under a launcher."""
    start = [word.format(n=count, port=port) for word in LAUNCHERS[launcher]]
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment(**changes),
        timeout=TIMEOUT_SECONDS,
        stdin=subprocess.DEVNULL,
    )


def launch_with_fault(
    *arguments: str | Path, fault: str, step: int = 2, rank: int | None = 1, launcher: str = "none", count: int = 1
) -> subprocess.CompletedProcess[str]:
    """Run with a planted failure (see ``faults/sitecustomize.py``)."""
    planted = {"AURORA_TEST_FAULT": fault, "AURORA_TEST_FAULT_STEP": str(step)}
    planted |= {} if rank is None else {"AURORA_TEST_FAULT_RANK": str(rank)}
    path = f"{FAULTS}:{REPOSITORY}"
    return launch(*arguments, launcher=launcher, count=count, **planted, PYTHONPATH=path)
