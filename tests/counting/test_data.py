"""Batches are prepared behind the steps, and none that no step needs."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from unittest import mock

import pytest

from pretrain.data import BatchShare, TokenStream
from pretrain.training.trainer import Trainer
from tests.counting.where import configured, train


@pytest.mark.parametrize("stop_at", [None, 2])
def test_the_next_batch_is_prepared_while_the_model_trains(tmp_path: Path, stop_at: int | None) -> None:
    prepared: list[str] = []
    during: list[int] = []
    next_batch, rates = TokenStream.next_batch, Trainer.set_learning_rates

    def read(self: TokenStream, count: int) -> BatchShare:
        found = next_batch(self, count)
        if threading.current_thread().name == "prefetch":
            prepared.append(threading.current_thread().name)
        return found

    def wait(self: Trainer) -> dict[str, float]:
        """The step goes on once the batch after it has come, which would never be if the loop had to ask for it."""
        if self.state.step + 1 < self.config.total_steps:
            deadline = time.monotonic() + 30
            while len(prepared) < self.state.step + 2:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        during.append(len(prepared))
        return rates(self)

    config = configured(str(tmp_path), {"validation.every_steps": None, "data.validation_fraction": 0})
    with mock.patch.object(TokenStream, "next_batch", read), mock.patch.object(Trainer, "set_learning_rates", wait):
        train(config, stop_at=stop_at)
    steps = stop_at or config.total_steps
    assert during == [min(step + 2, config.total_steps) for step in range(steps)]
    assert len(prepared) == min(steps + 1, config.total_steps)
