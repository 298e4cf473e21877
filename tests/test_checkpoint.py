"""A checkpoint is complete or does not exist, knows no topology, and damage is noticed."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.checkpoint import store as checkpoint
from pretrain.checkpoint.store import (
    CheckpointError,
    CheckpointReader,
    Fragment,
    Index,
    list_checkpoints,
    newest_intact,
    prune,
    save_checkpoint,
)


class Alone:
    """One rank."""

    rank, world_size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


def index(step: int) -> Index:
    return Index(
        format=1,
        step=step,
        world_size=0,
        counters={"step": step},
        config={},
        identity={},
        data_state={},
        optimizer_groups=[],
        parameters={},
        provenance={},
        files={},
    )


def fragments() -> list[Fragment]:
    weight = torch.arange(12.0)
    return [
        Fragment("w", "weight", (3, 4), 0, weight[:5]),
        Fragment("w", "weight", (3, 4), 5, weight[5:]),
        Fragment("w", "momentum", (3, 4), 0, -weight),
        Fragment("w", "step", (), 0, torch.tensor(7.0)),
        Fragment("b", "weight", (2,), 0, torch.tensor([1.0, 2.0], dtype=torch.bfloat16)),
    ]


def save(root: Path, step: int) -> Path:
    return save_checkpoint(root, index(step), fragments(), {"torch": torch.get_rng_state()}, Alone())


def test_what_was_written_is_read(tmp_path: Path) -> None:
    reader = CheckpointReader(save(tmp_path, 5))
    reader.verify()
    assert reader.folder.name == "step-00000005"
    assert torch.equal(reader.read("w", "weight"), torch.arange(12.0).reshape(3, 4))
    assert reader.read("w", "step").shape == ()
    assert reader.read("b", "weight").dtype is torch.bfloat16
    assert reader.weights().keys() == {"w", "b"}
    assert torch.equal(reader.generators(0)["torch"], torch.get_rng_state())  # type: ignore[index]
    assert reader.generators(1) is None
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(1, 59), unique=True, max_size=6),
    start=st.integers(0, 60),
    length=st.integers(0, 60),
)
def test_any_slice_is_read_from_any_layout(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[int], start: int, length: int
) -> None:
    length = min(length, 60 - start)
    values = torch.randn(60)
    edges = [0, *sorted(cuts), 60]
    pieces = [Fragment("w", "weight", (5, 12), a, values[a:b]) for a, b in itertools.pairwise(edges)]
    root = tmp_path_factory.mktemp("layout")
    reader = CheckpointReader(save_checkpoint(root, index(1), pieces, {"r": torch.zeros(1)}, Alone()))
    assert torch.equal(reader.read("w", "weight", start, length), values[start : start + length])
    assert torch.equal(reader.read("w", "weight").flatten(), values)


@pytest.mark.parametrize("gap", [[(0, 5), (6, 12)], [(0, 7), (5, 12)], [(0, 5)]])
def test_fragments_that_do_not_cover_are_refused(gap: list[tuple[int, int]], tmp_path: Path) -> None:
    pieces = [Fragment("w", "weight", (3, 4), a, torch.zeros(b - a)) for a, b in gap]
    with pytest.raises(AssertionError, match="w weight"):
        save_checkpoint(tmp_path, index(1), pieces, {"r": torch.zeros(1)}, Alone())
    assert list_checkpoints(tmp_path) == []


@pytest.mark.parametrize("victim", ["state-00000.safetensors", "rng-00000.safetensors"])
def test_a_flipped_byte_is_found_and_the_one_before_taken(victim: str, tmp_path: Path) -> None:
    save(tmp_path, 5)
    path = save(tmp_path, 10) / victim
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    reader, damaged = newest_intact(tmp_path)
    assert reader is not None
    assert reader.index["step"] == 5
    assert len(damaged) == 1
    assert victim in damaged[0]
    assert "step-00000010" in damaged[0]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 99}'])
def test_a_damaged_index_is_found(content: str, tmp_path: Path) -> None:
    save(tmp_path, 5)
    (save(tmp_path, 10) / "index.json").write_text(content)
    reader, damaged = newest_intact(tmp_path)
    assert reader is not None
    assert reader.index["step"] == 5
    assert "index.json" in damaged[0]


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path, 5)
    (folder / "state-00000.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"state-00000\.safetensors: missing"):
        CheckpointReader(folder).verify()


def test_a_folder_without_an_index_does_not_exist(tmp_path: Path) -> None:
    (save(tmp_path, 10) / "index.json").unlink()
    (tmp_path / "step-00000020.tmp").mkdir()
    assert list_checkpoints(tmp_path) == []
    assert newest_intact(tmp_path) == (None, [])


def test_the_old_checkpoint_stays_until_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault of a famous trainer: the old checkpoint deleted before the new one is complete."""
    save(tmp_path, 5)

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("save_file", "sync"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, full_disk)
            for step in (5, 10):
                with pytest.raises(OSError, match="No space left"):
                    save(tmp_path, step)
        reader, damaged = newest_intact(tmp_path)
        assert reader is not None
        assert (reader.index["step"], damaged) == (5, [])
    save(tmp_path, 10)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000005", "step-00000010"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    folder = save_checkpoint(
        tmp_path,
        index(5),
        [Fragment("w", "weight", (2,), 0, torch.ones(2))],
        {"r": torch.zeros(1)},
        Alone(),
    )
    assert torch.equal(CheckpointReader(folder).read("w", "weight"), torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_pruning_keeps_the_last_and_every_nth(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        save(tmp_path, step)
    prune(tmp_path, keep_last=2, keep_every_steps=30)
    assert [json.loads((p / "index.json").read_text())["step"] for p in list_checkpoints(tmp_path)] == [
        30,
        60,
        70,
    ]
    prune(tmp_path, keep_last=1, keep_every_steps=None)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000070"]
