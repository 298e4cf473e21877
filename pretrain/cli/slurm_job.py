"""The batch step of a job under Slurm, which the scripts in `slurm/` start.

    python -m pretrain.cli.slurm_job [--ranks N] -- srun ... -m pretrain VERB ARGUMENTS

What comes after ``-m pretrain`` is a command of `aurora`; it is parsed and its config validated here, on one node and
before anything else starts.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from pretrain.checkpoint.store import list_checkpoints
from pretrain.cli.arguments import positive
from pretrain.cli.command import parse
from pretrain.cli.sweep import read_sweep
from pretrain.config import load_config
from pretrain.processes.failures import report
from pretrain.run.folder import RunFolder
from pretrain.slurm.supervisor import Job, JobError, Supervisor
from pretrain.sweep import plan_jobs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the batch step; return the exit code of the job."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.cli.slurm_job", description="Run the batch step of a job."
    )
    parser.add_argument("--ranks", type=positive, default=1, help="processes on all nodes together")
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    options, command = parser.parse_args(given[:end]), given[end + 1 :]
    say = functools.partial(print, flush=True)
    try:
        job = Job.from_environment(os.environ)
        name, last_step = _work_of(command, options.ranks)
        return Supervisor(job, last_step, say).run(command, name)
    except BaseException as error:
        return report(error)


def _work_of(command: Sequence[str], ranks: int) -> tuple[str, Callable[[], int]]:
    """What the work is called, and a function that returns the step of its newest checkpoint."""
    try:
        start = next(i for i in range(len(command) - 1) if tuple(command[i : i + 2]) == ("-m", "pretrain"))
    except StopIteration:
        raise JobError("expected a command with -m pretrain VERB, got none") from None
    options = parse(command[start + 2 :])
    if hasattr(options, "stop_at"):  # train
        if options.processes > 1:
            raise JobError("--processes: not under Slurm; AURORA_PROCESSES_PER_NODE says how many a node starts")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the first rank repeats them
            config = load_config(options.config, options.overrides)
        config.accumulation(ranks)
        return config.run.name, lambda: _last_step([config.run_folder])
    if hasattr(options, "sweep"):
        sweep = read_sweep(options.sweep)
        folders = [job.config.run_folder for job in plan_jobs(sweep) if job.config]
        chosen = folders if options.index is None else folders[options.index : options.index + 1]
        return sweep.file.name, lambda: _last_step(chosen)
    return f"eval-{Path(options.model).name}", lambda: 0


def _last_step(folders: Sequence[Path]) -> int:
    """Step of the newest complete checkpoint; the sum over several runs."""
    newest = [list_checkpoints(RunFolder(folder).checkpoints)[-1:] for folder in folders]
    return sum(int(path.name.removeprefix("step-")) for found in newest for path in found)


if __name__ == "__main__":
    sys.exit(main())
