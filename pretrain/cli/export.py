"""``aurora export``: write a Hugging Face folder."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.cli.arguments import add_run_or_checkpoint

if TYPE_CHECKING:
    from pretrain.cli.arguments import Verbs

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "export",
        help="write a Hugging Face folder",
        description="Write the weights of a checkpoint as a Hugging Face folder, with tokenizer and model card. "
        "Given a run, exports its newest checkpoint. If the run has evaluation results of that checkpoint in its "
        "folder eval/, the model card shows them.",
    )
    add_run_or_checkpoint(parser)
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; an earlier export is replaced")
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the weights; auto: that of the checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--shard-size",
        type=file_size,
        default="5GB",
        metavar="SIZE",
        help="largest size of a weights file, in bytes or as in 500MB or 5GB; a tensor is never split "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--licence",
        type=licence,
        metavar="ID",
        help="licence of the weights for the model card, as the Hub writes it, for example apache-2.0 (default: not "
        "stated)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Export."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    import torch

    from pretrain.cli.card_scores import card_scores
    from pretrain.export.run import export_checkpoint

    reader = export_checkpoint(
        options.path,
        options.out,
        dtype=None if options.dtype == "auto" else getattr(torch, options.dtype),
        max_shard_size=options.shard_size,
        licence=options.licence,
        scores_of=card_scores,
    )
    print(f"exported {reader.folder} to {options.out}")
    return 0


def file_size(text: str) -> int:
    """A number of bytes, with a decimal unit or without one."""
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?(|[KMGT]B)", text.upper().strip())
    size = int(float(match[1]) * UNITS[match[2]]) if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 500MB or 5GB, got {text!r}")
    return size


def licence(text: str) -> str:
    """The identifier of a licence."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}", text):
        raise argparse.ArgumentTypeError(f"expected an identifier such as apache-2.0, got {text!r}")
    return text.lower()
