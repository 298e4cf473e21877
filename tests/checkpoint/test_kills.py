"""A run that is killed again and again ends in the bits of one that was left alone."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.checkpoint.store import CheckpointReader, step_folders
from tests.checkpoint.kills import PHASES, attempt
from tests.distributed.scenarios import metrics, newest, tensors
from tests.distributed.test_deepspeed import zero_engine

STEPS = 6
SHORT = {
    "train.total_tokens": STEPS * 768,
    "schedule.warmup_tokens": 0,
    "data.validation_fraction": 0.0,
    "checkpoint.save_every_steps": 2,
    "train.micro_batch_sequences": 12,
}
EXACT = ("step", "tokens", "loss", "lr", "adamw_lr", "grad_norm", "batch_sha256")


def check_nothing_half_written(root: Path) -> None:
    """Whatever has the name of a checkpoint is one."""
    for folder in step_folders(root / "tiny" / "checkpoints"):
        CheckpointReader(folder).verify()


def check_same(found: Path, expected: Path) -> None:
    """Two finished runs are equal to the bit, and no step was logged twice or lost."""
    assert metrics(found, *EXACT) == metrics(expected, *EXACT)
    wanted, got = tensors(expected), tensors(found)
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(got[key], value), key
    for key in ("data_state", "optimizer_groups", "counters"):
        first, second = newest(found).index[key], newest(expected).index[key]  # type: ignore[literal-required]
        if key == "counters":
            first, second = ({k: v for k, v in c.items() if k != "train_seconds"} for c in (first, second))
        assert first == second


def test_a_chain_of_kills_changes_nothing(tmp_path: Path) -> None:
    """Each resume is the next kill: in the first save; in a step; while a checkpoint is loaded; in the middle of a
    file; before anything is loaded; in the second save of a process."""
    events = attempt(1, tmp_path / "whole", SHORT)
    assert events is not None
    assert events["save"] > 130  # so the last one is in the second save
    moments = [("save", 4), ("step", 22), ("start", 12), ("save", 60), ("start", 4), ("save", 120)]
    for phase, number in moments:
        assert attempt(1, tmp_path / "killed", SHORT, phase, number) is None, (phase, number, events)
        check_nothing_half_written(tmp_path / "killed")
    assert attempt(1, tmp_path / "killed", SHORT) is not None
    check_same(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.long
@pytest.mark.parametrize(
    ("engine", "world_size", "changes"),
    [("plain", 2, {}), ("zero 1", 2, zero_engine(1)), ("zero 3", 2, zero_engine(3))],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_killed_at_many_moments(
    engine: str, world_size: int, changes: dict[str, Any], tmp_path: Path, record_property: Any
) -> None:
    """34 moments an engine, at least 10 in a save, 10 in a step and 5 during start-up or load."""
    wanted = {"save": 12, "step": 12, "start": 10}
    settings = {**SHORT, **changes, "train.total_tokens": 12 * 768}
    rng = random.Random(engine)
    events = attempt(world_size, tmp_path / "whole", settings)
    assert events is not None
    most = {phase: events[phase] for phase in PHASES} | {"start": 20}
    killed: Counter[str] = Counter()
    log: list[tuple[str, int, int]] = []
    root, chain = tmp_path / "killed-0", 0
    while any(killed[phase] < count for phase, count in wanted.items()):
        assert len(log) < 300
        phase = rng.choice([phase for phase, count in wanted.items() if killed[phase] < count])
        number, rank = rng.randint(1, most[phase]), rng.randrange(world_size)
        if attempt(world_size, root, settings, phase, number, rank) is None:
            killed[phase] += 1
            log.append((phase, number, rank))
            check_nothing_half_written(root)
        else:  # it ended before the moment came
            check_same(root, tmp_path / "whole")
            shutil.rmtree(root)
            chain += 1
            root = tmp_path / f"killed-{chain}"
    assert attempt(world_size, root, settings) is not None
    check_same(root, tmp_path / "whole")
    record_property("kills", json.dumps(log))
    print(f"{engine}: {dict(killed)}: {log}")
