"""Reading of run folders: state, progress and measurements.

Reports, sweeps and the command line all use this reader. It can read while a run trains, and never writes. It does not
import torch, so that it starts quickly.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray

from pretrain.processes.exit_codes import DONE, STOPPED
from pretrain.run.folder import CONFIG_FILE, RunError, RunFolder
from pretrain.watching.heartbeat import FOLDER as HEARTBEATS
from pretrain.watching.heartbeat import Heartbeat, heartbeat_file, read_heartbeats

State = Literal["done", "running", "stopped", "failed", "pending"]
"""The state of a run.

done: trained to its end. running: a process trains it. failed: the process of its sweep ended with an error.
stopped: begun, and none of these. pending: not begun.
"""
STATES: tuple[State, ...] = ("done", "running", "stopped", "failed", "pending")
CPU_SHARE = 0.9
"""If a run with one thread used the CPU for less than this share of its time, it shared its core."""
QUIET_SECONDS = 120.0
"""How long after its last write a run counts as running if its lock, on another machine, cannot be seen from here."""
LOSS = "validation_loss"


@dataclass(frozen=True)
class Reading:
    """One value read from a run.

    Attributes:
        value: the value, or None.
        note: why there is no value.
        broken: whether there is no value because the run's loss was not finite, which counts against the run.
        step: the step at which it was read.
        tokens: the tokens trained on up to that step.
    """

    value: float | None
    note: str = ""
    broken: bool = False
    step: int | None = None
    tokens: int | None = None


@dataclass(frozen=True)
class Parameters:
    """Parameter counts of a model.

    Attributes:
        total: all parameters; tied ones count once.
        inner: without embedding and head.
    """

    total: int
    inner: int


@dataclass(frozen=True)
class Run:
    """A run folder; every file of it may be absent.

    Attributes:
        folder: the folder.
        config: config.yaml, empty if absent.
        manifest: manifest.json, empty if absent.
        exit_code: of the process that a sweep started for it; None if not known.
    """

    folder: RunFolder
    config: dict[str, Any]
    manifest: dict[str, Any]
    exit_code: int | None = None

    @property
    def path(self) -> Path:
        """The folder's path."""
        return self.folder.path

    @property
    def name(self) -> str:
        """run.name, or the folder's name."""
        return str(self.manifest.get("run") or self.path.name)

    @property
    def launches(self) -> list[dict[str, Any]]:
        """The launches in order: time, commit, hardware."""
        found = self.manifest.get("launches")
        return [launch for launch in found if isinstance(launch, dict)] if isinstance(found, list) else []

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The complete records of metrics.jsonl by rising step, each step once.

        Raises:
            RunError: it cannot be read.
        """
        try:
            found = self.folder.metrics.read()
        except OSError as error:
            raise RunError(f"{self.folder.metrics.path}: cannot be read: {error.strerror}") from None
        by_step = {record["step"]: record for record in found if is_number(record.get("step"))}
        return [by_step[step] for step in sorted(by_step)]

    @property
    def last_step(self) -> int:
        """Step of the last record; 0 without one."""
        return int(self.records[-1]["step"]) if self.records else 0

    @cached_property
    def total_steps(self) -> int | None:
        """Steps of the whole run; None if not known."""
        found = self.manifest.get("total_steps")
        return found if _is_count(found) else computed_steps(self.config)

    @cached_property
    def parameters(self) -> Parameters | None:
        """The model's parameter counts; None if not known."""
        counts = self.manifest.get("parameters") or computed_parameters(self.config)
        if not isinstance(counts, dict) or not all(
            _is_count(counts.get(key)) for key in ("total", "embedding", "head")
        ):
            return None
        return Parameters(counts["total"], counts["total"] - counts["embedding"] - counts["head"])

    @property
    def skipped_steps(self) -> int:
        """Steps that did not change the weights."""
        return sum(self.skipped_because.values())

    @property
    def skipped_because(self) -> dict[str, int]:
        """The reasons for which steps were skipped, each with the number of steps.

        Earlier versions recorded no reason and skipped only steps whose gradients were not finite.
        """
        skipped = (record for record in self.records if record.get("skipped"))
        return dict(Counter(str(record.get("skipped_because", "gradients not finite")) for record in skipped))

    @property
    def config_text(self) -> str:
        """config.yaml as written; empty if absent."""
        return _text(self.path / CONFIG_FILE) or ""

    @cached_property
    def state(self) -> State:
        """The state of the run at the first access."""
        if self.manifest.get("finished"):
            return "done"
        if self.folder.is_locked() or (self.exit_code is None and self._was_written_just_now()):
            return "running"
        if self.exit_code not in (None, DONE, STOPPED):
            return "failed"
        return "stopped" if self.manifest or self.records else "pending"

    def _was_written_just_now(self) -> bool:
        beats = (heartbeat_file(self.path / HEARTBEATS, rank) for rank in self.heartbeats)
        files = (self.folder.metrics.path, self.folder.manifest_path, *beats)
        ages = [age for file in files if (age := age_of(file)) is not None]
        return bool(ages) and min(ages) < QUIET_SECONDS

    @property
    def final_loss(self) -> float | None:
        """The last validation loss of a run that is done, infinite if it was not finite; None for any other run."""
        if self.state != "done":
            return None
        loss = self.read(LOSS).value
        return math.inf if loss is None else loss

    @cached_property
    def disturbances(self) -> list[str]:
        """Why the run's timings are not usable; empty if they are."""
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
        """Step -> file of telemetry arrays, in ascending order."""
        files = {}
        for path in self.folder.telemetry.glob("step-*.safetensors"):
            if match := re.fullmatch(r"step-(\d+)", path.stem):
                files[int(match[1])] = path
        return dict(sorted(files.items()))

    @cached_property
    def heartbeats(self) -> dict[int, Heartbeat]:
        """What the ranks that are running say of themselves, and those that died without removing it."""
        return read_heartbeats(self.path / HEARTBEATS)

    @cached_property
    def checkpoints(self) -> dict[int, Path]:
        """Step -> index of each complete checkpoint in the run folder, in ascending order."""
        found = {}
        for path in self.folder.checkpoints.glob("step-*/index.json"):
            if match := re.fullmatch(r"step-(\d{8,})", path.parent.name):
                found[int(match[1])] = path
        return dict(sorted(found.items()))

    def section(self, name: str) -> dict[str, Any]:
        """A section of the config; empty if absent."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    def curve(self, key: str, over: str = "step") -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return the values of `over` and `key` in the records in which both are numbers."""
        pairs = [
            (record[over], record[key])
            for record in self.records
            if is_number(record.get(key)) and is_number(record.get(over))
        ]
        array = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        return array[:, 0], array[:, 1]

    def read(self, key: str, step: int | None = None) -> Reading:
        """Read `key` at `step` (None: the last step), or at the last earlier step at which it was measured.

        A null telemetry value was undefined at that step, so an earlier value is used. Any other null value was not
        finite, and no earlier value is used instead.
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
        """Return the median of `of(record)` over the steps, without the steps for which it fails."""
        values = []
        for record in self.records:
            try:
                values.append(of(record))
            except (KeyError, TypeError, ZeroDivisionError):
                continue
        return median(values) if values else None


def read_run(path: Path, exit_code: int | None = None) -> Run:
    """Read a run folder; absent files are empty.

    Args:
        path: the folder.
        exit_code: of the process that a sweep started for it; None if not known.

    Raises:
        RunError: config or manifest exists and cannot be read.
    """
    folder = RunFolder(path)
    text = _text(path / CONFIG_FILE)
    try:
        config = yaml.safe_load(text) if text else {}
    except yaml.YAMLError as error:
        raise RunError(f"{path / CONFIG_FILE}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(config, dict):
        raise RunError(f"{path / CONFIG_FILE}: expected a mapping, got {type(config).__name__}")
    return Run(folder, config, folder.manifest() or {}, exit_code)


def job_file(sweep: Path, run_name: str, suffix: str) -> Path:
    """Return the path of a sweep's file for a job, in ``jobs/`` of its folder: ``.yaml``, ``.log``, or ``.exit``."""
    return sweep / "jobs" / f"{run_name}{suffix}"


