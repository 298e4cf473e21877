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


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add RUN, as `path`."""
    parser.add_argument("path", metavar="RUN", type=Path, help="the folder of a run")


def add_run_or_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add RUN_OR_CHECKPOINT, as `path`."""
    parser.add_argument("path", metavar="RUN_OR_CHECKPOINT", type=Path, help="the folder of a run or a checkpoint")


def add_tasks(parser: argparse.ArgumentParser) -> None:
    """Add the choice of evaluation tasks."""
    parser.add_argument(
        "--tasks",
        type=task_names,
        default="hellaswag,winogrande",
        metavar="NAMES",
        help="tasks, separated by commas (default: %(default)s)",
    )


def add_margin(parser: argparse.ArgumentParser) -> None:
    """Add the margin of the test of equivalence."""
    parser.add_argument(
        "--margin",
        type=_margin,
        default=0.02,
        metavar="M",
        help="differences of scores below M count as equivalent (default: %(default)s, 2 percentage points)",
    )


def named_path(word: str) -> tuple[str | None, Path]:
    """Split NAME=PATH; a path that exists is not split."""
    label, separator, path = word.partition("=")
    if Path(word).exists() or not separator or not label or not path:
        return None, Path(word)
    return label, Path(path)


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


def _margin(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a difference of scores above 0 and below 1, got {text!r}")
    return value
