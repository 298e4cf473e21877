"""``aurora compare``: whether models differ on the items that they were evaluated on."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from pretrain.cli.arguments import add_margin, positive, task_names

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
        help="what to compare; auto: the metric that the task is reported by (default: %(default)s)",
    )
    add_margin(parser)
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
    from pretrain.files import named_path

    if options.examples and options.format == "csv":
        raise EvalError("--format csv has one line per task, so it has no place for --examples; use --format json")
    named = [named_path(word) for word in options.results]
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
