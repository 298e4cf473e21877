"""A checkpoint is complete or does not exist, does not depend on ranks, and damage is noticed."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain.checkpoint import store, writer
from pretrain.checkpoint.format import INDEX, CheckpointError, Fragment, index_digest
from pretrain.checkpoint.store import CheckpointReader, list_checkpoints, newest_intact, prune, recover_replaced
from pretrain.checkpoint.writer import Snapshot, save_checkpoint
from pretrain.engine.ranks import Ranks
from pretrain.files import file_sha256


def snapshot(step: int) -> Snapshot:
    return Snapshot(
        step=step,
        counters={"step": step, "train_loss": float("nan")},
        config={"optimizer": {"lr": 0.02, "betas": (0.9, 0.95)}},
        identity={},
        data_state={},
        optimizer_groups=[{"lr": 0.02}],
        provenance={},
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
    return save_checkpoint(root, snapshot(step), fragments(), {"torch": torch.get_rng_state()}, Ranks())


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
    reader = CheckpointReader(save_checkpoint(root, snapshot(1), pieces, {"r": torch.zeros(1)}, Ranks()))
    assert torch.equal(reader.read("w", "weight", start, length), values[start : start + length])
    assert torch.equal(reader.read("w", "weight").flatten(), values)


@pytest.mark.parametrize("gap", [[(0, 5), (6, 12)], [(0, 7), (5, 12)], [(0, 5)]])
def test_fragments_that_do_not_cover_are_refused(gap: list[tuple[int, int]], tmp_path: Path) -> None:
    pieces = [Fragment("w", "weight", (3, 4), a, torch.zeros(b - a)) for a, b in gap]
    with pytest.raises(ValueError, match="weight of w: its fragments"):
        save_checkpoint(tmp_path, snapshot(1), pieces, {"r": torch.zeros(1)}, Ranks())
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


def test_an_unfinished_folder_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "step-00000020.tmp").mkdir()
    assert list_checkpoints(tmp_path) == []
    assert newest_intact(tmp_path) == (None, [])


def test_a_deleted_index_is_named(tmp_path: Path) -> None:
    save(tmp_path, 5)
    (save(tmp_path, 10) / "index.json").unlink()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000005"]
    reader, damaged = newest_intact(tmp_path)
    assert reader is not None
    assert reader.index["step"] == 5
    assert damaged == [f"{tmp_path / 'step-00000010'}: not a checkpoint (it has no index.json)"]


def test_the_old_checkpoint_stays_until_the_new_one_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault of a famous trainer: the old checkpoint deleted before the new one is complete."""
    save(tmp_path, 5)

    def full_disk(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for name in ("save_file", "sync"):
        with monkeypatch.context() as patch:
            patch.setattr(writer, name, full_disk)
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
        snapshot(5),
        [Fragment("w", "weight", (2,), 0, torch.ones(2))],
        {"r": torch.zeros(1)},
        Ranks(),
    )
    assert torch.equal(CheckpointReader(folder).read("w", "weight"), torch.ones(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_a_checkpoint_whose_replacement_was_killed_gets_its_name_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = save(tmp_path, 5)
    rename, renamed = Path.rename, []

    def dies(self: Path, target: Path) -> Path:
        """The process is killed before the second of the two renames."""
        renamed.append(target)
        if len(renamed) > 1:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 5)
    monkeypatch.undo()
    assert list_checkpoints(tmp_path) == []
    assert recover_replaced(tmp_path) == [final]
    assert list_checkpoints(tmp_path) == [final]
    CheckpointReader(final).verify()
    assert recover_replaced(tmp_path) == []


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


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in plain data, containers included."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, item in items for found in leaves(item, (*path, key)))]


def changed(value: Any) -> Any:
    """Another value that looks alike."""
    if isinstance(value, bool) or value is None:
        return 1
    if isinstance(value, int | float):
        return value + 1 if value == value else 0.0
    if isinstance(value, str):
        return value[:-1] + ("0" if value[-1:] != "0" else "1")
    return {} if value else [0]


def edit(folder: Path, path: tuple[Any, ...], *, delete: bool = False, sign: bool = False) -> None:
    """Change or delete one value of an index; with `sign` give it a digest that fits."""
    file = folder / INDEX
    index = json.loads(file.read_text())
    holder = index
    for key in path[:-1]:
        holder = holder[key]
    if delete:
        del holder[path[-1]]
    else:
        holder[path[-1]] = changed(holder[path[-1]])
    if sign:
        index["digest"] = index_digest(index)
    file.write_text(json.dumps(index))


def test_no_value_of_the_index_can_be_changed_or_deleted(tmp_path: Path) -> None:
    save(tmp_path, 5)
    paths = leaves(json.loads((save(tmp_path, 10) / INDEX).read_text()))[1:]
    assert len(paths) > 50
    for path, delete in itertools.product(paths, (False, True)):
        folder = save(tmp_path, 10)
        CheckpointReader(folder).verify()
        edit(folder, path, delete=delete)
        reader, damaged = newest_intact(tmp_path)
        assert reader is not None
        assert reader.index["step"] == 5, path
        assert "step-00000010" in damaged[0]


@settings(max_examples=60, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_no_bit_of_the_index_can_flip(tmp_path_factory: pytest.TempPathFactory, position: float, bit: int) -> None:
    folder = save(tmp_path_factory.mktemp("bit"), 10)
    CheckpointReader(folder).verify()
    content = bytearray((folder / INDEX).read_bytes())
    content[int(position * len(content))] ^= 1 << bit
    (folder / INDEX).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        CheckpointReader(folder)


def test_a_number_written_in_another_way_is_noticed(tmp_path: Path) -> None:
    """One bit makes 1e-05 into 1E-05, which is the same number."""
    values = dataclasses.replace(snapshot(10), counters={"step": 10, "train_loss": 1e-05})
    folder = save_checkpoint(tmp_path, values, fragments(), {"r": torch.zeros(1)}, Ranks())
    text = (folder / INDEX).read_text()
    assert text.count("1e-05") == 1
    (folder / INDEX).write_text(text.replace("1e-05", "1E-05"))
    with pytest.raises(CheckpointError, match=r"index\.json: damaged"):
        CheckpointReader(folder)


RECORDS = ("parameters", "w", "weight", "fragments")


@pytest.mark.parametrize(
    ("path", "delete"),
    [
        ((*RECORDS, 0), True),
        ((*RECORDS, 1), True),
        ((*RECORDS, 1, "start"), False),
        ((*RECORDS, 1, "length"), False),
        ((*RECORDS, 1, "length"), True),
        ((*RECORDS, 0, "file"), False),
        (("parameters", "w", "weight", "shape"), False),
        (("parameters", "w", "weight", "dtype"), False),
        (("parameters", "w", "weight"), True),
        (("files", "state-00000.safetensors"), True),
        (("counters", "step"), False),
    ],
)
def test_an_index_that_does_not_hold_together_is_refused_whatever_its_digest(
    path: tuple[Any, ...], delete: bool, tmp_path: Path
) -> None:
    folder = save(tmp_path, 10)
    edit(folder, path, delete=delete, sign=True)
    with pytest.raises(CheckpointError, match=r"index\.json: damaged"):
        CheckpointReader(folder)


@pytest.mark.parametrize("name", ["../state-00000.safetensors", "/etc/passwd", "index.json", ""])
def test_a_file_outside_the_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    index = json.loads((folder / INDEX).read_text())
    index["files"][name] = "0" * 64
    index["digest"] = index_digest(index)
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is not a file of a checkpoint"):
        CheckpointReader(folder)


def test_a_digest_may_be_missing_in_the_old_format_only(tmp_path: Path) -> None:
    folder = save(tmp_path, 10)
    edit(folder, ("digest",), delete=True)
    with pytest.raises(CheckpointError, match="digest is missing"):
        CheckpointReader(folder)
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"format": 1}))
    CheckpointReader(folder).verify()


