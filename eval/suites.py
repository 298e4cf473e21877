"""The tasks of an evaluation: by name, or as a suite that many models are measured on in the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from eval.errors import EvalError
from pretrain.processes.errors import did_you_mean

MainMetric = Literal["acc", "acc_norm"]


@dataclass(frozen=True)
class TaskChoice:
    """A task, or a group of tasks such as ``mmlu``, and how it is to be evaluated."""

    name: str
    """As lm-eval has it."""
    shots: int = 0
    """Number of solved examples in the prompt."""
    metric: MainMetric | None = None
    """The metric that the task is reported by; None for acc_norm if the task has it, or else acc."""


def _standard() -> tuple[TaskChoice, ...]:
    by_norm = ("arc_easy", "arc_challenge", "piqa", "openbookqa", "sciq")
    by_acc = ("boolq", "lambada_openai")
    return (
        *SUITES["core"],
        *(TaskChoice(name, metric="acc_norm") for name in by_norm),
        *(TaskChoice(name, metric="acc") for name in by_acc),
    )


SUITES: dict[str, tuple[TaskChoice, ...]] = {
    "core": (TaskChoice("hellaswag", metric="acc_norm"), TaskChoice("winogrande", metric="acc")),
    "mmlu": (TaskChoice("mmlu", shots=5, metric="acc"),),
    # The Hub's former leaderboard; the solved examples come from the training splits.
    "leaderboard": (
        TaskChoice("hellaswag", shots=10, metric="acc_norm"),
        TaskChoice("winogrande", shots=5, metric="acc"),
    ),
}
SUITES["standard"] = _standard()
DEFAULT_SUITE = "core"


def suite(name: str) -> tuple[TaskChoice, ...]:
    """Return the tasks of a suite.

    Raises:
        EvalError: the suite is unknown.
    """
    if name not in SUITES:
        raise EvalError(f"unknown suite {name!r}{did_you_mean(name, sorted(SUITES))}")
    return SUITES[name]


def choose(tasks: Sequence[str | TaskChoice], shots: int | None = None) -> list[TaskChoice]:
    """Return each task once, in the order of its first mention.

    Args:
        tasks: names, or choices.
        shots: for all of them instead of their own number; None to keep that.

    Raises:
        EvalError: there is none, one is named with different settings, or a number is out of range.
    """
    chosen: dict[str, TaskChoice] = {}
    problems = []
    for task in tasks:
        choice = TaskChoice(task) if isinstance(task, str) else task
        if shots is not None:
            choice = replace(choice, shots=shots)
        if choice.shots < 0:
            problems.append(f"task {choice.name}: shots is {choice.shots}; expected at least 0")
        if choice.metric not in (None, *get_args(MainMetric)):
            problems.append(f"task {choice.name}: metric is {choice.metric!r}; expected one of acc, acc_norm")
        if chosen.setdefault(choice.name, choice) != choice:
            problems.append(
                f"task {choice.name} is named twice with different settings; evaluate them in separate calls"
            )
    if not chosen:
        problems.append("no task given; expected at least one, for example hellaswag")
    if problems:
        raise EvalError("\n".join(dict.fromkeys(problems)))
    return list(chosen.values())
