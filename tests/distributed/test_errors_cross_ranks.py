"""An error on one rank reaches the others, wherever it happens: nobody waits for a rank that has failed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from pretrain.checkpoint import writer
from pretrain.engine.ranks import Ranks
from pretrain.launch import records
from pretrain.neurons import telemetry
from pretrain.processes.errors import PeerError, UserError
from pretrain.processes.exit_codes import BAD_INPUT, FAILED
from pretrain.run.folder import RunFolder
from pretrain.run.json_lines import JsonLines
from pretrain.run.wandb import NoTracker
from tests.distributed.ranks import run_ranks
from tests.distributed.scenarios import run

SHORT: dict[str, Any] = {
    "train.total_tokens": 4 * 768,
    "schedule.warmup_tokens": 0,
    "checkpoint.save_every_steps": 1,
    "checkpoint.keep_last": 1,
    "telemetry.every_steps": 2,
    "telemetry.reference_step": 2,
}
FAULTS = {
    "metrics": (JsonLines, "append", 0),
    "telemetry": (telemetry, "save_arrays", 0),
    "tracker": (NoTracker, "log", 1),
    "prune": (records, "prune", 0),
    "write": (writer, "_write_rank", 1),
    "publish": (writer, "_publish", 0),
    "lock": (RunFolder, "lock", 0),
    "manifest": (RunFolder, "write_manifest", 0),
}
"""What breaks, and on which rank."""
WARNINGS = {"telemetry", "prune"}
"""What ends no run if the disk is at fault, but does otherwise."""


def broken_run(root: str, fault: str) -> tuple[str, str, int | None]:
    """Train with something that breaks on one rank; the error that this rank saw, its text and exit code."""
    holder, name, culprit = FAULTS[fault]

    def breaks(*_: Any, **__: Any) -> None:
        if fault in WARNINGS:
            raise RuntimeError("No space left on device")
        raise OSError(28, "No space left on device")

    patched = (
        mock.patch.object(holder, name, breaks) if int(os.environ["RANK"]) == culprit else contextlib.nullcontext()
    )
    with patched:
        try:
            run(root, SHORT)
        except Exception as error:
            return type(error).__name__, str(error), getattr(error, "exit_code", None)
    return "none", "", None


@pytest.mark.parametrize("fault", FAULTS)
def test_both_ranks_learn_of_an_error_on_one(tmp_path: Path, fault: str) -> None:
    culprit = FAULTS[fault][2]
    found = run_ranks(2, broken_run, str(tmp_path), fault)
    kind, text, _ = found[culprit]
    assert kind == ("RuntimeError" if fault in WARNINGS else "OSError")
    assert "No space left on device" in text
    kind, text, exit_code = found[1 - culprit]
    assert (kind, exit_code) == ("PeerError", FAILED)
    assert f"rank {culprit} on " in text
    assert "No space left on device" in text


def alone(work: Any) -> Any:
    """The outcome of `together` on a single process."""
    return Ranks().together(work)


def test_a_single_process_needs_no_process_group() -> None:
    assert alone(lambda: 3) == [3]
    assert Ranks().on_rank_0(lambda: "x") == "x"
    with pytest.raises(KeyError):
        alone(lambda: {}["missing"])


def test_the_exit_code_of_bad_input_crosses_ranks() -> None:
    codes = run_ranks(2, outcome_of_together, "UserError")
    assert codes == [("UserError", BAD_INPUT), ("PeerError", BAD_INPUT)]
    codes = run_ranks(2, outcome_of_together, "MemoryError")
    assert codes == [("MemoryError", None), ("PeerError", FAILED)]


def outcome_of_together(kind: str) -> tuple[str, int | None]:
    """Rank 0 fails; what each rank raises, twice in a row, so that the ranks stay in step."""
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    ranks = Ranks(rank, 2, dist.group.WORLD)

    def work() -> int:
        if rank == 0:
            raise {"UserError": UserError, "MemoryError": MemoryError}[kind]("first line\nsecond line")
        return rank

    seen = []
    for _ in range(2):
        try:
            ranks.together(work)
        except (UserError, MemoryError, PeerError) as error:
            seen.append((type(error).__name__, getattr(error, "exit_code", None)))
    assert seen[0] == seen[1]
    assert ranks.together(lambda: rank) == [0, 1]
    assert ranks.on_rank_0(lambda: rank + 10) == 10
    dist.destroy_process_group()
    return seen[0]