def test_only_elements_that_exist_are_read(tmp_path: Path) -> None:
    reader = CheckpointReader(save(tmp_path, 10))
    for start, length in ((0, 13), (12, 1), (-1, 2), (3, -1)):
        with pytest.raises(CheckpointError, match="elements"):
            reader.read("w", "weight", start, length)
    with pytest.raises(CheckpointError, match="holds no second_moment of w"):
        reader.read("w", "second_moment")


def test_a_file_that_does_not_hold_what_the_index_says_is_refused(tmp_path: Path) -> None:
    """Though every checksum is right."""
    folder = save(tmp_path, 10)
    index = json.loads((folder / INDEX).read_text())
    record = index["parameters"]["b"]["weight"]
    record["dtype"] = "float16"
    index["digest"] = index_digest(index)
    (folder / INDEX).write_text(json.dumps(index))
    reader = CheckpointReader(folder)
    with pytest.raises(CheckpointError, match="not what the index says"):
        reader.verify()
    with pytest.raises(CheckpointError, match="not what the index says"):
        reader.read("b", "weight")


def without_digest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change an index of format 1, which nothing guards."""
    index = json.loads((folder / INDEX).read_text()) | {"format": 1}
    del index["digest"]
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["parameters"]["b"]["weight"].update(dtype="float16"),
        lambda index: index["parameters"]["w"].update(other=index["parameters"]["w"]["momentum"]),
        lambda index: index["parameters"]["w"]["momentum"]["fragments"][0].update(file="rng-00000.safetensors"),
        lambda index: index["parameters"]["w"]["weight"].update(
            fragments=[{"file": "state-00000.safetensors", "start": 0, "length": 12}]
        ),
        lambda index: index.update(optimizer_groups={}),
        lambda index: index.update(world_size=2),
        lambda index: index["files"].pop("rng-00000.safetensors"),
    ],
)
def test_an_index_without_a_digest_must_fit_the_files(
    change: Callable[[dict[str, Any]], object], tmp_path: Path
) -> None:
    save(tmp_path, 5)
    folder = save(tmp_path, 10)
    without_digest(folder, lambda index: None)
    CheckpointReader(folder).verify()
    without_digest(save(tmp_path, 10), change)
    reader, damaged = newest_intact(tmp_path)
    assert reader is not None
    assert reader.index["step"] == 5
    assert "step-00000010" in damaged[0]


def test_a_file_that_cannot_be_read_counts_as_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5)
    save(tmp_path, 10)

    def fails(path: Path) -> str:
        if "step-00000010" in str(path):
            raise OSError(5, "Input/output error")
        return file_sha256(path)

    monkeypatch.setattr(store, "file_sha256", fails)
    reader, damaged = newest_intact(tmp_path)
    assert reader is not None
    assert reader.index["step"] == 5
    assert "Input/output error" in damaged[0]


def test_the_last_good_checkpoint_is_never_deleted(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20):
        save(tmp_path, step)
    for step in (15, 20):
        (tmp_path / f"step-{step:08d}" / "state-00000.safetensors").write_bytes(b"")
    assert prune(tmp_path, keep_last=2, keep_every_steps=None) == [tmp_path / "step-00000005"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000015", "step-00000020"]
    (tmp_path / "step-00000010" / "rng-00000.safetensors").unlink()
    assert prune(tmp_path, keep_last=1, keep_every_steps=None) == []  # people may save what can be saved
    save(tmp_path, 3)
    assert prune(tmp_path, 1, None, intact=tmp_path / "step-00000003") == [
        tmp_path / "step-00000010",
        tmp_path / "step-00000015",
    ]


def test_a_deletion_that_was_interrupted_does_not_look_like_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (5, 10):
        save(tmp_path, step)

    def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store.shutil, "rmtree", lambda folder, ignore_errors=False: None if ignore_errors else dies())
        with pytest.raises(KeyboardInterrupt):
            prune(tmp_path, 1, None)
    reader, damaged = newest_intact(tmp_path)
    assert reader is not None
    assert (reader.index["step"], damaged) == (10, [])
    assert [path.name for path in store.list_unfinished(tmp_path)] == ["step-00000005.tmp"]
    store.clear_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_files_are_read_by_several_threads_and_every_damaged_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path, 5)
    together = threading.Barrier(2)

    def hashed(path: Path) -> str:
        together.wait(60)  # passes only if two files are read at the same time
        return "0" * 64

    monkeypatch.setattr(store, "file_sha256", hashed)
    monkeypatch.setattr(store, "verifying_threads", lambda: 2)
    with pytest.raises(CheckpointError) as raised:
        CheckpointReader(folder).verify()
    assert [line.partition(": ")[0] for line in str(raised.value).splitlines()] == [
        str(folder / name) for name in ("rng-00000.safetensors", "state-00000.safetensors")
    ]
