"""Pretraining: config, model, data stream, engine, trainer, checkpoints and export.

`train` is what other Python programs call. Importing this package loads no torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.config import Config

__all__ = ["train"]


def train(
    config: Config | str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    resume: str = "auto",
    stop_at: int | None = None,
) -> int:
    """Train a run, as ``aurora train`` does; works in a thread and in a notebook.

    Args:
        config: a config, or the path of its YAML file.
        overrides: ``section.key=value`` each; they take precedence over a file's values, and need a file.
        resume: ``auto``, ``never``, or a checkpoint's folder.
        stop_at: save and stop after this step.

    Returns:
        The exit code: 0 done, 75 stopped with a checkpoint saved.

    Raises:
        UserError: bad input, before any training.
        TypeError: overrides of a config that is not a file.
        Exception: training failed; saved checkpoints are untouched.
    """
    # Imported here: the package itself loads no torch.
    from pretrain.config import Config, load_config
    from pretrain.launch import train as train_config
    from pretrain.processes.environment import set_defaults

    set_defaults()
    if not isinstance(config, Config):
        config = load_config(Path(config), overrides)
    elif overrides:
        raise TypeError("overrides need the path of a config file: a Config is validated as a whole")
    return train_config(config, resume, stop_at)
