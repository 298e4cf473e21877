"""``aurora sweep``: run many configs, or show their progress."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.cli.arguments import positive

if TYPE_CHECKING:
    from pretrain.cli.arguments import Verbs
    from pretrain.sweep import Sweep


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "sweep",
        help="run many configs, or show how far they are",
        description="Run every job of a sweep that is not complete, or show the state of each job. A sweep can be "
        "stopped or killed and started again: complete runs are not repeated, the others resume from their "
        "checkpoints.",
    )
    parser.add_argument(
        "action",
        nargs="?",
        choices=("run", "status"),
        default="run",
        help="run the jobs, or show their state (default: %(default)s)",
    )
    parser.add_argument("sweep", metavar="SWEEP", type=Path, help="a YAML file (see pretrain/sweep/definition.py)")
    parser.add_argument(
        "--jobs",
        type=positive,
        metavar="N",
        help="runs at the same time, each with one GPU or one thread (default: the number of GPUs, or of cores if "
        "there are no GPUs)",
    )
    parser.add_argument(
        "--index",
        type=int,
        metavar="I",
        help="run only the job with this number, as `status` lists them; for job arrays",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the sweep, one job of it, or print its state."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.sweep import format_status, run_job, run_sweep

    sweep = read_sweep(options.sweep)
    if options.action == "status":
        print("\n".join(format_status(sweep)))
        return 0
    return run_sweep(sweep, options.jobs) if options.index is None else run_job(sweep, options.index)


def read_sweep(path: Path) -> Sweep:
    """Load a sweep's file, with its claims checked."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.report.claims import claim_problems
    from pretrain.sweep import load_sweep

    return load_sweep(path, claim_problems)
