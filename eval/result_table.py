"""Results as text for the screen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from eval.compare import main_metric
from eval.schema import EvalResult, GroupResult, TaskResult


def format_table(result: EvalResult) -> str:
    """Format a result with one line per task or group: items, solved examples, acc and acc_norm with standard errors.

    Accuracies are fractions. The metric that a task is reported by has a star. What a reader needs to compare the
    scores with others follows.
    """
    rows = [("task", "items", "shots", "acc", "acc_norm")]
    grouped = {name for group in result.get("groups", {}).values() for name in group["tasks"]}
    for name, group in result.get("groups", {}).items():
        rows.append(_group_row(name, group, result["tasks"][group["tasks"][0]]))
    rows += [_row(name, task) for name, task in result["tasks"].items() if name not in grouped]
    return "\n".join([*_aligned(rows), *_notes(result)])


def format_scores(results: Mapping[str, EvalResult]) -> str:
    """Format the scores of several models, by label: one line per model, one column per task or group."""
    scores = {label: dict(_scores(result)) for label, result in results.items()}
    names = list(dict.fromkeys(name for found in scores.values() for name in found))
    rows = [("model", *names)]
    rows += [(label, *(found.get(name, "-") for name in names)) for label, found in scores.items()]
    return "\n".join(_aligned(rows))


def _scores(result: EvalResult) -> Iterator[tuple[str, str]]:
    grouped = {name for group in result.get("groups", {}).values() for name in group["tasks"]}
    for name, group in result.get("groups", {}).items():
        yield name, _figure(group["acc"], group["acc_stderr"])
    for name, task in result["tasks"].items():
        if name not in grouped:
            metric = main_metric(task)
            stderr = task["acc_stderr"] if metric == "acc" else task.get("acc_norm_stderr")
            yield f"{name} {metric}", _figure(task[metric], stderr)


def _row(name: str, task: TaskResult) -> tuple[str, ...]:
    of_all = "" if task["num_items"] == task["num_items_in_split"] else f" of {task['num_items_in_split']:,}"
    figures = {
        "acc": _figure(task["acc"], task["acc_stderr"]),
        "acc_norm": _figure(task.get("acc_norm"), task.get("acc_norm_stderr")),
    }
    if "acc_norm" in task:
        figures[main_metric(task)] += " *"
    return name, f"{task['num_items']:,}{of_all}", str(task.get("num_fewshot", 0)), figures["acc"], figures["acc_norm"]


def _group_row(name: str, group: GroupResult, member: TaskResult) -> tuple[str, ...]:
    shots = str(member.get("num_fewshot", 0))
    tasks = f"{name} ({len(group['tasks'])} tasks)"
    return tasks, f"{group['num_items']:,}", shots, _figure(group["acc"], group["acc_stderr"]), "-"


def _figure(mean: float | None, stderr: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.4f}" if stderr is None else f"{mean:.4f} ± {stderr:.4f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [line.rstrip() for line in lines]


def _notes(result: EvalResult) -> Iterator[str]:
    tasks = result["tasks"]
    if any("acc_norm" in task for task in tasks.values()):
        yield "* reported; acc_norm divides the log-likelihood of a choice by its length in characters"
    for name, task in tasks.items():
        if "perplexity" in task:
            yield f"{name}: perplexity of the answers {task['perplexity']:,.4g}"
    source = result["items_source"]
    yield f"items: {source.get('package', 'from the Hub')}"
    for text, names in _by_note(tasks).items():
        yield f"{', '.join(names)}: {text}"
    owners = {name: group for group, found in result.get("groups", {}).items() for name in found["tasks"]}
    truncated: Counter[str] = Counter()
    for name, task in tasks.items():
        truncated[owners.get(name, name)] += task["num_truncated_requests"]
    for name, count in truncated.items():
        if count:
            yield f"{name}: {count:,} texts exceeded the context and lost their beginning"


def _by_note(tasks: Mapping[str, TaskResult]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, task in tasks.items():
        if "note" in task:
            found.setdefault(task["note"], []).append(name)
    return found
