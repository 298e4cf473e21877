"""The sweep file, and everything that can be wrong with it.

    name: learning-rates
    base: small.yaml                # a run config, relative to this file
    overrides: {train.precision: fp32}
    axes:                           # one job for each combination of labels
      optimizer:
        muon: {optimizer.name: muon, optimizer.lr: {one_of: [0.01, 0.02, 0.04]}}
        adamw: {optimizer.name: adamw, optimizer.adamw.lr: 2e-3}
      seed:
        1: {run.seed: 1}
        2: {run.seed: 2}

Where a key is given as ``one_of``, each value is tried with the first seed, and the other seeds are run with the one
whose validation loss was lowest.
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
"""What is wrong with an entry of `claims`, given the axes with their labels, and the seed's axis."""


def _with_text_labels(axes: Any) -> Any:
    """YAML reads the label ``1`` as a number."""
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
    """The sweep's name: its folder is `<root>/sweeps/<name>`."""

    base: Annotated[str, Field(min_length=1)]
    """The run config that all jobs share, relative to the sweep file."""

    root: Annotated[str, Field(min_length=1)] = "runs"
    """Folder of the run folders. Sweeps with one root share runs: what is the same run is not run again."""

    title: str = ""
    """Title of the report; empty: the name."""

    question: str = ""
    """What the sweep is to find out, for the report."""

    overrides: Changes = Field(default_factory=dict)
    """Dotted key -> value, for all jobs."""

    axes: Annotated[dict[str, dict[str, Changes]], BeforeValidator(_with_text_labels), Field(min_length=1)]
    """Axis -> label -> dotted key -> value."""

    seed_axis: str = "seed"
    """The axis whose labels are repetitions: differences are paired by it, intervals are taken over it."""

    baseline: dict[str, str] | None = None
    """Axis -> label of the jobs that the others are compared with in the report."""

    claims: Annotated[tuple[dict[str, Any], ...], Field(strict=False)] = ()
    """What is to be decided, with criterion and threshold, written down before the run: `pretrain.report.claims`."""


@dataclass(frozen=True)
class Cell:
    """One combination of labels, with the values to choose from still open."""

    labels: dict[str, str]
    changes: dict[str, Any]
    """Dotted key -> value; a key to be tuned is not in it."""
    alternatives: tuple[dict[str, Any], ...]
    """The combinations of values to be tuned; one empty dict where there are none."""


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
        """The label with which values are tuned; None without a seed axis."""
        return next(iter(self.file.axes.get(self.file.seed_axis, ())), None)

    def config(self, cell: Cell, alternative: Mapping[str, Any]) -> Config:
        """The run config of a cell, but for its name.

        Raises:
            ConfigError: with every problem.
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
    """Whether a YAML file is a sweep's rather than a run's.

    Raises:
        ConfigError: it cannot be read.
    """
    return "axes" in read_yaml(path)


def load_sweep(path: Path, claim_problems: ClaimProblems = lambda claim, axes, seed_axis: []) -> Sweep:
    """The sweep in a YAML file, every job of it validated.

    Raises:
        ConfigError: with every problem found in the sweep file and in the configs that follow from it.
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
    """What is wrong with a sweep file whose types are right."""
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
            found.append(f"{key}: cannot be swept: every job gets a name of its own below `root`")
    tuned = any(
        _values_to_try(value) is not None for axis in file.axes.values() for c in axis.values() for value in c.values()
    )
    if tuned and file.seed_axis not in file.axes:
        found.append(f"seed_axis: {file.seed_axis!r} is no axis, but values are to be tuned with its first label")
    for axis, label in (file.baseline or {}).items():
        if label not in labels.get(axis, ()):
            found.append(f"baseline.{axis}: {label!r} is not among the labels of an axis of that name")
    for index, claim in enumerate(file.claims):
        found += [f"claims.{index}: {problem}" for problem in claim_problems(claim, labels, file.seed_axis)]
    return found


def _values_to_try(value: Any) -> list[Any] | None:
    """The values of a ``one_of``; None for any other value."""
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
    """The problems of all configs, each once, with the jobs that have it."""
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
