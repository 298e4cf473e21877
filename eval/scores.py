"""The scores of a result as people read them: by task, a group of tasks such as MMLU as one, and their intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

from eval.compare_schema import Metric
from eval.paired import score_interval
from eval.ratios import FEWEST_DOCUMENTS, ratio_interval
from eval.schema import EvalResult, ItemOutcome, TaskResult
from eval.validity_schema import BitsPerByte


@dataclass(frozen=True)
class Score:
    """The score of a task, or of a group of tasks."""

    name: str
    metric: Metric
    """What it is reported by."""
    value: float
    stderr: float | None
    """lm-eval's, which takes all items for independent; of a group, pooled."""
    num_items: int
    shots: int
    """Number of solved examples in the prompt."""
    tasks: tuple[TaskResult, ...]
    """The task, or those of the group, of which `eval.compare_groups.joined` makes one."""
    is_group: bool


def scores(result: EvalResult) -> Iterator[Score]:
    """Yield the scores of a result: of its groups, then of the tasks that are not in a group."""
    for name, group in result.get("groups", {}).items():
        members = tuple(result["tasks"][task] for task in group["tasks"])
        shots = cast(int, shots_of(result, name))
        yield Score(name, "acc", group["acc"], group["acc_stderr"], group["num_items"], shots, members, True)
    grouped = group_of(result)
    for name, task in result["tasks"].items():
        if name not in grouped:
            metric, shots = main_metric(task), cast(int, shots_of(result, name))
            stderr = task["acc_stderr"] if metric == "acc" else task.get("acc_norm_stderr")
            yield Score(name, metric, task[metric], stderr, task["num_items"], shots, (task,), False)


def group_of(result: EvalResult) -> dict[str, str]:
    """Return the group of each task that is in one, such as mmlu for its subjects."""
    return {task: name for name, group in result.get("groups", {}).items() for task in group["tasks"]}


def shots_of(result: EvalResult, name: str) -> int | None:
    """Return the number of solved examples with which a result has a task or a group; None if it has not."""
    group = result.get("groups", {}).get(name)
    task = result["tasks"].get(group["tasks"][0] if group else name)
    # Results of earlier versions have one number for all tasks.
    return None if task is None else task.get("num_fewshot", result["num_fewshot"])


def main_metric(task: TaskResult) -> Metric:
    """Return the metric that a task is reported by: the result's own, or else acc_norm where it has one."""
    return task.get("metric", "acc_norm" if "acc_norm" in task else "acc")


def interval_of(items: Sequence[ItemOutcome], metric: Metric) -> tuple[float, float]:
    """Return the 95 % interval of the mean outcome of some items, over their sources if all of them have one."""
    sources = [item["source"] for item in items if "source" in item]
    return score_interval([item[metric] for item in items], sources if len(sources) == len(items) else None)


def bits_interval(text: BitsPerByte) -> tuple[float, float] | None:
    """Return the 95 % interval of bits per byte over documents; None if there are too few of them."""
    documents = text["per_document"]
    if len(documents) < FEWEST_DOCUMENTS:
        return None
    return ratio_interval([one["bits"] for one in documents], [one["bytes"] for one in documents])
