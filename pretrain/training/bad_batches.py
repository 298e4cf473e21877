"""Batches that were skipped or had a loss spike, kept for inspection."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from pretrain.checkpoint.tensor_file import save_file
from pretrain.config import Config
from pretrain.data.places import batch_places
from pretrain.files import replacing
from pretrain.run.json_lines import finite_or_none
from pretrain.training.records import LaunchedStep


class BadBatches:
    """Keeps this rank's shares of bad batches in ``<run folder>/bad_batches/step-00000012-rank-00000.safetensors``.

    A file has `tokens` int32 [rows, T+1], `lengths` int32 [rows] (valid targets of each row) and `rows` int64 [rows]
    (their positions in the global batch). Its metadata has `record`, the step's line of metrics.jsonl, and `places`,
    what this rank read for the batch (`pretrain.data.places.batch_places`), both as JSON.

    Args:
        config: the run's config; `guards.keep_bad_batches` says how many files are kept, the newest ones.
        rank: this rank.
        warn: called if a file cannot be written, which does not end the run.
    """

    def __init__(self, config: Config, rank: int, warn: Callable[[str], None]) -> None:
        self.folder = config.run_folder / "bad_batches"
        self._rank, self._warn, self._seed = rank, warn, config.data.seed
        self._most = config.guards.keep_bad_batches

    def keep(self, step: LaunchedStep) -> None:
        """Write the batch of a step, whose record is known."""
        if not self._most:
            return
        try:
            self._write(step)
            for old in sorted(self.folder.glob(f"step-*-rank-{self._rank:05d}.safetensors"))[: -self._most]:
                old.unlink(missing_ok=True)
        except OSError as error:
            self._warn(f"the batch of step {step.step} could not be kept for inspection: {error}")

    def _write(self, step: LaunchedStep) -> None:
        share = step.batch.share
        tensors = {
            "tokens": share.tokens.to(torch.int32).contiguous(),
            "lengths": share.lengths.to(torch.int32).contiguous(),
            "rows": torch.tensor(share.rows, dtype=torch.int64),
        }
        described: dict[str, Any] = {
            "record": {key: finite_or_none(value) for key, value in step.record.items()},
            "places": batch_places(step.before, step.batch.position, self._seed),
        }
        self.folder.mkdir(exist_ok=True)  # without the run folder, which its disk may have taken along
        with replacing(self.folder / f"step-{step.step:08d}-rank-{self._rank:05d}.safetensors") as partial:
            save_file(tensors, partial, {key: json.dumps(value) for key, value in described.items()})
