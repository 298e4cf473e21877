"""The jobs of a sweep: each is one run, whose name contains a hash of what it computes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pretrain.config import Config, identity_hash
from pretrain.files import replace_text
from pretrain.run.folder import RunFolder
from pretrain.run.reader import read_run
from pretrain.sweep.definition import Cell, Sweep

PLAN_FILE = "sweep.json"
FORMAT, VERSION = "aurora-sweep", 1
"""Format name and version in sweep.json."""


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    labels: dict[str, str]
    """Axis -> label."""
    tuned: dict[str, Any]
    """The values that this run uses for ``one_of`` keys; empty if there are none, or while none is chosen."""
    config: Config | None
    """The run's config, including its name; None while the job waits for the runs that choose its values."""
    chosen: bool
    """Whether it takes part in comparisons; False for a trial of values that were not chosen."""
    is_trial: bool
    """Whether it is one of the runs from which values are chosen."""

    @property
    def run(self) -> RunFolder:
        """The run folder of a job that has a config."""
        assert self.config is not None, "a job that waits for its values has no run"
        return RunFolder(self.config.run_folder)

    def __str__(self) -> str:
        parts = [f"{axis} {label}" for axis, label in self.labels.items()]
        return ", ".join([*parts, *(f"{key}={value}" for key, value in self.tuned.items())])


def plan_jobs(sweep: Sweep) -> list[Job]:
    """Return all jobs, trials first. Tuned values are chosen from the current contents of the run folders."""
    trials = [job for cell in sweep.cells if _is_tuned_by(sweep, cell) for job in _trials(sweep, cell)]
    best = {}
    for job in trials:
        if job.chosen:
            best[_without_seed(sweep, job.labels)] = job.tuned
    rest = []
    for cell in sweep.cells:
        if not _is_tuned_by(sweep, cell):
            open_values = len(cell.alternatives) > 1
            values = best.get(_without_seed(sweep, cell.labels)) if open_values else cell.alternatives[0]
            config = None if values is None else _named(sweep, sweep.config(cell, values))
            rest.append(Job(cell.labels, values or {}, config, chosen=True, is_trial=False))
    return trials + rest


def _is_tuned_by(sweep: Sweep, cell: Cell) -> bool:
    """Return whether the jobs of this cell are trials that choose values for the other seeds."""
    return len(cell.alternatives) > 1 and cell.labels[sweep.file.seed_axis] == sweep.first_seed


def _trials(sweep: Sweep, cell: Cell) -> Iterator[Job]:
    """Yield a job for each combination of values; the best one is chosen once all are done."""
    configs = [_named(sweep, sweep.config(cell, values)) for values in cell.alternatives]
    losses = [final_loss(RunFolder(config.run_folder)) for config in configs]
    known = [loss for loss in losses if loss is not None]
    best = losses.index(min(known)) if len(known) == len(losses) else None
    for index, (values, config) in enumerate(zip(cell.alternatives, configs, strict=True)):
        yield Job(cell.labels, values, config, chosen=index == best, is_trial=True)


def _without_seed(sweep: Sweep, labels: dict[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((axis, label) for axis, label in labels.items() if axis != sweep.file.seed_axis)


def _named(sweep: Sweep, config: Config) -> Config:
    """Return the config with a run name derived from what it computes and measures.

    Identical runs of two sweeps thus share a folder. Keys that only change how a run is executed enter the name if the
    sweep compares them.
    """
    named = config.keys_of("result", "numerics")
    compared = {key for labels in sweep.file.axes.values() for changes in labels.values() for key in changes}
    for key, value in config.keys_of("execution").items():
        if key in compared or any(key.startswith(f"{other}.") for other in compared):
            named[key] = value
    named |= {name: config.resolved().get(name) for name in ("validation", "telemetry")}
    name = f"{config.optimizer.name}-{identity_hash(named)[:10]}"
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def final_loss(run: RunFolder) -> float | None:
    """Return the last validation loss of a finished run, infinity if it was not finite; None for any other run."""
    return read_run(run.path).final_loss if run.finished else None


def write_plan(sweep: Sweep, jobs: list[Job]) -> Path:
    """Write sweep.json, which contains all that a report needs of the sweep file; return its path."""
    file = sweep.file
    plan = {
        "format": FORMAT,
        "version": VERSION,
        "name": file.name,
        "title": file.title or file.name,
        "question": file.question,
        "source": str(sweep.source),
        "overrides": file.overrides,
        "axes": {axis: list(labels) for axis, labels in file.axes.items()},
        "seed_axis": file.seed_axis,
        "baseline": file.baseline,
        "claims": list(file.claims),
        "jobs": [
            {
                "run": os.path.relpath(job.run.path, sweep.folder) if job.config else None,
                "labels": job.labels,
                "tuned": job.tuned,
                "chosen": job.chosen,
            }
            for job in jobs
        ],
    }
    sweep.folder.mkdir(parents=True, exist_ok=True)
    path = sweep.folder / PLAN_FILE
    replace_text(path, json.dumps(plan, indent=1))
    return path
