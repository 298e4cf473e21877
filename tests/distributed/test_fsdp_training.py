"""Training loops, checkpoints and odd gradients of models that fully_shard has sharded."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.fsdp_loops import WAYS, behaviours, checkpoints, load_files, loop, save_files
from tests.distributed.ranks import run_ranks


@pytest.mark.parametrize(
    "mesh_shape", [(3,), pytest.param((2,), marks=pytest.mark.long), pytest.param((2, 2), marks=pytest.mark.long)]
)
def test_a_loop_with_fully_shard_on_blocks_and_root_trains_as_one_process(mesh_shape: tuple[int, ...]) -> None:
    world_size = mesh_shape[0] * (mesh_shape[1] if len(mesh_shape) > 1 else 1)
    results = run_ranks(world_size, loop, mesh_shape)
    assert all(found["same"] == 0 for found in results), "an optimizer made before fully_shard follows it"
    found = results[0]
    assert found["losses"][-1] < 0.7 * found["losses"][0]
    assert found["loss difference"] < 1e-5
    # Five dense runs differ as much that add up the same gradients in other orders.
    assert found["distance"] <= 3 * found["spread"] < 1e-6


@pytest.mark.parametrize("direction", ["normuon", pytest.param("aurora", marks=pytest.mark.long)])
def test_every_state_dict_continues_bit_for_bit(direction: str) -> None:
    for found in run_ranks(2, checkpoints, direction):
        kept = {"momentum", "step", "exp_avg", "exp_avg_sq"} | ({"second_moment"} if direction == "normuon" else set())
        assert set(found["slots"]) == kept
        assert all(found[way] for way in WAYS), found
        assert "is a DTensor, its parameter is not" in found["into a dense one"]


@pytest.mark.long
def test_files_of_distributed_checkpoint_load_on_another_number_of_ranks(tmp_path: Path) -> None:
    saved = run_ranks(2, save_files, str(tmp_path))[0]
    assert {name.split()[1] for name in saved} == {"momentum", "second_moment", "step", "exp_avg", "exp_avg_sq"}
    assert all(loaded == saved for loaded in run_ranks(3, load_files, str(tmp_path)))


def test_what_may_happen_to_gradients_and_parameters() -> None:
    for found in run_ranks(2, behaviours):
        assert found["not finite"] == (set(), False)
        assert found["no gradient"] == {"layers.1.gate.weight", "layers.1.gate.bias"}
        assert not found["no gradient steps"]
        assert found["lacking is zero"]
        assert found["lacking changes"]
        assert found["zero"] == {"layers.0.up.weight"}
        assert "sharded by fully_shard" in found["bare"]
        assert found["bare parameters"] == 0
        assert found["partly sharded"] == 0
        assert found["kinds"] == ["DTensor", "Parameter"]
        assert found["plain, same"] == []
        (told,) = found["plain, zero, then own"]
        assert "3 parameters are not sharded, embed.weight, " in told
        assert "their gradients differ between the ranks" in told
        assert found["teams"] == [2, 1]
        assert found["planned again"] < 1e-6
