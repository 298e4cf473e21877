"""What the ranks of the hand-over tests do: continue a run of another engine, and look at what was loaded first."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.distributed.tensor import DTensor

from optimizers.dtensors import local
from pretrain.checkpoint.state import fragments
from pretrain.checkpoint.store import CheckpointReader
from pretrain.training.trainer import Trainer
from tests.distributed.scenarios import newest, run

Outcome = tuple[int, list[str], dict[tuple[str, str], int]]
"""Exit code; what differs from the checkpoint; and (parameter, slot) -> elements that this rank has loaded."""


def loaded(trainer: Trainer, reader: CheckpointReader) -> tuple[list[str], dict[tuple[str, str], int]]:
    """Compare what a trainer holds on this rank with the checkpoint that it continues, bit for bit."""
    wrong, counts = [], Counter[tuple[str, str]]()
    saved = reader.index["parameters"]
    for fragment in fragments(trainer.engine.module.model, trainer.optimizer, trainer.engine.held):
        values, slots = fragment.values.reshape(-1), saved[fragment.name]
        wanted = reader.read(fragment.name, fragment.slot, fragment.start, values.numel()).reshape(-1)
        if tuple(slots[fragment.slot]["shape"]) != fragment.shape or not torch.equal(values.float(), wanted.float()):
            wrong.append(f"{fragment.slot} of {fragment.name}")
        counts[fragment.name, fragment.slot] += values.numel()
    if asdict(trainer.state) != reader.index["counters"]:
        wrong.append("counters")
    if dict(trainer.batches.state()) != reader.index["data_state"]:
        wrong.append("data position")
    if trainer.config.engine.kind == "fsdp2":
        wrong += [name for name, p in trainer.engine.module.named_parameters() if not isinstance(p, DTensor)]
    return wrong, dict(counts)


def permute_rows(trainer: Trainer) -> None:
    """A fault: the rows of one matrix, as far as this rank has them, in the opposite order."""
    group = next(group for group in trainer.optimizer.param_groups if group["kind"] == "matrix")
    values = local(group["params"][0].detach())
    values.copy_(values.flip(0).clone())


def hand_over(
    source: str, root: str, changes: dict[str, Any], stop_at: int | None = None, fault: bool = False
) -> Outcome:
    """Continue a copy of the run in `source` in `root`, under other settings.

    Every rank calls this; the first copies, before the others look at the folder.
    """
    found: list[tuple[list[str], dict[tuple[str, str], int]]] = []
    reader = newest(Path(source))
    fit = Trainer.fit

    def compare(self: Trainer, stop_at: int | None = None) -> Any:
        if fault:
            permute_rows(self)
        found.append(loaded(self, reader))
        return fit(self, stop_at)

    with mock.patch.object(Trainer, "fit", compare):
        code = run(root, changes, stop_at)
    return code, *found[0]


def copied(source: Path, root: Path) -> Path:
    """A copy of a run to be continued in `root`."""
    shutil.copytree(source, root)
    return root


def elements(reader: CheckpointReader) -> dict[tuple[str, str], int]:
    """(parameter, slot) -> elements that a checkpoint has."""
    saved = reader.index["parameters"]
    return {(name, slot): prod(record["shape"]) for name in saved for slot, record in saved[name].items()}
