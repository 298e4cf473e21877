"""The run folder: its files, its lock, and the manifest that says what produced the run."""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

import torch

from pretrain.config import Config
from pretrain.files import replace_text
from pretrain.processes.errors import UserError
from pretrain.run.json_lines import JsonLines

TOKENIZER_FILE = "tokenizer.json"  # the run folder's copy: an export needs nothing from outside
LOCK_ATTEMPTS = 5
_PACKAGES = ("torch", "transformers", "accelerate", "tokenizers", "datasets", "pyarrow", "numpy", "lm-eval")


class RunError(UserError):
    """A run folder that cannot be used as asked; the message says which key or file, and what to do."""


class RunFolder:
    """Paths and bookkeeping of ``<root>/<name>``.

    Attributes:
        path: the folder.
        metrics: metrics.jsonl.
        samples: samples.jsonl.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = JsonLines(path / "metrics.jsonl")
        self.samples = JsonLines(path / "samples.jsonl")
        self._lock: IO[str] | None = None

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def telemetry(self) -> Path:
        """Folder of the neuron measurements."""
        return self.path / "telemetry"

    @property
    def manifest_path(self) -> Path:
        """manifest.json."""
        return self.path / "manifest.json"

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None where there is none yet.

        Raises:
            RunError: it cannot be read.
        """
        try:
            return json.loads(self.manifest_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(f"{self.manifest_path}: cannot be read: {error}") from None

    def lock(self) -> None:
        """Create the folder and keep every other process from training in it until this one ends.

        Raises:
            RunError: another process trains in it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
            for attempt in range(LOCK_ATTEMPTS):
                try:
                    fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except BlockingIOError:
                    if attempt + 1 == LOCK_ATTEMPTS:
                        raise
                    time.sleep(0.1)  # it may be `is_locked` of another process that holds it for a moment
        except BlockingIOError:
            raise RunError(
                f"{self.path}: another process is training in this run folder; wait for it or change run.name"
            ) from None
        except OSError as error:
            raise RunError(f"{self.path}: cannot be written: {error}") from None

    def is_locked(self) -> bool:
        """Whether some process trains in the folder now."""
        try:
            with (self.path / ".lock").open() as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return False
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False

    def unlock(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_manifest(self, config: Config, facts: dict[str, Any], launch: dict[str, Any]) -> None:
        """Write config.yaml and the manifest; `launch` is appended to the manifest's list of launches.

        Args:
            config: the resolved config.
            facts: what the run is made of (identity, data fingerprint, routing table); the same at each launch.
            launch: what this launch runs on; time, versions and hardware are added.
        """
        launches = (self.manifest() or {}).get("launches", [])
        replace_text(self.path / "config.yaml", config.to_yaml())
        manifest = {"run": config.run.name, **facts, "launches": [*launches, {**environment(), **launch}]}
        replace_text(self.manifest_path, json.dumps(manifest, indent=1))

    def mark_finished(self, step: int) -> None:
        """Note in the manifest that the run is complete at `step`."""
        manifest = self.manifest() or {}
        manifest["finished"] = {"step": step, "time": _now()}
        replace_text(self.manifest_path, json.dumps(manifest, indent=1))

    @property
    def finished(self) -> bool:
        """Whether the run has been trained to its end; not, if its manifest cannot be read (training it says why)."""
        try:
            return "finished" in (self.manifest() or {})
        except RunError:
            return False


def git_commit() -> str | None:
    """The commit of the code that runs, with ``+changes`` if the working tree differs; None outside git."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    commit = git("rev-parse", "HEAD")
    if not commit:
        return None
    return commit + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def environment() -> dict[str, Any]:
    """Time, code, versions and hardware of this launch."""
    hardware: dict[str, Any] = {
        "machine": platform.machine(),
        "processor": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        hardware["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "time": _now(),
        "git_commit": git_commit(),
        "python": sys.version.split()[0],
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "hardware": hardware,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()
