"""``aurora report``: write the HTML page of a run, of several runs, or of a sweep."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.cli.sweep import read_sweep

if TYPE_CHECKING:
    from pretrain.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "report",
        help="write the HTML page of a run, of several runs, or of a sweep",
        description="Write one self-contained HTML page about a run, several runs, or a sweep, finished or not, and "
        "its numbers as JSON next to it. Several runs are compared with the first one. The page shows the results that "
        "`aurora eval --out RUN/eval/NAME` has written, with paired differences between runs.",
    )
    parser.add_argument(
        "paths",
        metavar="PATH",
        type=Path,
        nargs="+",
        help="the folder of a run or a sweep, or a sweep's file; or the folders of several runs",
    )
    parser.add_argument(
        "--out", metavar="FILE", type=Path, help="the page to write (default: PATH/report.html; several runs need it)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the report and print where it is."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.cli.evaluated_runs import evaluations
    from pretrain.report.write import write_report

    paths = [read_sweep(path).folder if path.suffix in (".yaml", ".yml") else path for path in options.paths]
    print(write_report(paths, options.out, evaluations))
    return 0
