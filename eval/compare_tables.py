"""A comparison as text, Markdown, CSV, LaTeX or JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from typing import Literal, cast

from eval.compare_schema import BitsComparison, Comparison, Flip, TaskComparison
from eval.paired import ERROR
from pretrain.text_tables import aligned, markdown_row

Format = Literal["text", "markdown", "csv", "latex", "json"]
HEADS = ("task", "metric", "items", "baseline", "model", "difference [95 %]", "won/lost", "p", "p equiv.", "verdict")
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    '"': "''",
    # After a line break or \item these would be read as arguments.
    "[": "{[}",
    "]": "{]}",
    "*": "{*}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
}


def render(comparison: Comparison, form: Format) -> str:
    """Return the comparison in one of the formats, ending in a newline."""
    forms: dict[Format, Callable[[Comparison], str]] = {
        "text": _text,
        "markdown": _markdown,
        "csv": _csv,
        "latex": _latex,
        "json": lambda found: json.dumps(found, indent=1, allow_nan=False),
    }
    return forms[form](comparison).rstrip("\n") + "\n"


def verdict(row: TaskComparison) -> str:
    """Return the verdict in a few words."""
    if row["outcome"] == "different":
        return f"{row.get('better')} is better" + (", within the margin" if row["within_margin"] else "")
    if row["outcome"] == "equivalent":
        return "equivalent"
    return f"undecided (could show {row['smallest_difference']:.3f})"


def _cells(row: TaskComparison, part: str | None = None) -> list[str]:
    low, high = row["interval"]
    exact = " exact" if row["interval_method"] == "exact" else ""
    of_all = "" if row["num_items"] == row["num_items_in_split"] else f" of {row['num_items_in_split']:,}"
    sources = "" if row["num_sources"] == row["num_items"] else f" ({row['num_sources']:,} sources)"
    return [
        row["task"] if part is None else f"{row['task']}, {part}",
        row["metric"],
        f"{row['num_items']:,}{of_all}{sources}",
        f"{row['baseline_score']:.4f}",
        f"{row['score']:.4f}",
        f"{row['difference']:+.4f} [{low:+.4f}, {high:+.4f}]{exact}",
        f"{row['won']:,}/{row['lost']:,}",
        _p(row["difference_p_corrected"]),
        _p(row["equivalence_p_corrected"]),
        verdict(row),
    ]


def _bits_cells(row: BitsComparison) -> list[str]:
    interval = "" if row["interval"] is None else " [{:+.4f}, {:+.4f}]".format(*row["interval"])
    return [
        row["text"],
        "bits/byte",
        f"{row['num_documents']:,} documents",
        f"{row['baseline_score']:.4f}",
        f"{row['score']:.4f}",
        f"{row['difference']:+.4f}{interval}",
        f"{row['won']:,}/{row['lost']:,}",
        _p(row["difference_p_corrected"]),
        "-",
        f"{row.get('better')} is better" if row["outcome"] == "different" else "undecided",
    ]


def _p(value: float) -> str:
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"


def explanations(comparison: Comparison) -> list[str]:
    """Return how to read the tables, what the verdicts cover, and notes."""
    count = len(comparison["comparisons"])
    corrected = "" if count <= 1 else f", corrected for {count} comparisons (Holm)"
    lines = [
        "difference: model minus baseline, in fractions; the interval is by paired bootstrap, exact where few items "
        "are discordant, and not corrected",
        f"p: exact test of no difference; p equiv.: test of |difference| >= {comparison['margin']:g}{corrected}",
        f"verdict: at p <= {ERROR:g}; could show: the true difference that such a set finds with a probability of 80 %",
    ]
    if "members" in comparison:
        groups = list(dict.fromkeys(row["task"] for row in comparison["comparisons"] if "tasks" in row))
        lines.append(
            f"{', '.join(groups)}: over the items of all its tasks; each of them is in the formats json and csv, with P"
            f" values corrected for these {len(comparison['members'])} comparisons alone"
        )
    if "parts" in comparison:
        lines.append(
            f"rows with a part of a task: P values corrected for these {len(comparison['parts'])} alone; items without "
            "overlap share no text with the training data of either model, as far as it was looked for"
        )
    if "bits_per_byte" in comparison:
        lines.append(
            "bits/byte: fewer are better; won/lost counts documents; the interval is by bootstrap over documents, the "
            "test a t test of the ratio"
        )
    return [*lines, comparison["scope"], *(f"note: {note}" for note in comparison["notes"])]


def tables(comparison: Comparison) -> list[tuple[str, list[list[str]]]]:
    """Return the rows of each model as text, in the columns HEADS, with a title.

    Whole tasks come first, then parts of them, then held-out texts.
    """
    baseline = comparison["models"][0]["label"]
    return [
        (
            f"{model['label']} against {baseline}",
            [
                *(_cells(row) for row in comparison["comparisons"] if row["model"] == model["label"]),
                *(_cells(row, row["part"]) for row in comparison.get("parts", []) if row["model"] == model["label"]),
                *(_bits_cells(row) for row in comparison.get("bits_per_byte", []) if row["model"] == model["label"]),
            ],
        )
        for model in comparison["models"][1:]
    ]


def _text(comparison: Comparison) -> str:
    lines = []
    for title, rows in tables(comparison):
        table = [[printable(cell) for cell in cells] for cells in (HEADS, *rows)]
        lines += [printable(title), *aligned(table), ""]
    lines += [printable(line) for line in explanations(comparison)]
    for flip in comparison.get("flips", []):
        lines += ["", *_flip_lines(flip, comparison["models"][0]["label"])]
    return "\n".join(lines)


def _flip_lines(flip: Flip, baseline: str) -> list[str]:
    right, wrong = (flip["model"], baseline) if flip["won"] else (baseline, flip["model"])
    lines = [printable(f"{flip['task']}, item {flip['doc_id']}: {right} is right, {wrong} is wrong")]
    lines += [f"    {printable(flip['prompt'])}"]
    for choice in flip["choices"]:
        figures = [choice["baseline_log_likelihood"], choice["log_likelihood"]]
        shown = "".join(f"{figure:10.2f}" for figure in figures if figure is not None)
        lines += [f"  {'*' if choice['correct'] else ' '}{shown}  {printable(choice['text'])}"]
    return lines


def printable(text: str) -> str:
    """Return text for one line of a terminal: without control characters and line breaks."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _markdown(comparison: Comparison) -> str:
    lines = []
    for title, rows in tables(comparison):
        lines += [f"**{markdown_text(title)}**", "", markdown_row(HEADS), markdown_row(["---"] * len(HEADS))]
        lines += [markdown_row(map(markdown_text, cells)) for cells in rows]
        lines += [""]
    lines += [f"- {markdown_text(line)}" for line in explanations(comparison)]
    for flip in comparison.get("flips", []):
        first, prompt, *choices = _flip_lines(flip, comparison["models"][0]["label"])
        lines += ["", markdown_text(first) + ":", "", f"> {_markdown_line(prompt)}", ""]
        lines += [f"- {_markdown_line(choice)}" for choice in choices]
    return "\n".join(lines)


