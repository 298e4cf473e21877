"""The items of a task that two results are compared on once more: those without overlap, and subsets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from eval.schema import TaskResult

WITHOUT_OVERLAP = "without overlap"


class PartOfTask(NamedTuple):
    """Two results of a task, cut down to the same items."""

    name: str
    first: TaskResult
    second: TaskResult


def parts_of(first: TaskResult, second: TaskResult) -> Iterator[PartOfTask]:
    """Yield the parts that either result marks, unless they have no items or all of them.

    An item that overlaps with the training data of either model is left out for both.
    """
    marked = {item["doc_id"] for task in (first, second) for item in task["items"] if item.get("overlap")}
    every = {item["doc_id"] for item in first["items"]}
    if marked:
        yield from _part(WITHOUT_OVERLAP, every - marked, first, second)
    subsets = {
        name: set(subset["doc_ids"]) for task in (second, first) for name, subset in task.get("subsets", {}).items()
    }
    for name, chosen in subsets.items():
        yield from _part(name, every & chosen, first, second)


def _part(name: str, chosen: set[int], first: TaskResult, second: TaskResult) -> Iterator[PartOfTask]:
    if 0 < len(chosen) < len(first["items"]):
        yield PartOfTask(name, _only(first, chosen), _only(second, chosen))


def _only(task: TaskResult, chosen: set[int]) -> TaskResult:
    return {**task, "items": [item for item in task["items"] if item["doc_id"] in chosen]}
