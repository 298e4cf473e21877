"""``aurora plan``: what a run on a cluster would cost."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from pretrain.cli.arguments import above_0, add_config, positive, share

if TYPE_CHECKING:
    from pretrain.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "plan",
        help="estimate memory, traffic and time of a run on a cluster",
        description="Estimate what a run on a cluster would take: whether it fits, time and GPU hours, how much the "
        "ranks exchange, memory per rank. Starts nothing, needs no GPU and uses no network.",
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
        help="for example a100-40gb, a100, h100, h200, b200, mi300x or cpu (default: %(default)s)",
    )
    parser.add_argument(
        "--mfu",
        type=share,
        default=0.4,
        metavar="SHARE",
        help="assumed share of the device's peak that computing reaches (default: %(default)s)",
    )
    parser.add_argument(
        "--link-gbytes",
        type=above_0,
        metavar="N",
        help="GB/s that a GPU receives from other nodes (default: the device's, for example 50 for an H100)",
    )
    parser.add_argument(
        "--node-link-gbytes",
        type=above_0,
        metavar="N",
        help="GB/s that a GPU receives from its own node (default: the device's, for example 450 for an H100)",
    )
    parser.add_argument(
        "--compare",
        metavar="KEY=A,B,...",
        help="print one row for each value of a config key, for example engine.zero_stage=1,2,3",
    )
    parser.add_argument("--details", action="store_true", help="also print derived numbers, collectives and owners")
    parser.add_argument("--json", action="store_true", help="print all numbers as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.config import load_config
    from pretrain.planning import report
    from pretrain.planning.cluster import plan_run

    cluster = report.cluster_of(
        options.ranks,
        options.device,
        options.gpus_per_node,
        options.mfu,
        options.link_gbytes,
        options.node_link_gbytes,
    )
    if options.compare is not None:
        configs = report.variants(options.config, options.overrides, options.compare)
        lines, data = report.comparison(configs, cluster)
    else:
        plan = plan_run(load_config(options.config, options.overrides), cluster)
        lines, data = report.answer(plan), report.as_json(plan)
        lines += report.details(plan) if options.details else []
    print(json.dumps(data, indent=1) if options.json else "\n".join(lines))
    return 0
