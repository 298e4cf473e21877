"""What the command of a job does, and how far it is; loading this module takes torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pretrain.checkpoint.store import list_checkpoints
from pretrain.cli.command import parse
from pretrain.cli.sweep import read_sweep
from pretrain.config import load_config
from pretrain.run.folder import RunError, RunFolder
from pretrain.slurm.supervisor import JobError, Work
from pretrain.sweep import plan_jobs

BY_LIMIT = "time limit of the Slurm job"
"""Part of the reason that a run gives; see `pretrain.launch.time_budget`."""


def work_of(command: Sequence[str], ranks: int) -> Work:
    """What a command does; its config or its sweep is validated.

    Raises:
        UserError: the config or the sweep is not valid, or the command is not one of ours.
        SystemExit: the command cannot be parsed.
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
    if not hasattr(options, "models"):
        raise JobError(f"expected train, sweep run or eval as the work of a job, got {command[start + 2]}")
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
    before = {folder: _stop(RunFolder(folder)) for folder in folders()}

    def near_limit() -> bool:
        """Whether a run has recorded since then that it stopped because the job's time limit was near.

        The record of an earlier attempt stays until the next one trains, which a stop may prevent. Records are told
        apart by all that they say: the clock that dates them may have been set back.
        """
        now = {folder: _stop(RunFolder(folder)) for folder in folders()}
        return any(stop != before.get(folder) and BY_LIMIT in str(stop.get("reason")) for folder, stop in now.items())

    return Work(name, lambda: _last_step(folders()), near_limit)


def _last_step(folders: Iterable[Path]) -> int:
    """Step of the newest complete checkpoint; the sum over several runs."""
    newest = [list_checkpoints(RunFolder(folder).checkpoints)[-1:] for folder in folders]
    return sum(int(path.name.removeprefix("step-")) for found in newest for path in found)


def _stop(folder: RunFolder) -> dict[str, Any]:
    """What the manifest of a run records of its last stop; empty if nothing."""
    try:
        stopped = (folder.manifest() or {}).get("stopped")
    except RunError:
        return {}
    return stopped if isinstance(stopped, dict) else {}
