"""Config section `run`: the run's name, its folder, and its seed."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from pretrain.config.base import EXECUTION, NOTE, NUMERICS, RESULT, Section
from pretrain.config.fields import NonNegativeFloat, NonNegativeInt, PositiveFloat


def valid_run_name(name: str) -> str:
    """Return `name` if it can name a folder; ValueError otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) or ".." in name or name == ".":
        raise ValueError("expected 1 to 64 of letters, digits, '.', '_' and '-', without '..'")
    return name


class RunConfig(Section):
    """The run's name, its folder, and its seed."""

    name: Annotated[str, AfterValidator(valid_run_name), NOTE]
    """The run's name. The run folder is `<root>/<name>`, and wandb shows the name."""

    root: Annotated[str, Field(min_length=1), EXECUTION] = "runs"
    """The folder that holds the run folders, relative to where the command is started."""

    seed: Annotated[NonNegativeInt, RESULT] = 0
    """Seed of the initial weights and of every random generator. The order of the data has a seed of its own,
    `data.seed`, so that seeds can be compared on the same batches."""

    deterministic: Annotated[bool, NUMERICS] = False
    """Ask torch for deterministic kernels (`torch.use_deterministic_algorithms`). On CPUs runs repeat bit for bit
    without it; on GPUs it may cost speed."""

    max_seconds: Annotated[PositiveFloat | None, EXECUTION] = None
    """Save and exit with code 75 so early that the process has ended this many seconds after it was started; the same
    command continues. The run learns from its own steps, validations and saves how much time to leave. null: no limit.
    In a Slurm job the job's time limit (SLURM_JOB_END_TIME) counts as well, whatever is set here."""

    stop_seconds: Annotated[PositiveFloat, EXECUTION] = 600.0
    """How long a run may take to finish its step and save after it was asked to stop. After that the process prints
    where each of its threads waits, and exits with code 1; earlier checkpoints are untouched."""

    lock_wait_seconds: Annotated[NonNegativeFloat, EXECUTION] = 600.0
    """How long to wait for an earlier attempt of the same Slurm job that still trains in the run folder, for example on
    a node that Slurm has given up. It is asked to save and stop. Any other process that trains there is an error."""
