"""From lm-eval's report to the results of tasks and groups."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Mapping
from typing import Any

from lm_eval.api.metrics import mean_stderr, pooled_sample_stderr

from eval.controls import items_of
from eval.schema import GroupResult, ItemOutcome, TaskResult
from eval.tasks import FEWSHOT_SEED, LoadedTasks, right_or_wrong

SOURCE_COLUMNS = {"hellaswag": "source_id", "piqa": "goal", "boolq": "passage"}
"""The column, by task, that names what an item was made from. Several items share a value."""


def task_result(name: str, loaded: LoadedTasks, report: Mapping[str, Any], truncated: int) -> TaskResult:
    """Return the result of a task.

    Args:
        name: of the task.
        loaded: the tasks.
        report: what `lm_eval.evaluator.evaluate` returned.
        truncated: number of requests that lost their beginning.
    """
    task, figures = loaded.tasks[name], report["results"][name]
    items = [_outcome(name, sample) for sample in report["samples"][name]]
    has_norm = "acc_norm,none" in figures
    result: TaskResult = {
        "version": report["versions"].get(name),
        "split": task.config.test_split or task.config.validation_split,
        "num_fewshot": task.config.num_fewshot,
        "metric": loaded.choices[name].metric or ("acc_norm" if has_norm else "acc"),
        "settings": {
            "normalization": "characters" if has_norm else "none",
            "target_delimiter": task.config.target_delimiter,
            "fewshot_seed": FEWSHOT_SEED,
        },
        "dataset": loaded.dataset(name),
        "num_items": len(items),
        "num_items_in_split": len(task.eval_docs),
        "acc": float(figures["acc,none"]),
        "acc_stderr": _stderr([item["acc"] for item in items]),
        "num_truncated_requests": truncated,
        "items": items,
    }
    note = loaded.note(name)
    if note is not None:
        result["note"] = note
    if has_norm:
        result["acc_norm"] = float(figures["acc_norm,none"])
        result["acc_norm_stderr"] = _stderr([item["acc_norm"] for item in items])
    if task.OUTPUT_TYPE == "loglikelihood":
        values = [item["log_likelihoods"][0] for item in items]
        with contextlib.suppress(OverflowError):  # of a model that gives the answers no probability
            perplexity = math.exp(-sum(values) / len(values))
            stderr = _stderr(values)
            result["perplexity"] = perplexity
            result["perplexity_stderr"] = None if stderr is None else perplexity * stderr
    return result


def group_results(loaded: LoadedTasks, report: Mapping[str, Any], tasks: Mapping[str, TaskResult]) -> dict[str, Any]:
    """Return the results of those groups that have a score of their own, by name."""
    found: dict[str, GroupResult] = {}
    for name, group in loaded.groups.items():
        score = report["results"].get(name, {}).get("acc,none")
        if not isinstance(score, float):
            continue
        members = [task.task_name for task in group.get_all_tasks()]
        sizes = [tasks[member]["num_items"] for member in members]
        stderrs = [stderr for member in members if (stderr := tasks[member]["acc_stderr"]) is not None]
        weighted = all(metric.weight_by_size for metric in group.aggregate_metric_list)
        found[name] = {
            "tasks": members,
            "num_items": sum(sizes),
            "acc": score,
            "acc_stderr": pooled_sample_stderr(stderrs, sizes) if weighted and len(stderrs) == len(members) else None,
        }
    return found


def _outcome(task: str, sample: Mapping[str, Any]) -> ItemOutcome:
    outcome: ItemOutcome = {
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "acc": right_or_wrong(task, sample["acc"]),
    }
    if "acc_norm" in sample:
        outcome["acc_norm"] = right_or_wrong(task, sample["acc_norm"])
    source = _source(task, sample["doc"])
    if source is not None:
        outcome["source"] = source
    outcome["log_likelihoods"] = [float(value) for value, _ in sample["filtered_resps"]]
    outcome["greedy"] = [bool(greedy) for _, greedy in sample["filtered_resps"]]
    return outcome


def _source(task: str, doc: Mapping[str, Any]) -> str | None:
    """What the item was made from, if its data set says so; texts are shortened to a hash."""
    value = doc.get(SOURCE_COLUMNS.get(items_of(task), ""))
    if not isinstance(value, str) or not value:
        return None
    return value if len(value) <= 40 and " " not in value else hashlib.sha256(value.encode()).hexdigest()[:16]


def _stderr(values: list[Any]) -> float | None:
    """The standard error of a mean: sample standard deviation / sqrt(number); None for a single value."""
    return float(mean_stderr(values)) if len(values) > 1 else None
