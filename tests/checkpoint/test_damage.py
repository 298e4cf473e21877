"""No damage of a checkpoint goes unnoticed, and the checkpoint before it is used."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pretrain.checkpoint.format import CheckpointError
from pretrain.checkpoint.store import CheckpointReader, list_checkpoints, newest_intact
from pretrain.cli import main
from pretrain.config import Config, parse_config
from pretrain.export.run import open_checkpoint
from pretrain.launch import train
from pretrain.run.folder import RunFolder
from tests.checkpoint.test_store import save
from tests.conftest import TINY, merged
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import metrics, run
from tests.distributed.test_deepspeed import zero_engine

MakeConfig = Callable[..., Config]
SHORT = {
    "train.total_tokens": 6 * 768,
    "schedule.warmup_tokens": 0,
    "data.validation_fraction": 0.0,
    "checkpoint.save_every_steps": 2,
    "checkpoint.keep_last": 9,
}


def flip(path: Path, rng: random.Random) -> tuple[int, int]:
    """Flip one bit of a file; return its byte and bit."""
    content = bytearray(path.read_bytes())
    place, bit = rng.randrange(len(content)), rng.randrange(8)
    content[place] ^= 1 << bit
    path.write_bytes(content)
    return place, bit


def check_flips(root: Path, count: int, rng: random.Random) -> None:
    """Flip bits over every file of the newest checkpoint, one at a time; each is named, and the one before used."""
    *_, before, newest = list_checkpoints(root)
    files = sorted(newest.iterdir())
    for turn in range(count):
        victim = files[turn % len(files)]
        content = victim.read_bytes()
        place = flip(victim, rng)
        reader, damaged = newest_intact(root)
        assert reader is not None
        assert reader.folder == before, (victim, place)
        assert len(damaged) == 1
        assert str(victim) in damaged[0]
        with pytest.raises(CheckpointError, match=victim.name):
            CheckpointReader(newest).verify()
        victim.write_bytes(content)
    assert newest_intact(root)[1] == []


def test_no_flipped_bit_goes_unnoticed(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path, step)
    check_flips(tmp_path, 60, random.Random(1))


@pytest.mark.long
@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        pytest.param(1, {}, id="plain"),
        pytest.param(2, zero_engine(1), id="zero 1"),
        pytest.param(2, zero_engine(3), id="zero 3"),
    ],
)
def test_no_flipped_bit_of_a_run_goes_unnoticed(world_size: int, changes: dict[str, object], tmp_path: Path) -> None:
    """200 places for each engine, over indexes, tensors and random generators of all ranks."""
    assert set(run_ranks(world_size, run, str(tmp_path), SHORT | changes, 4)) == {75}
    check_flips(tmp_path / "tiny" / "checkpoints", 200, random.Random(world_size))


def truncate(folder: Path) -> Path:
    path = folder / "state-00000.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    return path


def delete_index(folder: Path) -> Path:
    (folder / "index.json").unlink()
    return folder


def flip_index(folder: Path) -> Path:
    path = folder / "index.json"
    text = path.read_text()
    assert "0.95" in text  # momentum and others: 0.95 becomes 0.85 by two bits, and 0.94 by one
    path.write_text(text.replace("0.95", "0.94", 1))
    return path


@pytest.fixture(scope="module")
def run_to_step_4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run with checkpoints of steps 2 and 4."""
    root = tmp_path_factory.mktemp("run")
    assert train(parse_config(merged(TINY, {"run.root": str(root), **SHORT})), stop_at=4) == 75
    return root


