"""The choice of the checkpoint to start from, and the removal of what was written after it."""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoint.format import CheckpointError
from pretrain.checkpoint.store import CheckpointReader, list_checkpoints, newest_intact, recover_replaced
from pretrain.files import set_aside
from pretrain.run.folder import RunError, RunFolder
from pretrain.run.identity import Identity


def choose_checkpoint(
    folder: RunFolder, resume: str, identity: Identity, *, extend: bool = False
) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to start from, or None for a fresh start, and warnings.

    Args:
        folder: the run folder.
        resume: ``auto`` (the newest intact checkpoint, if any), ``never``, or the folder of a checkpoint.
        identity: identity of the run that is about to start.
        extend: the run is to be extended; see `Identity.check`.

    Raises:
        RunError: the run folder contains a different run, or any run if `resume` is ``never``; or there is no run to
            extend.
        CheckpointError: the requested checkpoint is damaged, or all checkpoints are.
    """
    recover_replaced(folder.checkpoints)
    if resume == "never":
        if folder.manifest() or list_checkpoints(folder.checkpoints):
            raise RunError(
                f"{folder.path}: already holds a run; continue it with --resume auto, or choose another run.name"
            )
        return None, []
    launched = Identity.of_run(folder)
    repairable = folder.repairable
    if extend and launched is None:
        raise RunError(f"{folder.path}: --extend continues a run, and there is none here; start it without --extend")
    notes = identity.check(launched, folder.path, repairable=repairable, extend=extend) if launched else []
    if resume != "auto":
        reader = CheckpointReader(Path(resume))
        reader.verify()
        return reader.folder, identity.check_checkpoint(reader, repairable, extend=extend)
    newest, damaged = newest_intact(folder.checkpoints)
    if newest is None and damaged:
        raise CheckpointError("\n".join([*damaged, f"{folder.checkpoints}: no intact checkpoint to resume from"]))
    if newest is None:
        return None, notes
    notes = identity.check_checkpoint(newest, repairable, extend=extend)
    return newest.folder, notes + [f"{message}; falling back to {newest.folder.name}" for message in damaged]


def rewind(folder: RunFolder, step: int) -> int:
    """Move the metrics and checkpoints after `step` aside; return the number of metrics lines moved."""
    for checkpoint in list_checkpoints(folder.checkpoints):
        if int(checkpoint.name.removeprefix("step-")) > step:
            set_aside(checkpoint)
    return folder.metrics.discard_after(step)
