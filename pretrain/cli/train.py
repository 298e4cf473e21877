"""``aurora train``: train, or resume a run."""

from __future__ import annotations

import argparse
import warnings
from typing import TYPE_CHECKING

from pretrain.cli.arguments import add_config, positive
from pretrain.processes.environment import world
from pretrain.processes.exit_timer import exit_timer
from pretrain.processes.failures import note_ready
from pretrain.processes.parent import process_age
from pretrain.processes.signals import NOTICE, StopRequests, stop_requests

if TYPE_CHECKING:
    from pretrain.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "train",
        help="train a model, or resume a run",
        description="Train the model that CONFIG describes. If the run already has a checkpoint, training resumes "
        "from the newest one. SIGINT (Ctrl-C), SIGTERM, SIGHUP, SIGUSR1 and a file named STOP in the run folder stop "
        "the run after the current step, with a checkpoint; the same command then continues it. A second signal ends "
        "it immediately. To use several machines, start this verb with torchrun or with "
        "slurm/pretrain.sbatch.",
    )
    add_config(parser)
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: resume from the run's newest intact checkpoint, if there is one; never: fail if the run exists; "
        "PATH: resume from this checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--extend",
        action="store_true",
        help="continue a run, finished or not, to a larger train.total_tokens; everything else must be as before, "
        "except that schedule.decay_start_tokens may move with the end",
    )
    parser.add_argument(
        "--stop-at", type=positive, metavar="STEP", help="save a checkpoint after this step and exit with code 75"
    )
    parser.add_argument(
        "--profile",
        type=_steps,
        metavar="STEPS",
        help="record these steps, for example 10 or 10-12, with torch's profiler; the traces are written into "
        "profile/ of the run folder",
    )
    parser.add_argument(
        "--processes",
        type=positive,
        default=1,
        metavar="N",
        help="data-parallel processes to start on this machine, one per GPU if there are GPUs (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train in this process, or start several."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.config import load_config
    from pretrain.processes.environment import LaunchError
    from pretrain.processes.torchrun import run_processes

    if options.extend and options.resume == "never":
        raise LaunchError("--extend continues a run, and --resume never refuses to: leave one of them out")
    if options.processes > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first process repeats them
            load_config(options.config, options.overrides)  # report problems once, before any process starts
        stop = [] if options.stop_at is None else ["--stop-at", str(options.stop_at)]
        profile = [] if options.profile is None else ["--profile", "{}-{}".format(*options.profile)]
        extend = ["--extend"] if options.extend else []
        more = [*stop, *profile, *extend]
        arguments = ["train", options.config, *options.overrides, "--resume", options.resume, *more]
        return run_processes(options.processes, arguments)

    requests = StopRequests(age=process_age())
    notice = NOTICE if world().rank == 0 else None
    with exit_timer(requests), stop_requests(requests, notice, first_only=True):
        note_ready()
        # Imported here: the parent of several processes does not train.
        from pretrain.launch import train

        config = load_config(options.config, options.overrides)
        extend, profile = options.extend, options.profile
        return train(config, options.resume, options.stop_at, extend=extend, profile=profile, requests=requests)


def _steps(text: str) -> tuple[int, int]:
    """A step, or the first and the last one: ``10`` or ``10-12``."""
    first, dash, last = text.partition("-")
    try:
        found = positive(first), positive(last if dash else first)
    except argparse.ArgumentTypeError:
        found = (1, 0)
    if found[1] < found[0]:
        raise argparse.ArgumentTypeError(f"expected a step or a range such as 10-12, got {text!r}")
    return found
