"""Scores on some of a task's items, computed from its result: without contaminated items, or on a cleaned subset.

mark_overlap(result, report, identities)  -> each item's `overlap`, and the task's
add_subset(result, subset, identities)    -> the task's `subsets`

`identities` are those of `eval.identities.item_identities`, by the name of the task that has the items: the items of a
control are those of another task.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

from eval.controls import items_of
from eval.errors import EvalError
from eval.item_identity import ItemIdentity
from eval.overlap_report import OverlapReport, TaskReport
from eval.schema import EvalResult, ItemOutcome, TaskResult
from eval.subsets import SubsetList
from eval.validity_schema import Part, Subset

Identities = Mapping[str, Sequence[ItemIdentity]]


def part_of(items: Sequence[ItemOutcome]) -> Part:
    """Return the scores on `items`."""
    part: Part = {"num_items": len(items), "acc": None, "acc_stderr": None}
    part["acc"], part["acc_stderr"] = _mean([item["acc"] for item in items])
    if any("acc_norm" in item for item in items):
        part["acc_norm"], part["acc_norm_stderr"] = _mean([item["acc_norm"] for item in items])
    return part


def mark_overlap(result: EvalResult, report: OverlapReport, identities: Identities) -> list[str]:
    """Mark the items of a result that share text with the training data.

    Args:
        result: changed in place; earlier marks are replaced.
        report: which items do.
        identities: of the items of the result's tasks.

    Returns:
        A line for each task that was not marked.

    Raises:
        EvalError: the report is about none of the tasks, or about other items; one line per problem.
    """
    names = [name for name in result["tasks"] if items_of(name) in report.tasks]
    if not names:
        raise EvalError(
            f"the report of overlap is about {', '.join(report.tasks) or 'no task'}, and the result has"
            f" {', '.join(result['tasks']) or 'none'}; run `aurora data overlap` with the tasks of the result"
        )
    problems = [
        problem
        for name in names
        for problem in _other_items(name, result["tasks"][name], report.tasks[items_of(name)], identities)
    ]
    if problems:
        raise EvalError("\n".join(problems))
    for name in names:
        task, found = result["tasks"][name], report.tasks[items_of(name)]
        for item in task["items"]:
            item["overlap"] = item["doc_id"] in found.overlapping
        task["overlap"] = {
            "report_sha256": report.sha256,
            "ngram": report.ngram,
            "complete": report.complete,
            "text_bytes": report.text_bytes,
            "too_short_in_split": found.too_short,
            "overlapping": part_of([item for item in task["items"] if item["overlap"]]),
            "without": part_of([item for item in task["items"] if not item["overlap"]]),
        }
    return [f"{name} is not marked: the report is not about it" for name in result["tasks"] if name not in names]


def add_subset(result: EvalResult, subset: SubsetList, identities: Identities) -> None:
    """Add the scores on a subset to every task of a result that has its items.

    Args:
        result: changed in place; an earlier subset of this name is replaced.
        subset: the list of items.
        identities: of the items of the result's tasks.

    Raises:
        EvalError: no task has such items, the split does not have all items of the list, or the result is of others.
    """
    names = [name for name in result["tasks"] if items_of(name) == subset.task]
    if not names:
        raise EvalError(
            f"the subset {subset.name} is of {subset.task}, and the result has {', '.join(result['tasks']) or 'none'}"
        )
    known = identities[subset.task]
    doc_ids = subset.places(known)
    hashes = sorted(known[place].doc_hash for place in doc_ids)
    for name in names:
        task = result["tasks"][name]
        _check_hashes(name, task, known)
        chosen = [item for item in task["items"] if item["doc_id"] in doc_ids]
        entry: Subset = {
            "origin": subset.origin,
            "sha256": hashlib.sha256("".join(hashes).encode()).hexdigest(),
            "num_items_in_split": len(doc_ids),
            "doc_ids": [item["doc_id"] for item in chosen],
            **part_of(chosen),
        }
        if subset.revision is not None:
            entry["revision"] = subset.revision
        task.setdefault("subsets", {})[subset.name] = entry


def _mean(values: Sequence[int]) -> tuple[float | None, float | None]:
    """The mean and its standard error, as lm-eval computes them."""
    count = len(values)
    if not count:
        return None, None
    mean = sum(values) / count
    if count == 1:
        return mean, None
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)


def _other_items(name: str, task: TaskResult, found: TaskReport, identities: Identities) -> list[str]:
    """Why the items of a report are not those of a result; empty if they are."""
    known = identities[items_of(name)]
    _check_hashes(name, task, known)
    if not found.item_hashes:
        return [f"{name}: the report of overlap has no hashes of its items; run `aurora data overlap` again"]
    if len(found.item_hashes) != len(known):
        return [
            f"{name}: the report of overlap is about {len(found.item_hashes):,} items, and the split has {len(known):,}"
        ]
    other = sum(one.text_hash != reported for one, reported in zip(known, found.item_hashes, strict=True))
    if other:
        return [
            f"{name}: {other:,} of the {len(known):,} items of the report of overlap are other ones; run `aurora data"
            " overlap` with the same --items as the evaluation"
        ]
    return []


def _check_hashes(name: str, task: TaskResult, known: Sequence[ItemIdentity]) -> None:
    """Check that the items of a result are those of this machine."""
    other = sum(
        item["doc_id"] >= len(known) or known[item["doc_id"]].doc_hash != item["doc_hash"] for item in task["items"]
    )
    if other:
        raise EvalError(
            f"{name}: {other:,} of the {len(task['items']):,} items of the result are not those in the cache or on the"
            " Hub now; evaluate again"
        )
