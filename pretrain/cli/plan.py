"""``aurora plan``: what a run on a cluster would cost."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from pretrain.cli.arguments import add_config, positive, share

if TYPE_CHECKING:
    from pretrain.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "plan",
        help="estimate memory, traffic and time of a run on a cluster",
        description="Estimate what a run on a cluster would take: which rank owns which matrices, how much the ranks "
        "exchange, memory per rank, time and GPU hours. Starts nothing, needs no GPU and uses no network.",
    )
    add_config(parser)
    parser.add_argument("--ranks", type=positive, required=True, metavar="N", help="GPUs, with one process each")
    parser.add_argument(
        "--gpus-per-node", type=positive, default=8, metavar="N", help="GPUs on each machine (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        default="h100",
        metavar="NAME",
        help="a100-40gb, a100, h100, h200, b200, mi300x or cpu (default: %(default)s)",
    )
    parser.add_argument(
        "--mfu",
        type=share,
        default=0.4,
        metavar="SHARE",
        help="assumed share of the device's peak that training reaches (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.config import ConfigError, load_config
    from pretrain.planning.cluster import DEVICES, as_json, dry_run, format_plan, plan_run

    if options.device not in DEVICES:
        raise ConfigError([f"--device: expected one of {', '.join(DEVICES)}, got {options.device!r}"])
    config = load_config(options.config, options.overrides)
    plan = plan_run(config, options.ranks, DEVICES[options.device], options.mfu)
    covered = dry_run(config, options.ranks)
    if options.json:
        print(json.dumps(as_json(plan), indent=1))
        return 0
    print("\n".join(format_plan(plan, options.gpus_per_node)))
    if plan.matrices is not None:
        print("\n".join(plan.matrices.table()))
        print(f"dry run   the optimizers of {options.ranks} ranks: {len(covered)} matrices, each covered exactly once")
    return 0
