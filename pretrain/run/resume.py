"""The choice of the checkpoint to start from, and the removal of what was written after it."""

from __future__ import annotations

from pathlib import Path

from pretrain.checkpoint.format import CheckpointError
from pretrain.checkpoint.store import (
    ALONE,
    CheckpointReader,
    list_checkpoints,
    newest_intact,
    recover_replaced,
    step_folders,
    step_of,
)
from pretrain.engine.ranks import Ranks
from pretrain.files import set_aside
from pretrain.run.folder import RunError, RunFolder
from pretrain.run.identity import Identity


def choose_checkpoint(
    folder: RunFolder, resume: str, identity: Identity, ranks: Ranks = ALONE, *, extend: bool = False
) -> tuple[Path | None, list[str]]:
    """Return the checkpoint to start from, or None for a fresh start, and warnings.

    Args:
        folder: the run folder.
        resume: ``auto`` (the newest intact checkpoint, if any), ``never``, or the folder of a checkpoint.
        identity: identity of the run that is about to start.
        ranks: the processes of the run, which share the reading of checkpoints; a collective.
        extend: the run is to be extended; see `Identity.check`.

    Raises:
        RunError: the run folder contains a different run, or any run if `resume` is ``never``; or there is no run to
            extend.
        CheckpointError: the requested checkpoint is damaged, or all checkpoints are.
        PeerError: one of these was raised on another rank.
    """

    def look() -> list[str]:
        recover_replaced(folder.checkpoints)
        if resume == "never":
            if folder.manifest() or list_checkpoints(folder.checkpoints):
                raise RunError(
                    f"{folder.path}: already holds a run; continue it with --resume auto, or choose another run.name"
                )
            return []
        return check_launched(folder, identity, extend=extend)

    notes = ranks.on_rank_0(look)
    if resume == "never":
        return None, []
    damaged: list[str] = []
    if resume == "auto":
        reader, damaged = newest_intact(folder.checkpoints, ranks)
        if reader is None and damaged:
            raise CheckpointError("\n".join([*damaged, f"{folder.checkpoints}: no intact checkpoint to resume from"]))
        if reader is None:
            return None, notes
    else:
        reader = ranks.everywhere(lambda: CheckpointReader(Path(resume)))
        reader.verify(ranks)
    chosen = reader
    notes = ranks.on_rank_0(lambda: identity.check_checkpoint(chosen, folder.repairable, extend=extend))
    return chosen.folder, notes + [_fallback(message, chosen) for message in damaged]


def check_launched(folder: RunFolder, identity: Identity, *, extend: bool = False) -> list[str]:
    """Compare a run that is about to start with the one that was launched in its folder, if any; return warnings.

    Raises:
        RunError: that is another run; or there is none, and it is to be extended.
    """
    launched = Identity.of_run(folder)
    if launched is None and extend:
        raise RunError(f"{folder.path}: --extend continues a run, and there is none here; start it without --extend")
    return identity.check(launched, folder.path, repairable=folder.repairable, extend=extend) if launched else []


def check_nothing_lost(folder: RunFolder) -> None:
    """Make sure that a run of which no checkpoint was found has not saved any, before it begins with its first step.

    Raises:
        RunError: it has: its checkpoints were deleted, or their disk is not mounted.
    """
    manifest = folder.manifest() or {}
    try:
        saved, begun = manifest["provenance"]["step"], manifest["launches"][0]["from_step"]
        is_lost = saved > begun
    except (KeyError, IndexError, TypeError):
        return  # none was launched, or by an old version
    if is_lost:
        raise RunError(
            f"{folder.checkpoints}: holds no checkpoint, but the run has saved one, at step {saved}; restore it or "
            "mount its disk to resume the run, or choose another run.name to start a new one"
        )


def _fallback(message: str, reader: CheckpointReader) -> str:
    """Say what happens because a checkpoint is damaged."""
    return (
        f"{message}; falling back to {reader.folder.name}: the steps after {reader.index['step']} are trained again, "
        "and the damaged checkpoint and the metrics lines of those steps are set aside, not deleted"
    )


def rewind(folder: RunFolder, step: int) -> int:
    """Move the metrics and checkpoints after `step` aside; return the number of metrics lines moved."""
    for checkpoint in step_folders(folder.checkpoints):
        if step_of(checkpoint) > step:
            set_aside(checkpoint)
    return folder.metrics.discard_after(step)