@pytest.mark.parametrize("damage", [truncate, delete_index, pytest.param(flip_index, marks=pytest.mark.long)])
def test_damage_is_named_and_the_checkpoint_before_it_is_used(
    damage: Callable[[Path], Path],
    tmp_path: Path,
    run_to_step_4: Path,
    tiny_config: MakeConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(run_to_step_4, tmp_path / "runs")
    config = tiny_config(SHORT)
    root = config.run_folder / "checkpoints"
    named = damage(root / "step-00000004")
    capsys.readouterr()
    assert train(config, stop_at=5) == 75
    out = capsys.readouterr().out
    assert f"warning: {named}: " in out
    assert (
        "falling back to step-00000002: the steps after 2 are trained again, and the damaged checkpoint and the "
        "metrics lines of those steps are set aside, not deleted"
    ) in out
    assert [folder.name for folder in (root / "discarded").iterdir()] == ["step-00000004"]
    assert metrics(config.run_folder.parent, "step") == [[step] for step in range(1, 6)]
    assert RunFolder(config.run_folder).metrics.path.with_suffix(".discarded.jsonl").read_text().count("\n") == 2


def test_an_export_says_which_checkpoint_it_passed_over(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path / "checkpoints", step)
    delete_index(tmp_path / "checkpoints" / "step-00000010")
    with pytest.warns(UserWarning, match=r"step-00000010: .*no index\.json.*; using step-00000005"):
        assert open_checkpoint(tmp_path).folder.name == "step-00000005"


def verify_on_two(root: str) -> tuple[list[str], list[str]]:
    """What two ranks find in the newest checkpoint, and the files that this one has read."""
    import os

    import torch.distributed as dist

    from pretrain.checkpoint import store
    from pretrain.engine.ranks import Ranks

    dist.init_process_group("gloo")
    read, digest = [], store.file_sha256

    def counted(path: Path) -> str:
        read.append(path.name)
        return digest(path)

    store.file_sha256 = counted
    ranks = Ranks(int(os.environ["RANK"]), 2, dist.group.WORLD)
    reader, damaged = newest_intact(Path(root), ranks)
    dist.destroy_process_group()
    return [*damaged, str(reader and reader.folder.name)], read


def test_ranks_share_the_reading_and_agree(tmp_path: Path) -> None:
    for step in (5, 10):
        save(tmp_path, step)
    victim = tmp_path / "step-00000010" / "state-00000.safetensors"
    flip(victim, random.Random(0))
    (first, read), (second, also_read) = run_ranks(2, verify_on_two, str(tmp_path))
    assert first == second == [f"{victim}: damaged (its sha256 is not the recorded one)", "step-00000005"]
    assert read == ["rng-00000.safetensors"] * 2
    assert also_read == ["state-00000.safetensors"] * 2


def make_run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 5 to 20, without the rest."""
    for step in (5, 10, 15, 20):
        save(tmp_path / "run" / "checkpoints", step)
    return tmp_path / "run"


def test_checkpoints_are_listed_and_verified(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_run(tmp_path)
    root = path / "checkpoints"
    delete_index(root / "step-00000010")
    victim = truncate(root / "step-00000015")
    (root / "step-00000025.tmp").mkdir()
    assert main(["checkpoint", "list", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["checkpoint", *(f"step-{step:08d}" for step in (5, 10, 15, 20)), "step-00000025.tmp"]
    assert [line.split()[0] for line in lines] == names
    assert "no index.json" in lines[2]
    assert lines[-1].endswith("unfinished")
    assert main(["checkpoint", "verify", str(path)]) == 2
    out, err = capsys.readouterr()
    assert [line.partition(": ")[0] for line in out.splitlines()] == [
        str(root / f"step-{step:08d}") for step in (5, 20)
    ]
    assert [line.partition(": ")[2].partition(": ")[0] for line in err.splitlines()] == [
        str(root / "step-00000010"),
        str(victim),
    ]
    assert main(["checkpoint", "verify", str(root / "step-00000020")]) == 0
    assert main(["checkpoint", "verify", str(victim.parent)]) == 2
    assert main(["checkpoint", "verify", str(tmp_path)]) == 2
    assert "not the folder of a run with checkpoints" in capsys.readouterr().err
    shutil.rmtree(root)
    root.mkdir()
    assert main(["checkpoint", "verify", str(path)]) == 2
    assert "the run has no checkpoint" in capsys.readouterr().err


def test_a_checkpoint_under_the_name_of_another_step_is_damaged_to_every_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_run(tmp_path)
    root = path / "checkpoints"
    (root / "step-00000015").rename(root / "step-00000016")
    shutil.copytree(root / "step-00000005", tmp_path / "best")
    problem = f"{root}/step-00000016/index.json: damaged: it is the index of step 15"
    for words in ([str(path)], [str(root / "step-00000016")]):
        assert main(["checkpoint", "verify", *words]) == 2
        assert capsys.readouterr().err == f"error: {problem}\n"
    assert main(["checkpoint", "list", str(path)]) == 0
    assert "index.json: damaged: it is the index of step 15" in capsys.readouterr().out.splitlines()[3]
    assert main(["export", str(root / "step-00000016"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {problem}\n"
    assert main(["checkpoint", "verify", str(tmp_path / "best")]) == 0  # a copy may have any other name


def test_checkpoints_are_pruned_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_run(tmp_path)
    root = path / "checkpoints"
    (root / "step-00000025.tmp").mkdir()
    arguments = ["checkpoint", "prune", str(path), "--keep-last", "1", "--keep-every-steps", "10"]
    before = sorted(root.rglob("*"))
    assert main([*arguments, "--dry-run"]) == 0
    assert sorted(root.rglob("*")) == before
    planned = capsys.readouterr().out
    assert main(arguments) == 0
    done = capsys.readouterr().out
    assert planned.replace("would delete", "deleted") == done
    assert [line.split("/")[-1] for line in done.splitlines()] == [
        "step-00000025.tmp",
        "step-00000005",
        "step-00000015",
    ]
    truncate(root / "step-00000020")
    assert main(["checkpoint", "prune", str(path), "--keep-last", "1", "--keep-every-steps", "1000"]) == 0
    assert "nothing to delete" in capsys.readouterr().out  # step 10 is the last good one
    running = RunFolder(path)
    running.lock()
    assert main(arguments) == 2
    assert "another process is training" in capsys.readouterr().err
    running.unlock()
