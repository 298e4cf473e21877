"""Where training starts: from initial weights, from a checkpoint of the run, or from what another run leaves it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from optimizers import Aurora
from optimizers.sharded import Held
from pretrain.checkpoint.state import fragments
from pretrain.checkpoint.store import CheckpointReader
from pretrain.config import ConfigError, parse_stored_config
from pretrain.launch.ancestor import (
    AncestorRecord,
    Weights,
    check_ancestor,
    find_ancestor,
    reopen,
)
from pretrain.launch.branching import schedule_notes
from pretrain.launch.setup import Setup
from pretrain.run.resume import check_nothing_lost, choose_checkpoint


@dataclass(frozen=True)
class Start:
    """Where training starts.

    Attributes:
        weights: the weights; None: initial ones.
        optimizer: the state of the optimizer; None: that before the first step.
        position: counters, position in the data and random generators; None: those of a beginning.
        is_resume: all of them are those of a checkpoint of this run.
    """

    weights: Weights | None = None
    optimizer: CheckpointReader | None = None
    position: CheckpointReader | None = None
    is_resume: bool = False

    @property
    def step(self) -> int:
        """Steps taken already."""
        return self.position.index["step"] if self.position else 0

    def __str__(self) -> str:
        if self.weights is None:
            return "starting from initial weights"
        if self.is_resume:
            return f"resuming from {self.weights.folder} (step {self.step})"
        if self.position is not None:
            return f"branching from {self.weights.folder} at step {self.step}"
        taken = "weights and optimizer state" if self.optimizer else "weights"
        return f"starting from the {taken} of {self.weights.folder}"


def choose_start(setup: Setup, resume: str, *, extend: bool) -> Start:
    """Find where a launch starts, and print what is worth a warning; a collective, in the locked run folder.

    Args:
        setup: of the launch.
        resume: ``auto``, ``never``, or a checkpoint's folder.
        extend: the run is to be extended.

    Raises:
        RunError, CheckpointError: see `choose_checkpoint` and `check_nothing_lost`.
        ConfigError, FolderError: see `find_ancestor` and `check_ancestor`.
    """
    ranks, display = setup.engine.ranks, setup.display
    source, notes = choose_checkpoint(setup.folder, resume, setup.identity, ranks, extend=extend)
    reader = ranks.everywhere(lambda: CheckpointReader(source)) if source else None
    record = None
    if reader is not None:
        saved = parse_stored_config(reader.index["config"])  # `choose_checkpoint` has read it as well
        notes = notes + schedule_notes(saved, setup.config, reader.index["counters"].get("tokens", 0))
    else:
        record, more = ranks.on_rank_0(lambda: _examine(setup), long=True)
        notes = notes + more
    for note in notes:
        display.warn(note)
    if reader is not None:
        return Start(reader, reader, reader, is_resume=True)
    ranks.on_rank_0(lambda: check_nothing_lost(setup.folder))
    if record is None:
        return Start()
    weights = ranks.everywhere(lambda: reopen(record))
    checkpoint = weights if isinstance(weights, CheckpointReader) else None
    take = setup.config.init.take
    return Start(weights, checkpoint if take != "weights" else None, checkpoint if take == "all" else None)


def _examine(setup: Setup) -> tuple[AncestorRecord | None, list[str]]:
    """Find and check what the config's section `init` names."""
    known = setup.ancestry[0] if setup.ancestry else None
    ancestor = find_ancestor(setup.config.init, setup.folder.path, known)
    if ancestor is None:
        return None, []
    if known is not None and known["sha256"] != ancestor.record["sha256"]:
        raise ConfigError(
            [
                f"init.from: {ancestor.record['folder']} has changed since the run was started from it: restore it, or "
                "choose another run.name to start from what it is now"
            ]
        )
    return ancestor.record, check_ancestor(ancestor, setup.config, setup.identity)


@torch.no_grad()
def fill_stepped_weights(weights: Weights, model: torch.nn.Module, optimizer: Aurora, held: Held | None) -> None:
    """Write weights into the tensors that the optimizer steps, which may be fp32 copies of rounded ones."""
    for fragment in fragments(model, optimizer, held):
        if fragment.slot == "weight":
            values = weights.read(fragment.name, "weight", fragment.start, fragment.values.numel())
            fragment.values.copy_(values.reshape(fragment.values.shape))
