"""Results as text for the screen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from eval.compare_groups import interval_of_score
from eval.controls import CONTROLS
from eval.schema import EvalResult, TaskResult
from eval.scores import Score, bits_interval, group_of, scores
from eval.validity_schema import Part
from pretrain.text_tables import aligned


def format_table(result: EvalResult) -> str:
    """Format a result with one line per task or group: items, solved examples, acc and acc_norm with standard errors.

    Accuracies are fractions. The metric that a task is reported by has a star. Indented below a task, the same without
    the items that overlap with the training data, and on subsets. Bits per byte follow, and what a reader needs to
    compare the figures with others, such as the 95 % intervals of the scores.
    """
    rows: list[tuple[str, ...]] = [("task", "items", "shots", "acc", "acc_norm")]
    for score in scores(result):
        if score.is_group:
            rows.append(_group_row(score))
        else:
            rows += [_row(score), *_part_rows(score.tasks[0], str(score.shots))]
    lines = aligned(rows) if result["tasks"] else []
    if "bits_per_byte" in result:
        lines += aligned([("text", "documents", "bytes", "tokens", "bits per byte"), *_bits_rows(result)])
    return "\n".join([*lines, *_intervals(result), *_notes(result)])


def format_scores(results: Mapping[str, EvalResult]) -> str:
    """Format the scores of several models, by label: one line per model, one column per task or group."""
    found = {
        label: {_title(score): _figure(score.value, score.stderr) for score in scores(result)}
        for label, result in results.items()
    }
    names = list(dict.fromkeys(name for figures in found.values() for name in figures))
    rows = [("model", *names)]
    rows += [(label, *(figures.get(name, "-") for name in names)) for label, figures in found.items()]
    return "\n".join(aligned(rows))


def _title(score: Score) -> str:
    return score.name if score.is_group else f"{score.name} {score.metric}"


def _row(score: Score) -> tuple[str, ...]:
    (task,) = score.tasks
    figures = dict(zip(("acc", "acc_norm"), _both(task), strict=True))
    if "acc_norm" in task:
        figures[score.metric] += " *"
    items = _count(task["num_items"], task["num_items_in_split"])
    return score.name, items, str(score.shots), figures["acc"], figures["acc_norm"]


def _part_rows(task: TaskResult, shots: str) -> Iterator[tuple[str, ...]]:
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


def _group_row(score: Score) -> tuple[str, ...]:
    tasks = f"{score.name} ({len(score.tasks)} tasks)"
    return tasks, f"{score.num_items:,}", str(score.shots), _figure(score.value, score.stderr), "-"


def _figure(mean: float | None, stderr: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.4f}" if stderr is None else f"{mean:.4f} ± {stderr:.4f}"


def _intervals(result: EvalResult) -> Iterator[str]:
    """The 95 % intervals of what is reported, in one line for scores and one for bits per byte."""
    of_scores = {_title(score): interval_of_score(score) for score in scores(result)}
    of_texts = {name: bits_interval(text) for name, text in result.get("bits_per_byte", {}).items()}
    for title, found in (
        ("95 % intervals, over the sources of items where these are known", of_scores),
        ("95 % intervals of bits per byte, over documents", of_texts),
    ):
        known = [f"{name} {ends[0]:.4f} to {ends[1]:.4f}" for name, ends in found.items() if ends]
        if known:
            yield f"{title}: {', '.join(known)}"


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
    owners = group_of(result)
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
