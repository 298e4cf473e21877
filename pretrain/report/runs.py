"""A run folder, read: config, manifest, one record a step, telemetry arrays."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import yaml

from eval.errors import EvalError
from pretrain.report.statistics import Curve

State = Literal["done", "running", "stopped", "failed", "missing"]
_GOOD_EXITS = (0, 75)  # done, stopped on request
CPU_SHARE = 0.9  # a single thread that computed for less of its time shared its core
_QUIET_SECONDS = 120.0  # a run whose lock cannot be seen from here counts as running that long after its last write
LOCKS = Path("/proc/locks")


@dataclass(frozen=True)
class Reading:
    """One number out of a run.

    Attributes:
        value: the number, or None.
        note: why there is none.
        broken: there is none because the run's loss was not finite, which counts against it.
        step: step that it was read at.
        tokens: tokens trained on until then.
    """

    value: float | None
    note: str = ""
    broken: bool = False
    step: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Run:
    """A run folder; every file of it may be absent.

    Attributes:
        path: the folder.
        config: config.yaml, empty if absent.
        manifest: manifest.json, empty if absent.
        records: of metrics.jsonl, by rising step, each step once.
        exit_code: of the process that a sweep started for it; None if not known.
    """

    path: Path
    config: dict[str, Any]
    manifest: dict[str, Any]
    records: list[dict[str, Any]]
    exit_code: int | None = None

    @property
    def name(self) -> str:
        """run.name, or the folder's name."""
        return str(self.manifest.get("run") or self.path.name)

    @property
    def launches(self) -> list[dict[str, Any]]:
        """Each launch: time, commit, hardware."""
        return [launch for launch in self.manifest.get("launches") or [] if isinstance(launch, dict)]

    @property
    def last_step(self) -> int:
        """Step of the last record; 0 without one."""
        return int(self.records[-1]["step"]) if self.records else 0

    @property
    def total_steps(self) -> int | None:
        """Steps that the config asks for."""
        train = self.section("train")
        tokens, batch = train.get("total_tokens"), train.get("global_batch_tokens")
        return math.ceil(tokens / batch) if isinstance(tokens, int) and isinstance(batch, int) and batch else None

    @property
    def skipped_steps(self) -> int:
        """Steps that changed nothing because their gradients were not finite."""
        return sum(bool(record.get("skipped")) for record in self.records)

    @property
    def config_text(self) -> str:
        """config.yaml as it stands; empty if absent."""
        return _text(self.path / "config.yaml") or ""

    @cached_property
    def state(self) -> State:
        """done: the manifest says so; running: a process holds the run; failed: its process said so; stopped: none of
        these; missing: nothing there."""
        if self.manifest.get("finished"):
            return "done"
        if _is_held(self.path, recently=self.exit_code is None):
            return "running"
        if self.exit_code not in (None, *_GOOD_EXITS):
            return "failed"
        return "stopped" if self.manifest or self.records else "missing"

    @cached_property
    def disturbances(self) -> list[str]:
        """Why the run's times say little; empty if they can be used."""
        found = []
        if len(self.launches) > 1:
            found.append(f"{len(self.launches)} launches")
        threads = ((self.launches or [{}])[-1].get("hardware") or {}).get("threads")
        share = self.median(lambda record: record["cpu_seconds"] / record["step_seconds"])
        if threads == 1 and share is not None and share < CPU_SHARE:
            found.append(f"its thread had a core for {100 * share:.0f} % of the time")
        return found

    @cached_property
    def telemetry_files(self) -> dict[int, Path]:
        """The telemetry arrays by step, rising."""
        files = {}
        for path in self.path.glob("telemetry/step-*.safetensors"):
            if match := re.fullmatch(r"step-(\d+)", path.stem):
                files[int(match[1])] = path
        return dict(sorted(files.items()))

    def section(self, name: str) -> dict[str, Any]:
        """A section of the config; empty if absent."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    def curve(self, key: str, over: str = "step") -> Curve:
        """`key` over `over` where both are numbers."""
        pairs = [
            (record[over], record[key])
            for record in self.records
            if is_number(record.get(key)) and is_number(record.get(over))
        ]
        array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        return array[:, 0], array[:, 1]

    def read(self, key: str, step: int | None = None) -> Reading:
        """`key` at `step` (None: the last), or where it was measured last before.

        A telemetry key that is null was not defined there, and an earlier one is taken; any other key that is null
        was not finite, and no earlier value hides that.
        """
        if step is not None and self.last_step < step:
            return Reading(None, f"ends at step {self.last_step}")
        for record in reversed(self.records):
            if key not in record or (step is not None and record["step"] > step):
                continue
            if is_number(record[key]):
                return Reading(float(record[key]), step=record["step"], tokens=record.get("tokens"))
            if not key.startswith("telemetry/"):
                return Reading(None, f"{key} not finite at step {record['step']}", broken=True, step=record["step"])
        return Reading(None, f"has no {key}")

    def median(self, of: Callable[[dict[str, Any]], float]) -> float | None:
        """Median over the steps of what `of` makes of a record; steps without it are left out."""
        values = []
        for record in self.records:
            try:
                values.append(of(record))
            except (KeyError, TypeError, ZeroDivisionError):
                continue
        return median(values) if values else None

    def parameters(self) -> tuple[int, int] | None:
        """Parameters in all (tied ones once) and without embeddings and head, from the config."""
        model = self.section("model")
        try:
            hidden, layers = model["hidden_size"], model["num_layers"]
            kv = hidden // model["num_heads"] * model["num_kv_heads"]
            matrices = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * model["intermediate_size"])
            inner = matrices + (2 * layers + 1) * hidden
            tables = model["vocab_size"] * hidden * (1 if model.get("tie_embeddings") else 2)
        except (KeyError, TypeError, ZeroDivisionError):
            return None
        return inner + tables, inner


def load_run(path: Path, exit_code: int | None = None) -> Run:
    """Read a run folder; absent files are empty.

    Args:
        path: the folder.
        exit_code: of the process that a sweep started for it; None if not known.

    Raises:
        EvalError: a file is there and cannot be read.
    """
    config = _text(path / "config.yaml")
    manifest = _text(path / "manifest.json")
    try:
        parsed_config = yaml.safe_load(config) if config else {}
        parsed_manifest = json.loads(manifest) if manifest else {}
    except (yaml.YAMLError, ValueError) as error:
        which = "config.yaml" if isinstance(error, yaml.YAMLError) else "manifest.json"
        raise EvalError(f"{path / which}: cannot be read: {' '.join(str(error).split())}") from None
    for file, data in (("config.yaml", parsed_config), ("manifest.json", parsed_manifest)):
        if not isinstance(data, dict):
            raise EvalError(f"{path / file}: expected a mapping, got {type(data).__name__}")
    return Run(path, parsed_config, parsed_manifest, _records(path / "metrics.jsonl"), exit_code)


def is_number(value: Any) -> bool:
    """A finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _records(path: Path) -> list[dict[str, Any]]:
    """Complete records by step; a line cut off by a crash is not one."""
    by_step = {}
    for line in (_text(path) or "").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and is_number(record.get("step")):
            by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise EvalError(f"{path}: cannot be read: {error.strerror}") from None


def _is_held(path: Path, recently: bool) -> bool:
    """Whether a process trains in the folder: its lock is held on this machine, or (if `recently` counts) it was
    written to just now, perhaps from another one.

    The lock is looked up, not tried: a trainer that starts at this moment would find it taken.
    """
    try:
        inode = (path / ".lock").stat().st_ino
        if any(line.split()[5].endswith(f":{inode}") for line in LOCKS.read_text().splitlines() if "FLOCK" in line):
            return True
    except OSError:
        pass
    written = [file.stat().st_mtime for name in ("metrics.jsonl", "manifest.json") if (file := path / name).exists()]
    return recently and bool(written) and time.time() - max(written) < _QUIET_SECONDS
