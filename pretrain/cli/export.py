"""``aurora export``: write a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.cli.arguments import add_run_or_checkpoint

if TYPE_CHECKING:
    from pretrain.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "export",
        help="write a Hugging Face folder",
        description="Write the weights of a checkpoint as a Hugging Face folder, with tokenizer and model card. "
        "Given a run, exports its newest checkpoint.",
    )
    add_run_or_checkpoint(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; an earlier export is replaced")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Export."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.export.run import export_checkpoint

    reader = export_checkpoint(options.path, options.out)
    print(f"exported {reader.folder} to {options.out}")
    return 0
