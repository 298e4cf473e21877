"""The sources of a config, for the verbs that look at them, and the files that these verbs write."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.config import Config
    from pretrain.data import Catalog


def open_sources(options: argparse.Namespace) -> tuple[Config, Catalog]:
    """Load the config of a verb and describe its sources.

    Remote sources are those of the lock, as in training; without a lock they are resolved now.

    Raises:
        ConfigError: the config is not valid.
        DataError: a source cannot be read, or the lock does not fit.
    """
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.config import load_config
    from pretrain.data import make_catalog
    from pretrain.run.data_lock import lock_of_check
    from pretrain.run.folder import RunFolder

    config = load_config(options.config, options.overrides)
    locked = lock_of_check(config.data, RunFolder(config.run_folder), online=True)
    return config, make_catalog(config.data, locked)


def refuse_unwritable(path: Path) -> None:
    """Make the folder of a file that is written after long work, and find out before it whether that will work.

    Raises:
        DataError: the file cannot be written.
    """
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.data import DataError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error}") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        reason = "is a folder" if path.is_dir() else f"{path.parent} is not writable"
        raise DataError(f"{path}: cannot be written: {reason}: name another file")
