"""A result as a table for the screen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from eval.controls import CONTROLS
from eval.schema import EvalResult, TaskResult
from eval.validity_schema import Part


def format_table(result: EvalResult) -> str:
    """Format a result with one line per task: items, acc and acc_norm with standard errors, as fractions.

    Indented below it, the same without the items that overlap with the training data, and on subsets. Then bits per
    byte, with a standard error over documents.
    """
    rows = [("task", "items", "acc", "acc_norm")] if result["tasks"] or "bits_per_byte" not in result else []
    for name, task in result["tasks"].items():
        rows += _task_rows(name, task)
    blocks = [_aligned(rows)] if rows else []
    if "bits_per_byte" in result:
        heads = ("text", "documents", "bytes", "tokens", "bits per byte")
        measured = result["bits_per_byte"].items()
        blocks.append(
            _aligned(
                [
                    heads,
                    *(
                        (
                            name,
                            _count(one["documents"], one["documents_in_text"]),
                            f"{one['bytes']:,}",
                            f"{one['tokens']:,}",
                            _figure(one["bits_per_byte"], one["stderr"]),
                        )
                        for name, one in measured
                    ),
                ]
            )
        )
    notes = [*_notes(result)]
    return "\n\n".join([*blocks, *(["\n".join(notes)] if notes else [])])


def _task_rows(name: str, task: TaskResult) -> Iterator[tuple[str, str, str, str]]:
    yield name, _count(task["num_items"], task["num_items_in_split"]), *_scores(task)
    if "overlap" in task:
        for title, part in (
            ("  without overlap", task["overlap"]["without"]),
            ("  overlapping", task["overlap"]["overlapping"]),
        ):
            yield title, f"{part['num_items']:,}", *_scores(part)
    for subset, part in task.get("subsets", {}).items():
        yield f"  {subset}", _count(part["num_items"], part["num_items_in_split"]), *_scores(part)


def _notes(result: EvalResult) -> Iterator[str]:
    for name, task in result["tasks"].items():
        if name in CONTROLS:
            yield f"{name}: a control; above chance it shows what {CONTROLS[name].of} gives away without its context"
        if "overlap" in task and not task["overlap"]["complete"]:
            yield f"{name}: the report of overlap covers a part of the training text; more items may occur in it"
    for name, text in result.get("bits_per_byte", {}).items():
        if text["documents_changed_by_tokenizer"]:
            yield (
                f"{name}: the tokenizer changes the text of {text['documents_changed_by_tokenizer']:,} documents, so"
                " their bits are too few; bytes are those of the original text"
            )


def _scores(part: TaskResult | Part) -> tuple[str, str]:
    return _figure(part["acc"], part["acc_stderr"]), _figure(part.get("acc_norm"), part.get("acc_norm_stderr"))


def _count(part: int, whole: int) -> str:
    return f"{part:,}" if part == whole else f"{part:,} of {whole:,}"


def _figure(mean: float | None, stderr: float | None) -> str:
    if mean is None:
        return "-"
    return f"{mean:.4f}" if stderr is None else f"{mean:.4f} ± {stderr:.4f}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)
