"""Arguments that several verbs share, and types of their values."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    Verbs = argparse._SubParsersAction[Any]


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG and its overrides."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="values that take precedence over the file's, for example optimizer.lr=0.01",
    )


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """Add the choice of evaluation tasks."""
    parser.add_argument(
        "--tasks",
        type=task_names,
        default="hellaswag,winogrande",
        metavar="NAMES",
        help="tasks, separated by commas (default: %(default)s)",
    )


def add_marks(parser: argparse.ArgumentParser) -> None:
    """Add what marks items of an evaluation, and the format of its files."""
    parser.add_argument(
        "--overlap",
        type=Path,
        metavar="REPORT",
        help="mark the items that occur in the training text, by the JSON of `aurora data overlap`, and show scores "
        "without them",
    )
    parser.add_argument(
        "--subset",
        action="append",
        metavar="NAME[=FILE]",
        help="also show scores on a subset of the items: goldenswag from the Hub, or a list of items in a file (.txt, "
        ".jsonl, .parquet); TASK:NAME=FILE for other tasks than hellaswag; may be repeated",
    )
    parser.add_argument(
        "--format",
        choices=("aurora", "lm-eval"),
        default="aurora",
        help="layout of the files; lm-eval: results_*.json and samples_*.jsonl, as the lm_eval command writes them "
        "(default: %(default)s)",
    )


def task_names(text: str) -> list[str]:
    """Names separated by commas; a comma too many does no harm."""
    return [name.strip() for name in text.split(",") if name.strip()]


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text) if text.isdecimal() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return value


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, got {text!r}")
    return value


def above_0(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value
