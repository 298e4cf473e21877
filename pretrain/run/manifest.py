"""The manifest of a run: what it trains, and for each launch the code, the versions and the hardware."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from pretrain.config import Config
from pretrain.files import now, replace_text
from pretrain.model.cost import parameter_count
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


def write_manifest(folder: RunFolder, config: Config, facts: dict[str, Any], launch: dict[str, Any]) -> None:
    """Write config.yaml and the manifest, with `launch` appended to the manifest's list of launches.

    Args:
        folder: the run's.
        config: the resolved config.
        facts: what the run consists of (identity, data fingerprint, routing table), the same at each launch, and what
            it has read so far; the parameter counts and the number of steps are added, for `pretrain.run.reader`.
        launch: what this launch runs on; time, code, versions and hardware are added.

    Raises:
        RunError: the manifest of an earlier launch cannot be read.
        OSError: it cannot be written.
    """
    launches = (folder.manifest() or {}).get("launches", [])
    replace_text(folder.path / CONFIG_FILE, config.to_yaml())
    folder.write_manifest(
        {
            "run": config.run.name,
            **facts,
            "parameters": parameter_count(config.model),
            "total_steps": config.total_steps,
            "launches": [*launches, {**environment(), **launch}],
        }
    )


def environment() -> dict[str, Any]:
    """Time, code, versions and hardware of this process."""
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
    }


@functools.cache
def git_commit() -> str | None:
    """Return the commit of this package's own repository, followed by ``+changes`` if the working tree differs.

    None for an installed copy, even inside another repository. The result is cached, since the running code does not
    change.
    """
    return commit_of(Path(__file__))


def commit_of(module: Path) -> str | None:
    """Return the commit of the repository with our source, given one of its modules; None if there is none."""
    root = module.parents[2]
    name = module.relative_to(root).as_posix()

    def git(*arguments: str) -> str | None:
        # In a git hook, GIT_DIR and other variables are set and may point to another repository.
        variables = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
        command = ["git", "-C", str(module.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True, env=variables)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    # The module must be tracked, at this path: a copy in site-packages inside another repository is neither.
    if not _is_our_project(root) or git("ls-files", "--full-name", "--error-unmatch", module.name) != name:
        return None
    commit = git("rev-parse", "HEAD")
    if not commit:
        return None
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


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