def read_exit_code(sweep: Path, run_name: str) -> int | None:
    """Return the exit code of the last training process that a sweep started for a job; None if there is none.

    Args:
        sweep: the sweep's folder.
        run_name: of the job's run.
    """
    text = (_text(job_file(sweep, run_name, ".exit")) or "").strip()
    return int(text) if text.removeprefix("-").isdecimal() else None


def computed_steps(config: dict[str, Any]) -> int | None:
    """Compute the number of steps for a manifest of an older version without it; None if the config is not valid."""
    # Imported here: torch takes seconds to import, and only runs of older versions need this.
    from pretrain.config import ConfigError, parse_stored_config

    try:
        return parse_stored_config(config).total_steps
    except ConfigError:
        return None


def computed_parameters(config: dict[str, Any]) -> dict[str, int] | None:
    """Compute the parameter counts for a manifest of an older version without them; None if the config is not valid."""
    # Imported here: torch takes seconds to import, and only runs of older versions need this.
    from pretrain.config.model import ModelConfig
    from pretrain.config.validate import validate_section
    from pretrain.model.cost import parameter_count

    model, _ = validate_section(ModelConfig, config.get("model") or {}, "model", stored=True)
    return None if model is None else parameter_count(model)


def age_of(file: Path) -> float | None:
    """Return the seconds since a file was written, by this machine's clock; None if the file does not exist."""
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return None


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number that a float can hold, and not a boolean."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and is_number(value) and value >= 0


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise RunError(f"{path}: cannot be read: {error.strerror}") from None
