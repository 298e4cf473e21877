"""What the ranks of the distributed tests do; importable, so that the fork server can load it."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from pretrain.checkpoint.store import CheckpointReader, list_checkpoints
from pretrain.config import parse_config
from pretrain.data import BatchShare, TokenBatch
from pretrain.engine.plain import PlainEngine
from pretrain.launch import train
from pretrain.training.trainer import Trainer
from tests.conftest import TINY, merged
from tests.warm import warm_workers


def run(root: str, changes: dict[str, Any], stop_at: int | None = None, resume: str = "auto") -> int:
    """Train the tiny config in `root`, with data workers that start warm; returns the exit code."""
    with warm_workers():
        return train(parse_config(merged(TINY, {"run.root": root, **changes})), resume, stop_at)


def run_with_fault(root: str, changes: dict[str, Any], fault: str) -> int:
    """Train with something planted: `reversed` micro-batches (no fault), a `lost` gradient, a `rate` off by 1 %."""
    rank = int(os.environ.get("RANK", "0"))
    micro_batches, backward, rates = Trainer.micro_batches, PlainEngine.backward, Trainer.set_learning_rates

    def reversed_rows(self: Trainer, share: BatchShare) -> list[TokenBatch]:
        return micro_batches(self, share)[::-1]

    def lost(self: PlainEngine, loss: torch.Tensor) -> None:
        backward(self, loss * (0.0 if rank == 1 else 1.0))

    def off(self: Trainer) -> dict[str, float]:
        found = rates(self)
        for group in self.optimizer.param_groups:
            group["lr"] *= 1.01
        return found

    patches = {
        "reversed": (Trainer, "micro_batches", reversed_rows),
        "lost": (PlainEngine, "backward", lost),
        "rate": (Trainer, "set_learning_rates", off),
    }
    with mock.patch.object(*patches[fault]):
        return run(root, changes)


def run_consuming_generators(root: str, changes: dict[str, Any], stop_at: int) -> list[list[float]]:
    """Train, drawing from every global random generator in each step; returns the draws."""
    draws: list[list[float]] = []
    rates = Trainer.set_learning_rates

    def draw(self: Trainer) -> dict[str, float]:
        draws.append([torch.rand(()).item(), float(np.random.rand()), random.random(), random.gauss(0, 1)])
        return rates(self)

    with mock.patch.object(Trainer, "set_learning_rates", draw):
        run(root, changes, stop_at)
    return draws


def newest(root: Path) -> CheckpointReader:
    """The newest checkpoint of the run in `root`."""
    return CheckpointReader(list_checkpoints(root / "tiny" / "checkpoints")[-1])


def tensors(root: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every slot of every parameter in the newest checkpoint."""
    reader = newest(root)
    saved = reader.index["parameters"]
    return {(name, slot): reader.read(name, slot) for name in saved for slot in saved[name]}


def metrics(root: Path, *keys: str) -> list[list[Any]]:
    """The wanted keys of every line of metrics.jsonl."""
    lines = (root / "tiny" / "metrics.jsonl").read_text().splitlines()
    return [[record[key] for key in keys] for record in map(json.loads, lines)]


def distance(first: Path, second: Path) -> float:
    """Largest relative Frobenius distance between the weights of two runs."""
    a, b = tensors(first), tensors(second)
    assert a.keys() == b.keys()
    weights = [key for key in a if key[1] == "weight"]
    return max(((a[key] - b[key]).norm() / b[key].norm()).item() for key in weights)
