"""Loss and bits per byte on the validation split."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from pretrain.config import Config
from pretrain.config.validation import ValidationConfig
from pretrain.data import TokenBatch, TokenStream
from pretrain.engine.ranks import Ranks
from pretrain.training.hooks import Hook, StepContext, is_due
from pretrain.training.validation_store import ValidationSet


class Validator(Hook):
    """Loss and bits per byte on the validation split, read once and kept in memory.

    Args:
        config: the run's config.
        open_stream: opens the validation stream, which rank 0 reads alone.
        ranks: the processes of the run.
        given: the validation set of remote or prepared sources; None: the split is read from the stream.
        tick: called for every batch that is read or computed, as a sign of life.
    """

    phase = "validation"

    def __init__(
        self,
        config: Config,
        open_stream: Callable[[], TokenStream],
        ranks: Ranks,
        given: ValidationSet | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self.settings: ValidationConfig = config.validation
        self.rows = self.settings.batch_sequences or config.train.micro_batch_sequences
        self.max_sequences = max(1, self.settings.max_tokens // config.sequence_length)
        self._open_stream, self._ranks, self._given, self._tick = open_stream, ranks, given, tick
        self._batches: list[TokenBatch] | None = None
        self.text_bytes = 0

    def due(self, step: int, last: bool) -> bool:
        """Return True every `validation.every_steps` steps and after the last step."""
        return is_due(self.settings.every_steps, step, last)

    def batches(self) -> list[TokenBatch]:
        """Return the validation split, up to `validation.max_tokens`, in batches of `rows` sequences."""
        if self._batches is None:
            if self._given is not None:
                self._batches, self.text_bytes = self._given.batches(self.rows), self._given.sample.text_bytes
            else:
                self._batches, self.text_bytes = self._ranks.on_rank_0(self._read, long=True)
        return self._batches

    def _read(self) -> tuple[list[TokenBatch], int]:
        stream = self._open_stream()
        try:
            return list(self._drain(stream)), stream.text_bytes
        finally:
            stream.close()

    @torch.no_grad()
    def run(self, context: StepContext) -> dict[str, Any]:
        """Validate; the batches are divided over the ranks."""
        engine = context.engine
        batches = self.batches()
        engine.module.eval()
        total = torch.zeros((), dtype=torch.float64)
        for first in range(0, len(batches), engine.world_size):
            # Every rank takes part in every round, because under ZeRO 3 a forward pass is a collective.
            index = first + engine.rank
            loss = context.loss_sum(batches[min(index, len(batches) - 1)], engine.module)
            if index < len(batches):
                total += loss.double().cpu()
            self._tick()
        engine.module.train()
        nats = sum(engine.ranks.gather(total.item()))
        loss = nats / sum(batch.num_targets for batch in batches)
        return {"validation_loss": loss, "validation_bits_per_byte": nats / math.log(2) / self.text_bytes}

    def _drain(self, stream: TokenStream) -> Iterator[TokenBatch]:
        """Yield batches of at most `rows` sequences until the stream ends or `max_sequences` are read."""
        left = self.max_sequences
        while left > 0:
            try:
                batch = stream.next_batch(min(self.rows, left))
            except StopIteration:
                return
            self._tick()
            left -= len(batch.lengths)
            yield batch.slice(slice(None))
