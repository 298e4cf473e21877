"""A checkpoint of any engine continues under any other: weights, state, counters and data position are its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.hand_overs import Outcome, copied, elements, hand_over
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import distance, metrics, newest, run, run_with_fault
from tests.distributed.test_deepspeed import DENSE

STEPS = 8
RUN: dict[str, Any] = DENSE | {
    "train.total_tokens": STEPS * 384,
    # Row scales are kept from step to step: by their owner, or with their rows.
    "optimizer.row_balance": "carried",
    "model.intermediate_size": 52,  # 3 ranks have 18, 18 and 16 rows
}
WIRE = {"engine.wire_dtype": "fp32"}
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "zero1": {"engine.kind": "deepspeed", "engine.zero_stage": 1, **WIRE},
    "zero2": {"engine.kind": "deepspeed", "engine.zero_stage": 2, **WIRE},
    "zero3": {"engine.kind": "deepspeed", "engine.zero_stage": 3, **WIRE},
    "fsdp2": {"engine.kind": "fsdp2", **WIRE},
}
EXACT = ("step", "tokens", "batch_sha256", "lr", "adamw_lr")


def settings(engine: str, **more: Any) -> dict[str, Any]:
    return RUN | ENGINES[engine] | more


def check_loaded(source: Path, outcomes: list[Outcome], copies: int, code: int = 0) -> None:
    """Every rank has loaded what the checkpoint says, and together they have loaded all of it, `copies` times."""
    total = Counter[tuple[str, str]]()
    for exit_code, wrong, counts in outcomes:
        assert not wrong
        assert exit_code == code
        total.update(counts)
    wanted = elements(newest(source))
    assert total.keys() == wanted.keys()
    assert {key: total[key] for key in wanted if key[1] != "step"} == {
        key: count * copies for key, count in wanted.items() if key[1] != "step"
    }


def copies_of(engine: str, ranks: int, shard_ranks: int | None = None) -> int:
    """How many copies of all parameters the ranks have together."""
    return ranks // {"plain": 1, "fsdp2": shard_ranks or ranks}.get(engine, ranks)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """The run in one process, and its distance to one that sums in another order."""
    one, other = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("reversed")
    run_ranks(1, run, str(one), RUN)
    run_ranks(1, run_with_fault, str(other), RUN, "reversed")
    return one, distance(other, one)


CYCLE = [("plain", 1, {}), ("zero1", 2, {}), ("zero2", 3, {}), ("zero3", 2, {}), ("fsdp2", 3, {}), ("plain", 2, {})]
REPLICAS: list[tuple[str, int, dict[str, Any]]] = [
    ("fsdp2", 4, {"engine.shard_ranks": 2}),
    ("zero1", 2, {}),
    ("fsdp2", 2, {"engine.reshard_after_forward": False}),
    ("fsdp2", 4, {"engine.shard_ranks": 1}),
    ("plain", 1, {}),
]


@pytest.mark.parametrize("cycle", [CYCLE, pytest.param(REPLICAS, marks=pytest.mark.long)], ids=["engines", "replicas"])
def test_a_run_passes_through_every_engine(
    whole: tuple[Path, float], tmp_path: Path, cycle: list[tuple[str, int, dict[str, Any]]]
) -> None:
    one, noise = whole
    (engine, ranks, more), *others = cycle
    run_ranks(ranks, run, str(tmp_path / "0"), settings(engine, **more), 1)
    for number, (engine, ranks, more) in enumerate(others, start=1):
        source, root = tmp_path / str(number - 1), tmp_path / str(number)
        copied(source, root)
        stop = None if number == len(others) else number + 1
        outcomes = run_ranks(ranks, hand_over, str(source), str(root), settings(engine, **more), stop)
        copies = copies_of(engine, ranks, more.get("engine.shard_ranks"))
        check_loaded(source, outcomes, copies, 0 if stop is None else 75)
    assert metrics(root, *EXACT) == metrics(one, *EXACT)
    assert distance(root, one) <= 3 * noise


@pytest.mark.long
@pytest.mark.parametrize("target", ENGINES)
def test_every_engine_continues_the_runs_of_every_engine(
    whole: tuple[Path, float], stopped: dict[str, Path], tmp_path: Path, target: str
) -> None:
    """Five of the 25 hand-overs."""
    one, noise = whole
    for name, source in stopped.items():
        root = copied(source, tmp_path / name)
        check_loaded(source, run_ranks(2, hand_over, str(source), str(root), settings(target)), copies_of(target, 2))
        assert metrics(root, *EXACT) == metrics(one, *EXACT)
        assert distance(root, one) <= 3 * noise


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each engine on 2 ranks, stopped in the middle."""
    found = {name: tmp_path_factory.mktemp(name) for name in ENGINES}
    for name, root in found.items():
        assert run_ranks(2, run, str(root), settings(name), 4) == [75, 75]
    return found


@pytest.mark.parametrize("target", ["fsdp2", pytest.param("plain", marks=pytest.mark.long)])
def test_rows_that_are_permuted_are_noticed(whole: tuple[Path, float], tmp_path: Path, target: str) -> None:
    source = tmp_path / "source"
    run_ranks(1, run, str(source), RUN, 4)
    copied(source, tmp_path / "target")
    arguments = (str(source), str(tmp_path / "target"), settings(target), None, True)
    for _, wrong, _ in run_ranks(2, hand_over, *arguments):
        assert wrong == ["weight of model.layers.0.self_attn.q_proj.weight"]
    one, noise = whole
    assert distance(tmp_path / "target", one) > 100 * noise