def markdown_text(text: str) -> str:
    """Escape text so that Markdown and HTML show it as it is, on one line and inside a table."""
    safe = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]()#!|~$])", r"\\\1", safe)


def _markdown_line(text: str) -> str:
    """Escaped text that does not start a list or a heading."""
    safe = re.sub(r"^([-+=])", r"\\\1", markdown_text(text.strip()))
    return re.sub(r"^(\d+)\.", r"\1\\.", safe)


def _csv(comparison: Comparison) -> str:
    """One line per model and task, part of a task, or text, with full precision."""
    out = io.StringIO()
    plain = [
        "task",
        "metric",
        "baseline",
        "model",
        "num_items",
        "num_items_in_split",
        "num_sources",
        "baseline_score",
        "score",
        "difference",
        "interval_low",
        "interval_high",
        "interval_method",
        "won",
        "lost",
        "mcnemar_p",
        "mcnemar_mid_p",
        "difference_p",
        "difference_p_corrected",
        "equivalence_p",
        "equivalence_p_corrected",
        "smallest_difference",
        "margin",
        "within_margin",
        "outcome",
        "better",
        "scope",
        "part",
    ]
    writer = csv.DictWriter(out, plain, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for row in (*comparison["comparisons"], *comparison.get("members", []), *comparison.get("parts", [])):
        values: dict[str, object] = {**cast(dict[str, object], row), "margin": comparison["margin"]}
        values["interval_low"], values["interval_high"] = row["interval"]
        values |= {"within_margin": str(row["within_margin"]).lower(), "scope": comparison["scope"]}
        writer.writerow({key: _inert(value) for key, value in values.items()})
    for bits in comparison.get("bits_per_byte", []):
        values = {**cast(dict[str, object], bits), "task": bits["text"], "metric": "bits_per_byte"}
        values |= {"num_items": bits["num_documents"], "scope": comparison["scope"]}
        values["interval_low"], values["interval_high"] = bits["interval"] or ("", "")
        writer.writerow({key: _inert(value) for key, value in values.items()})
    return out.getvalue()


def _inert(value: object) -> object:
    """Text that a spreadsheet would take for a formula, marked as text."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value


def _latex(comparison: Comparison) -> str:
    """A table for each model, to be used with the package booktabs."""
    lines = []
    for title, rows in tables(comparison):
        lines += [r"\begin{table}", r"\centering", r"\begin{tabular}{llrrrrrrrl}", r"\toprule"]
        lines += [f"{' & '.join(latex_text(head) for head in HEADS)} \\\\", r"\midrule"]
        lines += [f"{' & '.join(latex_text(cell) for cell in cells)} \\\\" for cells in rows]
        caption = " ".join(f"{line.rstrip('.')}." for line in [title, *explanations(comparison)])
        lines += [r"\bottomrule", r"\end{tabular}", f"\\caption{{{latex_text(caption)}}}", r"\end{table}", ""]
    for flip in comparison.get("flips", []):
        first, prompt, *choices = _flip_lines(flip, comparison["models"][0]["label"])
        lines += [f"\\paragraph{{{latex_text(first)}}} {latex_text(prompt.strip())}", r"\begin{itemize}"]
        lines += [f"\\item {latex_text(choice.strip())}" for choice in choices]
        lines += [r"\end{itemize}", ""]
    return "\n".join(lines)


def latex_text(text: str) -> str:
    """Escape text so that LaTeX prints it as it is."""
    escaped = "".join(_LATEX.get(sign, sign) for sign in printable(text))
    return re.sub("-(?=-)", "-{}", escaped)  # not a dash
