"""``aurora compare-page``: write the page that compares models, measured scores next to published ones."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.cli.arguments import add_margin

if TYPE_CHECKING:
    from pretrain.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "compare-page",
        help="write the page that compares the models of an evaluation with published figures",
        description="Write one HTML and one Markdown page about the models of an evaluation's config: scores measured "
        "here next to published ones with their sources, paired differences, tokens, parameters, training FLOPs, and "
        "the data efficiency that claims imply. A model without a result appears as not run.",
    )
    parser.add_argument("config", metavar="CONFIG", type=Path, help="the YAML file whose `models` are compared")
    parser.add_argument(
        "results",
        metavar="RESULTS",
        nargs="*",
        help="folders that contain LABEL/results.json, as --out of `aurora eval CONFIG` has it, or LABEL=RESULT",
    )
    parser.add_argument(
        "--facts",
        metavar="FILE",
        type=Path,
        help="the YAML file of published figures (default: the file of the same name in the folder `facts` next to "
        "CONFIG, if there is one)",
    )
    add_margin(parser)
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="the folder for comparison.html and comparison.md"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the pages and print where they are."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from eval.compare_tables import markdown_text
    from pretrain.cli.compared_models import measured_models, models_of, result_files
    from pretrain.comparison.facts import Facts, read_facts
    from pretrain.comparison.write import write_comparison
    from pretrain.shipped import locate

    models = models_of(options.config)
    file = options.facts or Path(locate(str(options.config.parent / "facts" / options.config.name)))
    facts = read_facts(file, models) if options.facts or file.exists() else Facts()
    files = result_files(models, options.results)
    measured = measured_models(models, files, facts.claims, options.margin)
    for path in write_comparison(facts, measured, options.out, markdown_text):
        print(path)
    return 0
