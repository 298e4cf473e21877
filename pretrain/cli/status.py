"""``aurora status``: how runs are doing."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "status",
        help="show how runs are doing",
        description="Show the step, tokens, rate, time left, newest checkpoint, restarts and health of a run, or of "
        "all runs below a folder. Only reads; may be called while runs train.",
    )
    parser.add_argument(
        "path",
        nargs="?",
        default=Path("runs"),
        type=Path,
        metavar="RUN|ROOT",
        help="a run folder, or a folder that holds some (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects, one for each run")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the table."""
    # Imported here: `aurora --help` loads no library.
    from pretrain.run.folder import RunError
    from pretrain.run.status import as_json, find_runs, format_statuses, read_status

    paths = find_runs(options.path)
    if not paths:
        raise RunError(f"{options.path}: holds no run; expected a run folder, or a folder of run folders")
    statuses = [read_status(path) for path in paths]
    print(json.dumps(as_json(statuses), indent=1) if options.json else "\n".join(format_statuses(statuses)))
    return 0
