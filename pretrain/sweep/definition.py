"""The sweep file and its validation.

    name: learning-rates
    base: small.yaml                # a run config, relative to this file
    overrides: {train.precision: fp32}
    axes:                           # one job for each combination of labels
      optimizer:
        muon: {optimizer.name: muon, optimizer.lr: {one_of: [0.01, 0.02, 0.04]}}
        adamw: {optimizer.name: adamw, optimizer.adamw.lr: 2e-3}
      seed:
        1: {run.seed: 1, data.seed: 1}   # another initialisation and another order of the data
        2: {run.seed: 2, data.seed: 2}
        3: {run.seed: 3, data.seed: 3}

If the value of a key is a ``one_of`` list, each of its values is tried with the first seed, and the other seeds are run
with the value that had the lowest validation loss.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from pretrain.config import Config, ConfigError, parse_config
from pretrain.config.base import Section
from pretrain.config.loader import read_yaml
from pretrain.config.overrides import assign
from pretrain.config.run import valid_run_name
from pretrain.config.validate import validate_section
from pretrain.shipped import locate

ClaimProblems = Callable[[Mapping[str, Any], Mapping[str, Sequence[str]], str], list[str]]
"""Returns the problems of an entry of `claims`, given the axes with their labels, and the seed axis."""


def _with_text_labels(axes: Any) -> Any:
    """Convert the labels to text: YAML reads the label ``1`` as a number."""
    if not isinstance(axes, dict):
        return axes
    return {
        str(axis): {str(label): changes for label, changes in labels.items()} if isinstance(labels, dict) else labels
        for axis, labels in axes.items()
    }


Changes = dict[str, Any]


class SweepFile(Section):
    """A sweep file."""

    name: Annotated[str, AfterValidator(valid_run_name)]
    """The name of the sweep; its folder is `<root>/sweeps/<name>`."""

    base: Annotated[str, Field(min_length=1)]
    """The run config that all jobs share, relative to the sweep file."""

    root: Annotated[str, Field(min_length=1)] = "runs"
    """The folder that contains the run folders. Sweeps with the same root share identical runs."""

    title: str = ""
    """Title of the report; if empty, the name."""

    question: str = ""
    """The question that the sweep should answer, for the report."""

    overrides: Changes = Field(default_factory=dict)
    """Dotted key -> value, for all jobs."""

    axes: Annotated[dict[str, dict[str, Changes]], BeforeValidator(_with_text_labels), Field(min_length=1)]
    """Axis -> label -> dotted key -> value."""

    seed_axis: str = "seed"
    """The axis whose labels are repetitions: differences are paired by it, and intervals are over it."""

    baseline: dict[str, str] | None = None
    """Axis -> label of the jobs that the others are compared with in the report."""

    claims: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = ()
    """The claims to be tested, each with a threshold, stated before the runs; see `pretrain.report.claims`."""


@dataclass(frozen=True)
class Cell:
    """One combination of labels, before tuned values are chosen."""

    labels: dict[str, str]
    changes: dict[str, Any]
    """Dotted key -> value, without the keys to be tuned."""
    alternatives: tuple[dict[str, Any], ...]
    """The combinations of values to try; one empty dict if nothing is tuned."""


class Sweep:
    """A validated sweep.

    Attributes:
        file: its settings.
        source: path of the sweep file.
        folder: `<root>/sweeps/<name>`, for its plan, job configs, logs and report.
        cells: the combinations of labels, in order.
    """

    def __init__(self, file: SweepFile, source: Path, base: dict[str, Any]) -> None:
        self.file, self.source, self._base = file, source, base
        self.folder = Path(file.root) / "sweeps" / file.name
        self.cells = list(_cells(file))

    @property
    def first_seed(self) -> str | None:
        """The seed label used for tuning; None without a seed axis."""
        return next(iter(self.file.axes.get(self.file.seed_axis, ())), None)

    def config(self, cell: Cell, alternative: Mapping[str, Any]) -> Config:
        """Return the run config of a cell, still without the run's own name.

        Raises:
            ConfigError: the config is not valid; lists every problem.
        """
        data = copy.deepcopy(self._base)
        problems = []
        for key, value in {**cell.changes, **alternative, "run.root": self.file.root}.items():
            if problem := assign(data, key, copy.deepcopy(value)):
                problems.append(f"{key}: {problem}")
        if problems:
            raise ConfigError(problems)
        return parse_config(data)


def is_sweep_file(path: Path) -> bool:
    """Return whether a YAML file is a sweep file and not a run config.

    Raises:
        ConfigError: the file cannot be read.
    """
    return "axes" in read_yaml(path)


def load_sweep(path: Path, claim_problems: ClaimProblems = lambda claim, axes, seed_axis: []) -> Sweep:
    """Load a sweep file and validate the config of every job.

    Raises:
        ConfigError: lists every problem in the sweep file and in the configs of its jobs.
    """
    data = read_yaml(path)
    file, problems = validate_section(SweepFile, data, str(path))
    if file is None:
        raise ConfigError(problems)
    problems += [f"{path}: {problem}" for problem in _problems(file, claim_problems)]
    if problems:
        raise ConfigError(problems)
    base = read_yaml(Path(locate(file.base, path.parent)))
    sweep = Sweep(file, path, base)
    problems = _job_problems(sweep)
    if problems:
        raise ConfigError(problems)
    return sweep


def _problems(file: SweepFile, claim_problems: ClaimProblems) -> list[str]:
    """Return the problems of a sweep file beyond the types of its values."""
    found = []
    labels = {axis: list(by_label) for axis, by_label in file.axes.items()}
    for axis, names in labels.items():
        if not names:
            found.append(f"axes.{axis}: expected at least one label")
    setters = defaultdict(set)
    for axis, by_label in file.axes.items():
        for key in {key for changes in by_label.values() for key in changes}:
            setters[key].add(f"axes.{axis}")
    for key in setters:
        places = set().union(*(setters[other] for other in setters if f"{key}.".startswith(f"{other}.")))
        if len(places) > 1:
            found.append(f"{key}: set by {' and '.join(sorted(places))}; one of them would have no effect")
        if key in ("run.name", "run.root"):
            found.append(f"{key}: cannot be set in a sweep, which names every run itself and puts it below `root`")
    tuned = any(
        _values_to_try(value) is not None for axis in file.axes.values() for c in axis.values() for value in c.values()
    )
    if tuned and file.seed_axis not in file.axes:
        found.append(f"seed_axis: {file.seed_axis!r} is not an axis, but tuning a value (one_of) needs its first label")
    for axis, label in (file.baseline or {}).items():
        if label not in labels.get(axis, ()):
            found.append(f"baseline.{axis}: {label!r} is not a label of an axis with that name")
    for index, claim in enumerate(file.claims):
        found += [f"claims.{index}: {problem}" for problem in claim_problems(claim, labels, file.seed_axis)]
    return found


def _values_to_try(value: Any) -> list[Any] | None:
    """Return the values of a ``one_of`` list; None for any other value."""
    if isinstance(value, dict) and set(value) == {"one_of"} and isinstance(value["one_of"], list) and value["one_of"]:
        return value["one_of"]
    return None


def _cells(file: SweepFile) -> Iterator[Cell]:
    for combination in itertools.product(*(by_label.items() for by_label in file.axes.values())):
        labels = {axis: label for axis, (label, _) in zip(file.axes, combination, strict=True)}
        changes = dict(file.overrides)
        for _, own in combination:
            changes |= own
        to_try = {key: values for key, value in changes.items() if (values := _values_to_try(value)) is not None}
        alternatives = tuple(dict(zip(to_try, values, strict=True)) for values in itertools.product(*to_try.values()))
        yield Cell(labels, {key: value for key, value in changes.items() if key not in to_try}, alternatives)


def _job_problems(sweep: Sweep) -> list[str]:
    """Return the problems of all job configs, each once, with the jobs that have it."""
    jobs: dict[str, list[str]] = defaultdict(list)
    total = 0
    for cell in sweep.cells:
        for alternative in cell.alternatives:
            total += 1
            try:
                sweep.config(cell, alternative)
            except ConfigError as error:
                for problem in error.problems:
                    jobs[problem].append(", ".join(f"{axis} {label}" for axis, label in cell.labels.items()))
    return [
        f"{sweep.source}: {problem} (in {'every job' if len(names) == total else 'the job ' + names[0]}"
        + (f" and {len(names) - 1} others)" if 1 < len(names) < total else ")")
        for problem, names in jobs.items()
    ]
