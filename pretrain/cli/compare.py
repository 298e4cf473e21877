"""``aurora compare``: whether models differ on the items that they were evaluated on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.cli.arguments import positive, task_names

if TYPE_CHECKING:
    from pretrain.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "compare",
        help="compare evaluation results, paired by item",
        description="Compare results of `aurora eval` with the first one, paired by item: difference with interval, "
        "exact test, test of equivalence, and a verdict per task: different, equivalent or undecided. Verdicts cover "
        "the choice of items, not training seeds.",
    )
    parser.add_argument(
        "results",
        metavar="RESULT",
        nargs="+",
        help="a result file or the folder that --out named, at least two; NAME=RESULT gives the model a name",
    )
    parser.add_argument("--tasks", type=task_names, metavar="NAMES", help="tasks, separated by commas (default: all)")
    parser.add_argument(
        "--metric",
        choices=("auto", "acc", "acc_norm"),
        default="auto",
        help="what to compare; auto: acc_norm where the task has it, otherwise acc (default: %(default)s)",
    )
    parser.add_argument(
        "--margin",
        type=_margin,
        default=0.02,
        metavar="M",
        help="differences of scores below M count as equivalent (default: %(default)s, 2 percentage points)",
    )
    parser.add_argument(
        "--format",
        choices=("text", "markdown", "csv", "latex", "json"),
        default="text",
        help="how to print the comparison (default: %(default)s)",
    )
    parser.add_argument(
        "--examples",
        type=positive,
        metavar="N",
        help="also show up to N items that the model wins and N that it loses, for each task; not with --format csv",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the comparison."""
    # Imported here: `aurora --help` loads no numpy.
    from eval.compare import compare
    from eval.compare_tables import render
    from eval.errors import EvalError

    if options.examples and options.format == "csv":
        raise EvalError("--format csv has one line per task, so it has no place for --examples; use --format json")
    named = [_named(word) for word in options.results]
    comparison = compare(
        [path for _, path in named],
        tasks=options.tasks,
        metric=options.metric,
        margin=options.margin,
        labels=[label for label, _ in named],
    )
    if options.examples:
        # Loads torch and lm-eval, for the texts of the items.
        from eval.flips import flipped_items

        comparison["flips"] = flipped_items(comparison, options.examples)
    sys.stdout.write(render(comparison, options.format))
    return 0


def _named(word: str) -> tuple[str | None, Path]:
    """Split NAME=RESULT; a path that exists is not split."""
    label, separator, path = word.partition("=")
    if Path(word).exists() or not separator or not label or not path:
        return None, Path(word)
    return label, Path(path)


def _margin(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a difference of scores above 0 and below 1, got {text!r}")
    return value
