"""Read a sweep folder and group its jobs into series; the jobs of a series differ only in the seed.

A single run is read as a sweep of one job, so that the rest of the report handles only one case.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pretrain.report.claims import Claim, Labels, claim_problems, parse_claim, positive_number
from pretrain.report.errors import ReportError
from pretrain.run.reader import Run, read_exit_code, read_run

SWEEP_FILE = "sweep.json"
_FORMAT, _VERSION = "aurora-sweep", 1
_RUN_AXIS = "run"
_BARE_WORDS = {
    "true",
    "false",
    "yes",
    "no",
    "on",
    "off",
    "none",
    "null",
    "",
}  # labels that mean nothing without their axis


Kind = Literal["run", "runs", "sweep"]


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        run: the contents of its folder; empty while the job waits for the runs that choose its values.
        labels: axis -> label.
        tuned: dotted config key -> value, for the keys that are tuned.
        chosen: whether it takes part in comparisons; False for a trial of a value that was not, or not yet, chosen.
        is_waiting: whether it waits for the runs that choose its values.
    """

    run: Run
    labels: Labels
    tuned: dict[str, Any]
    chosen: bool
    is_waiting: bool = False


@dataclass(frozen=True)
class Series:
    """Jobs that differ only in the seed.

    Attributes:
        labels: axis -> label, without the seed axis.
        name: a short name, unique within the sweep.
        jobs: seed -> job, for all jobs that take part in comparisons, done or not.
    """

    labels: Labels
    name: str
    jobs: dict[str, Job]

    @property
    def done(self) -> dict[str, Run]:
        """The runs of the finished jobs, by seed."""
        return {seed: job.run for seed, job in self.jobs.items() if job.run.state == "done"}

    @property
    def shown(self) -> dict[str, Run]:
        """The runs that have records, by seed; used for curves."""
        return {seed: job.run for seed, job in self.jobs.items() if job.run.records}

    @property
    def first(self) -> Run | None:
        """The run of the first seed that has records."""
        return next(iter(self.shown.values()), None)

    @property
    def timed(self) -> dict[str, Run]:
        """The runs with usable timings, by seed."""
        return {seed: run for seed, run in self.shown.items() if not run.disturbances}


@dataclass(frozen=True)
class Sweep:
    """The subject of a report: a sweep, with the attributes of sweep.json; a run; or runs, along the axis "run"."""

    kind: Kind
    path: Path
    name: str
    title: str
    jobs: list[Job]
    question: str = ""
    source: str = ""
    overrides: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, list[str]] = field(default_factory=dict)
    seed_axis: str | None = None
    baseline: Labels | None = None
    claims: list[Claim] = field(default_factory=list)

    @property
    def seeds(self) -> list[str]:
        """The labels of the seed axis; one empty label if there is no seed axis."""
        return self.axes[self.seed_axis] if self.seed_axis else [""]

    @cached_property
    def series(self) -> list[Series]:
        """All series that have a job, in the order of the axes' labels."""
        found: dict[tuple[str, ...], dict[str, Job]] = {}
        axes = [axis for axis in self.axes if axis != self.seed_axis]
        for job in self.jobs:
            members = found.setdefault(tuple(job.labels[axis] for axis in axes), {})
            if job.chosen:
                members[job.labels[self.seed_axis] if self.seed_axis else ""] = job
        order = {key: tuple(self.axes[a].index(label) for a, label in zip(axes, key, strict=True)) for key in found}
        return [
            Series(
                labels=dict(zip(axes, key, strict=True)),
                name=self._name(dict(zip(axes, key, strict=True))),
                jobs={seed: found[key][seed] for seed in self.seeds if seed in found[key]},
            )
            for key in sorted(found, key=order.__getitem__)
        ]

    @property
    def run_folders(self) -> dict[str, Path]:
        """The runs' names and folders, without jobs that wait for their values."""
        return {self.run_name(job): job.run.path for job in self.jobs if not job.is_waiting}

    def run_name(self, job: Job) -> str:
        """The name of a job's run; among several runs of the same name, its path."""
        return job.labels[_RUN_AXIS] if self.kind == "runs" else job.run.name

    def find(self, labels: Labels) -> Series | None:
        """The series with exactly these labels."""
        return next((series for series in self.series if series.labels == dict(labels)), None)

    def baseline_of(self, series: Series) -> Series | None:
        """The baseline of a series, which has the same labels on all axes that `baseline` does not name.

        None for a baseline itself, or without a baseline.
        """
        other = None if self.baseline is None else self.find({**series.labels, **self.baseline})
        return None if other is series else other

    def _name(self, labels: Labels) -> str:
        """Join the labels that vary; a label such as "4" or "true" gets its axis as a prefix."""
        telling = {axis: label for axis, label in labels.items() if len(self.axes[axis]) > 1} or labels
        parts = [
            f"{axis} {label}" if positive_number(label) is not None or label.lower() in _BARE_WORDS else label
            for axis, label in telling.items()
        ]
        return " · ".join(parts) or self.name


def load(path: Path) -> Sweep:
    """Read a run or sweep folder.

    Raises:
        ReportError: the folder does not exist, is not a run or a sweep, or contains a malformed file; one line per
            problem.
    """
    if not path.is_dir():
        raise ReportError(f"{path}: no such folder; expected a run or a sweep")
    if (path / SWEEP_FILE).exists():
        return _load_sweep(path)
    run = read_run(path)
    if not run.manifest and not run.records:
        raise ReportError(f"{path}: neither a run nor a sweep: it has no {SWEEP_FILE}, manifest.json or metrics.jsonl")
    return Sweep("run", path, run.name, run.name, [Job(run, {}, {}, chosen=True)])


