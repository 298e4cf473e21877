"""Results as text for the screen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from eval.compare import main_metric
from eval.controls import CONTROLS
from eval.schema import EvalResult, GroupResult, TaskResult
from eval.validity_schema import Part


def format_table(result: EvalResult) -> str:
    """Format a result with one line per task or group: items, solved examples, acc and acc_norm with standard errors.

    Accuracies are fractions. The metric that a task is reported by has a star. Indented below a task, the same without
    the items that overlap with the training data, and on subsets. Bits per byte follow, and what a reader needs to
    compare the figures with others.
    """
    rows: list[tuple[str, ...]] = [("task", "items", "shots", "acc", "acc_norm")]
    grouped = {name for group in result.get("groups", {}).values() for name in group["tasks"]}
    for name, group in result.get("groups", {}).items():
        rows.append(_group_row(name, group, result["tasks"][group["tasks"][0]]))
    for name, task in result["tasks"].items():
        if name not in grouped:
            rows += [_row(name, task), *_part_rows(task)]
    lines = _aligned(rows) if result["tasks"] else []
    if "bits_per_byte" in result:
        lines += _aligned([("text", "documents", "bytes", "tokens", "bits per byte"), *_bits_rows(result)])
    return "\n".join([*lines, *_notes(result)])


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
    figures = dict(zip(("acc", "acc_norm"), _both(task), strict=True))
    if "acc_norm" in task:
        figures[main_metric(task)] += " *"
    items = _count(task["num_items"], task["num_items_in_split"])
    return name, items, str(task.get("num_fewshot", 0)), figures["acc"], figures["acc_norm"]


def _part_rows(task: TaskResult) -> Iterator[tuple[str, ...]]:
    shots = str(task.get("num_fewshot", 0))
    if "overlap" in task:
        overlap = task["overlap"]
        for title, part in (("without overlap", overlap["without"]), ("overlapping", overlap["overlapping"])):
            yield f"  {title}", f"{part['num_items']:,}", shots, *_both(part)
    for name, subset in task.get("subsets", {}).items():
        yield f"  {name}", _count(subset["num_items"], subset["num_items_in_split"]), shots, *_both(subset)


def _bits_rows(result: EvalResult) -> Iterator[tuple[str, ...]]:
    for name, text in result.get("bits_per_byte", {}).items():
        documents = _count(text["documents"], text["documents_in_text"])
        figure = _figure(text["bits_per_byte"], text["stderr"])
        yield name, documents, f"{text['bytes']:,}", f"{text['tokens']:,}", figure


def _both(part: TaskResult | Part) -> tuple[str, str]:
    return _figure(part["acc"], part["acc_stderr"]), _figure(part.get("acc_norm"), part.get("acc_norm_stderr"))


def _count(part: int, whole: int) -> str:
    return f"{part:,}" if part == whole else f"{part:,} of {whole:,}"


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
    if tasks:
        yield f"items: {result['items_source'].get('package', 'from the Hub')}"
    for text, names in _by_note(tasks).items():
        yield f"{', '.join(names)}: {text}"
    owners = {name: group for group, found in result.get("groups", {}).items() for name in found["tasks"]}
    truncated: Counter[str] = Counter()
    for name, task in tasks.items():
        truncated[owners.get(name, name)] += task["num_truncated_requests"]
    for name, count in truncated.items():
        if count:
            yield f"{name}: {count:,} texts were longer than the context and were cut at the start"

    for name, task in tasks.items():
        if name in CONTROLS:
            yield f"{name}: a control; above chance it shows what {CONTROLS[name].of} gives away without its context"
        if "overlap" in task and not task["overlap"]["complete"]:
            yield f"{name}: the report of overlap covers a part of the training text; more items may occur in it"
    for name, found in result.get("bits_per_byte", {}).items():
        changed = found["documents_changed_by_tokenizer"]
        if changed:
            yield (
                f"{name}: the tokenizer changes the text of {changed:,} documents, so the figure is too low; bytes are"
                " those of the original text"
            )


def _by_note(tasks: Mapping[str, TaskResult]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, task in tasks.items():
        if "note" in task:
            found.setdefault(task["note"], []).append(name)
    return found
