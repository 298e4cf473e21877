"""The manifest of a run: what it trains, and for each launch the code, the versions and the hardware."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from pretrain.config import Config
from pretrain.files import now, replace_text
from pretrain.model.cost import parameter_count
from pretrain.processes.redaction import is_secret_name, redact_source
from pretrain.run.folder import CONFIG_FILE, RunFolder

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "safetensors",
    "tokenizers",
    "datasets",
    "pyarrow",
    "numpy",
    "pydantic",
    "lm-eval",
)
"""The packages whose version can change what a run computes, reads or stores."""
DISTRIBUTION = "aurora-pretrain"

VARIABLES = frozenset(
    {
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR"),
        *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURM_JOB_PARTITION"),
        *("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_RESTART_COUNT"),
        *("SLURM_CPUS_PER_TASK", "SLURM_GPUS_ON_NODE", "CUDA_VISIBLE_DEVICES", "CUDA_LAUNCH_BLOCKING"),
        *("CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTHONHASHSEED"),
        *("PYTHONOPTIMIZE", "LD_PRELOAD", "LANG", "LC_ALL", "HF_ENDPOINT", "HF_HUB_OFFLINE", "MKL_CBWR"),
        *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM"),
    }
)
"""The variables of the environment that a manifest records: an allow-list, since others may hold secrets."""
VARIABLE_FAMILIES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "KMP_", "TORCHINDUCTOR_", "ONEDNN_", "DNNL_")
"""Prefixes of more of them."""
CHANGES = "+changes"
"""Follows the commit if the working tree differs from it."""
_MOST_OF_A_VALUE = 500
_MOST_OF_A_DIFF = 256 << 10


def write_manifest(folder: RunFolder, config: Config, facts: dict[str, Any], launch: dict[str, Any]) -> None:
    """Write config.yaml and the manifest, with `launch` appended to the manifest's list of launches.

    Args:
        folder: the run's.
        config: the resolved config.
        facts: what the run consists of (identity, data fingerprint, routing table), the same at each launch, and what
            it has read so far; the parameter counts and the number of steps are added, for `pretrain.run.reader`.
        launch: what this launch runs on; time, code, versions, hardware, command and environment are added. Of each
            difference to the commit there is one copy, under ``git_diffs``.

    Raises:
        RunError: the manifest of an earlier launch cannot be read.
        OSError: it cannot be written.
    """
    earlier = folder.manifest() or {}
    launches, diffs = earlier.get("launches", []), earlier.get("git_diffs", {})
    here = environment()
    if (diff := git_diff()) is not None:
        here["git_diff"] = hashlib.sha256(diff.encode()).hexdigest()[:16]
        diffs = {**diffs, here["git_diff"]: diff}
    replace_text(folder.path / CONFIG_FILE, config.to_yaml())
    folder.write_manifest(
        {
            "run": config.run.name,
            **facts,
            "parameters": parameter_count(config.model),
            "total_steps": config.total_steps,
            **({"git_diffs": diffs} if diffs else {}),
            "launches": [*launches, {**here, **launch}],
        }
    )


def environment() -> dict[str, Any]:
    """Time, code, versions, hardware, command and environment of this process, without secrets."""
    hardware: dict[str, Any] = {
        "machine": platform.machine(),
        "processor": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        hardware["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "time": now(),
        "git_commit": git_commit(),
        "python": sys.version.split()[0],
        "packages": {name: _version(name) for name in PACKAGES},
        "hardware": hardware,
        "command": redact_source(shlex.join(sys.argv)),
        "variables": {name: _recorded(os.environ[name]) for name in sorted(os.environ) if _is_recorded(name)},
    }


def _is_recorded(name: str) -> bool:
    return (name in VARIABLES or name.startswith(VARIABLE_FAMILIES)) and not is_secret_name(name)


def _recorded(value: str) -> str:
    return redact_source(value.encode(errors="backslashreplace").decode())[:_MOST_OF_A_VALUE]


@functools.cache
def git_commit() -> str | None:
    """Return the commit of this package's own repository, followed by ``+changes`` if the working tree differs.

    None for an installed copy, even inside another repository. The result is cached, since the running code does not
    change.
    """
    return commit_of(Path(__file__))


@functools.cache
def git_diff() -> str | None:
    """Return how the running code differs from its commit; None if it does not, or there is none. Cached as well."""
    commit = git_commit()
    return diff_of(Path(__file__)) if commit is not None and commit.endswith(CHANGES) else None


def diff_of(module: Path) -> str | None:
    """Return the difference of the tracked files to the commit, without secrets and not longer than 256 KiB."""
    shown = ("--no-color", "--no-ext-diff", "--no-textconv", "--submodule=short")
    diff = _git(module, "diff", *shown, "HEAD", "--", ":/")
    if diff is None:
        return None
    diff = redact_source(diff)
    rest = len(diff) - _MOST_OF_A_DIFF
    return diff if rest <= 0 else f"{diff[:_MOST_OF_A_DIFF]}\n[{rest:,} more characters]"


def commit_of(module: Path) -> str | None:
    """Return the commit of the repository with our source, given one of its modules; None if there is none."""
    root = module.parents[2]
    name = module.relative_to(root).as_posix()
    # The module must be tracked, at this path: a copy in site-packages inside another repository is neither.
    if not _is_our_project(root) or _git(module, "ls-files", "--full-name", "--error-unmatch", module.name) != name:
        return None
    commit = _git(module, "rev-parse", "HEAD")
    if not commit:
        return None
    return commit + (CHANGES if _git(module, "status", "--porcelain", "--untracked-files=no") else "")


def _git(module: Path, *arguments: str) -> str | None:
    """What git prints in the folder of a module; None if it fails."""
    # In a git hook, GIT_DIR and other variables are set and may point to another repository.
    variables = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    command = ["git", "-C", str(module.parent), *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, encoding="utf-8", errors="replace", timeout=20, check=True, env=variables
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _is_our_project(root: Path) -> bool:
    """Return whether a folder is the root of our source tree."""
    try:
        return f'name = "{DISTRIBUTION}"' in (root / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return False


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
