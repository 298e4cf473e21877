"""Which checkpoint a launch starts from, and what it sets aside before it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pretrain.checkpoint.format import CheckpointError
from pretrain.checkpoint.store import CheckpointReader, list_checkpoints, newest_intact
from pretrain.files import set_aside
from pretrain.run.folder import RunError, RunFolder, check_identity


def choose_checkpoint(folder: RunFolder, resume: str, identity: dict[str, Any]) -> tuple[Path | None, list[str]]:
    """The checkpoint to start from, or None for a fresh start, and warnings.

    Args:
        folder: the run's.
        resume: ``auto`` (the newest intact checkpoint, if any), ``never``, or a checkpoint's folder.
        identity: of the run that is about to start.

    Raises:
        RunError: the run folder holds another run, or any run under ``never``.
        CheckpointError: the wanted checkpoint, or every one, is damaged.
    """
    manifest = folder.manifest()
    if resume == "never":
        if manifest or list_checkpoints(folder.checkpoints):
            raise RunError(
                f"{folder.path}: already holds a run; continue it with --resume auto, or choose another run.name"
            )
        return None, []
    if manifest:
        check_identity(manifest["identity"], identity, folder.path)
    if resume != "auto":
        reader = CheckpointReader(Path(resume))
        reader.verify()
        check_identity(reader.index["identity"], identity, reader.folder)
        return reader.folder, []
    newest, damaged = newest_intact(folder.checkpoints)
    if newest is None and damaged:
        raise CheckpointError("\n".join([*damaged, f"{folder.checkpoints}: no intact checkpoint to resume from"]))
    if newest is None:
        return None, []
    check_identity(newest.index["identity"], identity, newest.folder)
    return newest.folder, [f"{message}; falling back to {newest.folder.name}" for message in damaged]


def rewind(folder: RunFolder, step: int) -> int:
    """Set aside the metrics and checkpoints past `step`; returns how many metric lines there were."""
    for checkpoint in list_checkpoints(folder.checkpoints):
        if int(checkpoint.name.removeprefix("step-")) > step:
            set_aside(checkpoint)
    return folder.metrics.discard_after(step)
