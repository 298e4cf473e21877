"""Groups of tasks, such as the 57 subjects of MMLU, compared as one over the items of all of them."""

from __future__ import annotations

from collections.abc import Sequence

from eval.schema import EvalResult, ItemOutcome, TaskResult
from eval.scores import Score, interval_of, main_metric

_MOST_ITEMS = 2**32  # of one task; keeps the items of several apart


def shared_groups(results: Sequence[EvalResult]) -> dict[str, list[str]]:
    """Return the groups that all results have with the same tasks, and these tasks."""
    found = {name: group["tasks"] for name, group in results[0].get("groups", {}).items()}
    return {
        name: tasks
        for name, tasks in found.items()
        if all(
            name not in result["tasks"]
            and set(tasks) == set(result.get("groups", {}).get(name, {"tasks": []})["tasks"])
            and set(tasks) <= result["tasks"].keys()
            for result in results
        )
    }


def joined(tasks: Sequence[TaskResult]) -> TaskResult:
    """Return several tasks as one, whose items count alike.

    Args:
        tasks: at least one; results that are compared need them in the same order.
    """
    items: list[ItemOutcome] = []
    for place, task in enumerate(tasks):
        for item in task["items"]:
            moved: ItemOutcome = {**item, "doc_id": place * _MOST_ITEMS + item["doc_id"]}
            if "source" in item:
                moved["source"] = f"{place} {item['source']}"
            items.append(moved)
    one: TaskResult = {
        "version": None,
        "split": tasks[0]["split"],
        "num_items": len(items),
        "num_items_in_split": sum(task["num_items_in_split"] for task in tasks),
        "acc": sum(item["acc"] for item in items) / len(items),
        "acc_stderr": None,
        "num_truncated_requests": sum(task["num_truncated_requests"] for task in tasks),
        "items": items,
    }
    if all("acc_norm" in task for task in tasks):
        one["acc_norm"] = sum(item["acc_norm"] for item in items) / len(items)
    metrics = {main_metric(task) for task in tasks}
    one["metric"] = "acc_norm" if metrics == {"acc_norm"} else "acc"
    if not all("source" in task["items"][0] for task in tasks):
        for item in items:
            item.pop("source", None)
    return one


def interval_of_score(score: Score) -> tuple[float, float] | None:
    """Return the 95 % interval of a score; None for a group whose score is not the share of all its items."""
    whole = joined(score.tasks)
    if abs(whole[score.metric] - score.value) > 1e-9:  # its tasks are weighed in another way
        return None
    return interval_of(whole["items"], score.metric)
