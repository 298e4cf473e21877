"""``aurora data``: look at data, and get it ready for a run. One module per sub-verb."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pretrain.cli.data import fetch, inspect, overlap, prepare, resolve, tokenizer

if TYPE_CHECKING:
    from pretrain.cli.arguments import Verbs

VERBS: tuple[Any, ...] = (inspect, resolve, fetch, prepare, tokenizer, overlap)
"""The modules of the sub-verbs, in the order of the help; each declares its arguments in ``add``."""


def add(verbs: Verbs) -> None:
    """Declare the verb and its sub-verbs."""
    parser = verbs.add_parser(
        "data",
        help="look at data, and get it ready for a run",
        description="Look at the data of a config, and get it ready for a run.",
    )
    inner = parser.add_subparsers(required=True, metavar="VERB", parser_class=type(parser), help="what to do")
    for verb in VERBS:
        verb.add(inner)
