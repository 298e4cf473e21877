"""``aurora slurm``: check a config where jobs are submitted, and submit it."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.cli.arguments import add_config, positive

if TYPE_CHECKING:
    from pretrain.cli.arguments import Verbs
    from pretrain.config import Config
    from pretrain.slurm.submission import Submission


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "slurm",
        help="check a config and submit it to Slurm",
        description="Check a config, its data, its lock of remote data and what it takes (see `check` and `plan`), "
        "then submit it with slurm/pretrain.sbatch, so that mistakes are found before the job has waited in the queue. "
        "Prints the command and where to look. Uses no network besides Slurm's.",
    )
    add_config(parser)
    parser.add_argument("--nodes", type=positive, required=True, metavar="N", help="machines")
    parser.add_argument(
        "--gpus-per-node",
        type=_count,
        default=8,
        metavar="N",
        help="GPUs on each machine, with one process each; 0: one process on each machine, without GPUs "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--device", default="h100", metavar="NAME", help="the GPUs, as `aurora plan` knows them (default: %(default)s)"
    )
    parser.add_argument(
        "--time", metavar="LIMIT", help="time limit, for example 24:00:00 (default: that of the partition)"
    )
    parser.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="OPTION",
        help="another option of sbatch, for example --sbatch=--partition=h100; may be repeated",
    )
    parser.add_argument("--stop-at", type=positive, metavar="STEP", help="save after this step and stop")
    parser.add_argument("--extend", action="store_true", help="continue a complete run whose budget has grown")
    parser.add_argument("--dry-run", action="store_true", help="check and print everything, submit nothing")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check, submit, and print where to look."""
    environment = dict(os.environ)  # as it was given: torch adds a folder for caches, which the script chooses itself
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.config import load_config
    from pretrain.shipped import locate, shipped
    from pretrain.slurm.submission import Submission

    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        config = load_config(options.config, options.overrides)
    more = [] if options.stop_at is None else ["--stop-at", str(options.stop_at)]
    more += ["--extend"] if options.extend else []
    submission = Submission(
        script=shipped("slurm/pretrain.sbatch"),
        arguments=[locate(options.config), *options.overrides, *more],
        name=config.run.name,
        nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        time=options.time,
        options=_sbatch_options(options.sbatch),
        environment=_environment(),
    )
    lines = [
        *_check(config, submission, options.device, options.extend),
        *(f"warning: {warning.message}" for warning in noted),
    ]
    print("\n".join(dict.fromkeys(lines)))
    assigned = [f"{name}={shlex.quote(value)}" for name, value in submission.environment.items()]
    print(f"command   {' '.join([*assigned, shlex.join(submission.command())])}", flush=True)
    if options.dry_run:
        print("not submitted: --dry-run")
        return 0
    job = submission.submit(environment)
    print(f"submitted job {job}")
    print(
        f"queue     squeue --job {job}\n"
        f"output    slurm-{job}.out, unless --output says otherwise\n"
        f"logs      logs/slurm/{job}: a file for each rank, the checks of the nodes, every start and why it ended\n"
        f"run       {config.run_folder}: metrics and checkpoints\n"
        f"pause     scancel --signal=USR1 --batch {job} saves, and the job waits in the queue again\n"
        f"stop      scancel --signal=TERM {job} saves and ends the job; the same command continues the run"
    )
    return 0


def _check(config: Config, submission: Submission, device: str, extend: bool) -> list[str]:
    """Check everything that would end the job after it has waited; return what there is to know.

    Raises:
        UserError: with what is wrong.
    """
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.checkpoint.mirror import check_library
    from pretrain.cli.check import (
        check_ancestor,
        check_config_inputs,
        check_earlier_launches,
        check_webhook,
        remote_lines,
    )
    from pretrain.data.budget import describe_data
    from pretrain.planning import report
    from pretrain.planning.cluster import plan_run
    from pretrain.run.folder import RunFolder
    from pretrain.run.reader import read_run
    from pretrain.slurm.submission import SubmissionError

    config.accumulation(submission.ranks)
    run = read_run(config.run_folder)
    if run.state == "done" and not extend:
        raise SubmissionError(f"{run.path}: this run is complete; choose another run.name, or add --extend")
    if RunFolder(config.run_folder).is_locked():
        raise SubmissionError(f"{run.path}: another process is training in this run folder; wait for it or stop it")
    check_webhook(config)
    if config.checkpoint.mirror is not None:
        check_library(config.checkpoint.mirror)
    inputs = check_config_inputs(config, online=False)
    unlocked = [source.path for source in inputs.catalog.sources if source.pinned is not None and not source.files]
    if unlocked:
        raise SubmissionError(
            "\n".join(f"{path}: has no lock; write one here with `aurora data resolve`" for path in unlocked)
        )
    on_gpus = submission.gpus_per_node > 0
    name = device if on_gpus else "cpu"
    plan = plan_run(
        config, report.cluster_of(submission.ranks, name, max(1, submission.gpus_per_node), 0.4, None, None)
    )
    capacity = plan.cluster.device.memory
    if capacity is not None and plan.memory.peak > capacity:
        raise SubmissionError(
            f"the run does not fit: {plan.memory.peak / 1e9:.1f} GB at the peak of a step, and a GPU ({name}) has "
            f"{capacity / 1e9:.0f} GB; use more nodes, a higher engine.zero_stage or a smaller "
            "train.micro_batch_sequences, or name another --device"
        )
    lines = [*report.answer(plan), *describe_data(inputs.budgets), *remote_lines(inputs)]
    earlier = check_earlier_launches(config, inputs, extend=extend)
    notes = [*inputs.warnings, *check_ancestor(config, inputs), *earlier]
    return [*lines, *(f"warning: {line}" for line in notes)]


def _environment() -> dict[str, str]:
    """What the script needs to find this environment on the nodes."""
    default = Path.cwd() / ".venv"
    if "AURORA_VENV" in os.environ or Path(sys.prefix) == default:
        return {}
    return {"AURORA_VENV": sys.prefix}


def _sbatch_options(given: list[str]) -> list[str]:
    """Reject options after which sbatch would take the next word as the script."""
    from pretrain.slurm.submission import SubmissionError

    for option in given:
        if not option.startswith("--") or option == "--" or ("=" not in option and " " in option):
            raise SubmissionError(f"--sbatch: expected one option such as --sbatch=--partition=h100, got {option!r}")
    return given


def _count(text: str) -> int:
    """A whole number of at least 0."""
    return 0 if text == "0" else positive(text)