def load_runs(paths: Sequence[Path]) -> Sweep:
    """Read several run folders, to be compared with the first one.

    Raises:
        ReportError: one of them is not a run, or is given twice; one line per problem.
    """
    problems = [
        f"{path}: given twice" for path, count in Counter(path.resolve() for path in paths).items() if count > 1
    ]
    runs = []
    for path in paths:
        try:
            found = load(path)
            if found.kind != "run":
                problems.append(f"{path}: a sweep; a report about several folders compares runs")
            runs.append(found.jobs[0].run)
        except ReportError as error:
            problems.append(str(error))
    if problems:
        raise ReportError("\n".join(problems))
    counts = Counter(run.name for run in runs)
    names = [run.name if counts[run.name] == 1 else str(path) for run, path in zip(runs, paths, strict=True)]
    jobs = [Job(run, {_RUN_AXIS: name}, {}, chosen=True) for run, name in zip(runs, names, strict=True)]
    title = ", ".join(names)
    return Sweep("runs", paths[0], title, title, jobs, axes={_RUN_AXIS: names}, baseline={_RUN_AXIS: names[0]})


def _load_sweep(path: Path) -> Sweep:
    file = path / SWEEP_FILE
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{file}: cannot be read: {error}") from None
    _raise(file, _problems(data))
    axes = {axis: [str(label) for label in labels] for axis, labels in data["axes"].items()}
    seed_axis = data["seed_axis"] if data.get("seed_axis") in axes else None
    claims = data.get("claims") or []
    _raise(file, [problem for claim in claims for problem in claim_problems(claim, axes, seed_axis)])
    jobs = [_job(path, entry) for entry in data["jobs"]]
    _raise(file, _problems_of_jobs(jobs, axes))
    baseline = data.get("baseline")
    return Sweep(
        kind="sweep",
        path=path,
        name=str(data["name"]),
        title=str(data.get("title") or data["name"]),
        question=str(data.get("question") or ""),
        source=str(data.get("source") or ""),
        overrides=data.get("overrides") or {},
        axes=axes,
        seed_axis=seed_axis,
        baseline=None if baseline is None else {axis: str(label) for axis, label in baseline.items()},
        claims=[parse_claim(claim) for claim in claims],
        jobs=jobs,
    )


def _job(folder: Path, entry: dict[str, Any]) -> Job:
    """Return a job of sweep.json, with its run folder read."""
    run = folder / (entry["run"] or "no run yet")
    return Job(
        run=read_run(run, read_exit_code(folder, run.name)),
        labels={axis: str(label) for axis, label in entry["labels"].items()},
        tuned=entry.get("tuned") or {},
        chosen=entry.get("chosen", True),
        is_waiting=entry["run"] is None,
    )


def _raise(file: Path, problems: Sequence[str]) -> None:
    if problems:
        raise ReportError("\n".join(f"{file}: {problem}" for problem in problems))


def _problems(data: Any) -> list[str]:
    """Return the problems with the layout of sweep.json."""
    if not isinstance(data, dict) or data.get("format") != _FORMAT or data.get("version") != _VERSION:
        return [f"not a sweep file of this version; expected format {_FORMAT!r} and version {_VERSION}"]
    problems = [] if data.get("name") else ["name is missing"]
    axes = data.get("axes")
    if not isinstance(axes, dict) or not all(isinstance(labels, list) and labels for labels in axes.values()):
        return [*problems, f"axes is {axes!r}; expected a mapping from axes to lists of labels"]
    for key, kind in (("overrides", dict), ("baseline", dict), ("claims", list)):
        if data.get(key) is not None and not isinstance(data[key], kind):
            problems.append(f"{key} is {data[key]!r}; expected a {'mapping' if kind is dict else 'list'}")
    baseline = data.get("baseline")
    for axis, label in (baseline if isinstance(baseline, dict) else {}).items():
        if axis not in axes or axis == data.get("seed_axis") or str(label) not in map(str, axes[axis]):
            problems.append(f"baseline.{axis} is {label!r}; expected an axis and one of its labels")
    if not isinstance(data.get("jobs"), list) or not data["jobs"]:
        return [*problems, "jobs is missing or empty; expected a list"]
    for number, job in enumerate(data["jobs"]):
        if (
            not isinstance(job, dict)
            or not isinstance(job.get("run", 0), str | None)
            or not isinstance(job.get("labels"), dict)
        ):
            problems.append(f"jobs[{number}]: expected a mapping with run and labels")
        elif not isinstance(job.get("tuned") or {}, dict):
            problems.append(f"jobs[{number}].tuned is {job['tuned']!r}; expected a mapping")
        elif set(job["labels"]) != set(axes) or any(str(job["labels"][a]) not in map(str, axes[a]) for a in axes):
            problems.append(f"jobs[{number}].labels is {job['labels']!r}; expected one label for every axis")
    return problems


def _problems_of_jobs(jobs: Sequence[Job], axes: dict[str, list[str]]) -> list[str]:
    seen: set[tuple[str, ...]] = set()
    problems = []
    for job in jobs:
        key = tuple(job.labels[axis] for axis in axes)
        if job.chosen and key in seen:
            problems.append(f"two chosen jobs have the labels {', '.join(key)}")
        if job.chosen:
            seen.add(key)
    return problems
