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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from pretrain.checkpoint.store import list_checkpoints
from pretrain.cli.arguments import positive
from pretrain.cli.command import parse
from pretrain.cli.sweep import read_sweep
from pretrain.config import load_config
from pretrain.files import now
from pretrain.processes.failures import report
from pretrain.run.folder import RunError, RunFolder
from pretrain.slurm.supervisor import Job, JobError, Supervisor, Work
from pretrain.sweep import plan_jobs


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the batch step; return the exit code of the job."""
    parser = argparse.ArgumentParser(
        prog="python -m pretrain.cli.slurm_job", description="Run the batch step of a job."
    )
    parser.add_argument(
        "--ranks", type=positive, default=1, help="processes on all nodes together (default: %(default)s)"
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    end = given.index("--") if "--" in given else len(given)
    options, command = parser.parse_args(given[:end]), given[end + 1 :]
    say = functools.partial(print, flush=True)
    try:
        job = Job.from_environment(os.environ)
        return Supervisor(job, _work_of(command, options.ranks), say).run(command)
    except BaseException as error:
        return report(error)


def _work_of(command: Sequence[str], ranks: int) -> Work:
    """What a command does; its config or its sweep is validated.

    Raises:
        UserError: the config or the sweep is not valid, or the command is not one of ours.
    """
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
        return _work_on(config.run.name, lambda: [config.run_folder])
    if hasattr(options, "sweep"):
        sweep = read_sweep(options.sweep)
        chosen = slice(None) if options.index is None else slice(options.index, options.index + 1)

        def folders() -> list[Path]:
            """Of the runs as they are planned now: the values of later ones are chosen by earlier ones."""
            return [job.config.run_folder for job in plan_jobs(sweep)[chosen] if job.config]

        folders()  # an invalid sweep is refused here
        return _work_on(sweep.file.name, folders)
    first = Path(options.models[0])
    if options.every_checkpoint and first.suffix in (".yaml", ".yml"):
        raise JobError(f"--every-checkpoint: expected a run, got {first}")
    out = options.out or first / "eval"
    return Work(f"eval-{first.name}", lambda: _results(out) if options.every_checkpoint else 0)


def _results(out: Path) -> int:
    """How many checkpoints have been evaluated."""
    return sum(1 for _ in out.glob("step-*/results.json"))


def _work_on(name: str, folders: Callable[[], Iterable[Path]]) -> Work:
    """Work that trains in run folders, from now on."""
    began = now()
    return Work(
        name,
        lambda: _last_step(folders()),
        lambda: any(_near_limit(RunFolder(folder), began) for folder in folders()),
    )


def _last_step(folders: Iterable[Path]) -> int:
    """Step of the newest complete checkpoint; the sum over several runs."""
    newest = [list_checkpoints(RunFolder(folder).checkpoints)[-1:] for folder in folders]
    return sum(int(path.name.removeprefix("step-")) for found in newest for path in found)


def _near_limit(folder: RunFolder, began: str) -> bool:
    """Whether the run has recorded, since `began`, that it stopped because the job's time limit was near.

    The record of an earlier attempt stays until the next one trains, which a stop may prevent.
    """
    try:
        stopped = (folder.manifest() or {}).get("stopped")
    except RunError:
        return False
    if not isinstance(stopped, dict):
        return False
    return "time limit of the Slurm job" in str(stopped.get("reason")) and str(stopped.get("time", "")) >= began


if __name__ == "__main__":
    sys.exit(main())
