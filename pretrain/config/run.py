"""Config section `run`: what the run is called, where it lives, and its seed."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field

from pretrain.config.base import Section
from pretrain.config.fields import NonNegativeInt


def valid_run_name(name: str) -> str:
    """The name, if it can be a folder's; ValueError otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) or ".." in name or name == ".":
        raise ValueError("expected 1 to 64 of letters, digits, '.', '_' and '-', without '..'")
    return name


class RunConfig(Section):
    """Name, place and seed of a run."""

    name: Annotated[str, AfterValidator(valid_run_name)]
    """The run's name: its folder is `<root>/<name>`, and wandb shows it."""

    root: Annotated[str, Field(min_length=1)] = "runs"
    """Folder that holds the run folders, relative to where the command is started."""

    seed: NonNegativeInt = 0
    """Seed of the initial weights and of every random generator. The order of the data has
    its own, `data.seed`, so that seeds can be compared on the same batches."""

    deterministic: bool = False
    """Ask torch for deterministic kernels (`torch.use_deterministic_algorithms`). On CPUs runs
    repeat bit for bit without it; on GPUs it may cost speed."""
