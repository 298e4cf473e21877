"""A run that was stopped twice equals one that was not, bit for bit, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import SMALL_VOCABULARY, SPEEDRUN
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import metrics, newest, run, run_consuming_generators, tensors

RECIPE = {
    "model": {**SPEEDRUN, "embedding_dtype": "bf16"},
    "optimizer.scope": "all",
    "optimizer.contra": 0.2,
    "optimizer.uw_floor": 0.35,
    "train.grad_clip": None,
}
# Three steps of warm-up, and a decay from step 10 on.
STEPS = 14
EXACT = ("step", "tokens", "loss", "lr", "adamw_lr", "grad_norm", "batch_sha256")


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        pytest.param(1, {}, id="1 process"),
        pytest.param(1, {"data.workers": 2}, id="2 data workers", marks=pytest.mark.long),
        pytest.param(1, {"train.micro_batch_sequences": 24}, id="no accumulation"),
        pytest.param(2, {"data.workers": 1}, id="2 processes"),
        pytest.param(3, {"train.micro_batch_sequences": 4}, id="3 processes", marks=pytest.mark.long),
        pytest.param(4, {"train.micro_batch_sequences": 3}, id="4 processes", marks=pytest.mark.long),
        pytest.param(1, {"data.document_mask": True, "data.reset_positions": True}, id="document masks"),
        pytest.param(
            1,
            {"optimizer.name": "riemannian_aurora", "optimizer.polar": "gram"},
            id="riemannian_aurora",
            marks=pytest.mark.long,
        ),
        pytest.param(
            1, {"optimizer.name": "muon", "optimizer.polar": "polar_express"}, id="muon", marks=pytest.mark.long
        ),
        pytest.param(2, {"optimizer.name": "normuon", "optimizer.polar": "gram"}, id="normuon", marks=pytest.mark.long),
        pytest.param(1, {"optimizer.name": "u_normuon", "optimizer.running_norms": True}, id="u_normuon"),
        pytest.param(1, {"optimizer.polar": "gram", "optimizer.row_blocks": {"q_proj": 2}}, id="split heads"),
        pytest.param(1, RECIPE, id="speedrun, bf16 embedding"),
        pytest.param(2, RECIPE, id="speedrun, 2 processes", marks=pytest.mark.long),
    ],
)
def test_stopping_twice_changes_nothing(world_size: int, changes: dict[str, Any], tmp_path: Path) -> None:
    """Faults of famous trainers: a replayed warm-up, a step at rate 0, a lost batch, a stream that restarts at the
    second resume. Data workers only read ahead: the run that is not stopped does without them."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    changes = {"train.total_tokens": STEPS * 768, **changes, **SMALL_VOCABULARY}
    assert set(run_ranks(world_size, run, str(whole), {**changes, "data.workers": 0})) == {0}
    for stop, code in ((5, 75), (11, 75), (None, 0)):
        assert set(run_ranks(world_size, run, str(parts), changes, stop)) == {code}

    assert [line[0] for line in metrics(whole, "step")] == list(range(1, STEPS + 1))
    assert metrics(parts, *EXACT) == metrics(whole, *EXACT)
    expected, found = tensors(whole), tensors(parts)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
    for key in ("data_state", "optimizer_groups", "identity"):
        assert newest(parts).index[key] == newest(whole).index[key]  # type: ignore[literal-required]


def test_every_random_generator_continues(tmp_path: Path) -> None:
    changes = {"train.total_tokens": 8 * 768, **SMALL_VOCABULARY}
    whole = run_ranks(2, run_consuming_generators, str(tmp_path / "whole"), changes, 8)
    parts = [run_ranks(2, run_consuming_generators, str(tmp_path / "parts"), changes, stop) for stop in (3, 5, 8)]
    for rank in range(2):
        assert [draw for part in parts for draw in part[rank]] == whole[rank]
    assert whole[0] != whole[1]
