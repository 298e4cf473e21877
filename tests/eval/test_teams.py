"""Processes that share an evaluation stay together when a model, a text or a checkpoint cannot be evaluated."""

from __future__ import annotations

import io
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from eval import bits_per_byte
from eval.errors import EvalError, TeamError
from eval.results import read_result
from eval.scoring import ContinuationScorer
from eval.sharing import Team, joined_team
from pretrain.checkpoint.store import list_checkpoints
from pretrain.cli import evaluation_run, main
from pretrain.config import parse_config
from pretrain.launch import train
from tests.conftest import TINY, merged
from tests.eval.conftest import cache_with_items, export_model, small_llama
from tests.eval.forked import run_ranks

RANK = "RANK"


# --- the team -----------------------------------------------------------------------------------


def shares(fault: Callable[[int, Team], int]) -> Callable[[], Any]:
    def work() -> Any:
        with joined_team() as team:
            rank = team.ranks.rank
            answers: list[Any] = [team.shared(lambda: rank)]
            try:
                answers.append(team.shared(lambda: fault(rank, team)))
            except TeamError as error:
                answers.append(str(error).partition(" (")[0])
            answers.append(team.shared(lambda: 10 * rank))
            return answers

    return work


def test_what_one_process_cannot_do_ends_the_work_of_the_others_at_their_next_check() -> None:
    def fault(rank: int, team: Team) -> int:
        if rank == 1:
            raise EvalError("no such thing\nand more")
        for _ in range(10_000):  # until the other one has given up
            team.check()
            time.sleep(0.01)
        raise AssertionError("nobody gave up")

    for answers, error in run_ranks(3, shares(fault)):
        assert error is None
        assert answers == [[0, 1, 2], "no such thing\nand more", [0, 10, 20]]


def test_processes_do_what_the_first_one_decides_and_end_with_it() -> None:
    def work() -> list[int | str]:
        done: list[int | str] = []

        def job(number: int | None) -> int:
            if number == 2:
                raise TeamError("not this one")
            done.append(number or 0)
            return 100 * (number or 0)

        def lead(ask: Callable[[int | None], int]) -> None:
            assert ask(1) == 100
            with pytest.raises(TeamError):
                ask(2)
            assert ask(None) == 0
            raise EvalError("the end")

        with joined_team() as team:
            team.led(lambda ask: ask(7), job)
            try:
                team.led(lead, job)
            except EvalError as error:
                done.append(str(error))
        return done

    assert run_ranks(2, work) == [([7, 1, 0, "the end"], None)] * 2


# --- several models -----------------------------------------------------------------------------


def test_a_model_that_one_process_cannot_evaluate_is_recorded_and_the_others_are_evaluated(
    tmp_path: Path, fetched: dict[str, Any]
) -> None:
    """One process fails to score, one fails to measure a text, the first one cannot write, and the rest is well."""
    names = ["scored", "measured", "written", "good"]
    folders = [export_model(tmp_path / name, small_llama(seed=seed)) for seed, name in enumerate(names)]
    (tmp_path / "sea.jsonl").write_text('{"text": "The old whale ran upon the sea."}\n' * 4)
    cache, out = cache_with_items(fetched, tmp_path / "cache"), tmp_path / "out"
    real_score, real_bits, real_write = ContinuationScorer._score, bits_per_byte._score, evaluation_run.write_result

    def work() -> tuple[int, int, str]:
        os.environ["AURORA_CACHE"] = str(cache)
        batches: list[str] = []

        def score(self: ContinuationScorer, batch: Any) -> Any:
            batches.append(Path(self.model.name_or_path).name)
            if os.environ[RANK] == "1" and batches == ["scored"]:
                raise EvalError("damaged")
            if os.environ[RANK] == "0" and batches == ["scored"] * 3:
                time.sleep(1.5)  # meanwhile the other one gives up
            return real_score(self, batch)

        def bits(scorer: ContinuationScorer, *arguments: Any) -> Any:
            if os.environ[RANK] == "1" and Path(scorer.model.name_or_path).name == "measured":
                raise EvalError("no text")
            return real_bits(scorer, *arguments)

        def write(result: Any, folder: Path) -> Path:
            if folder.name == "written":
                raise EvalError("no room")
            return real_write(result, folder)

        ContinuationScorer._score = score  # type: ignore[method-assign]
        bits_per_byte._score, evaluation_run.write_result = bits, write
        evaluation_run.evaluation = partial(evaluation_run.evaluation, package=fetched["package"])
        words = ["--tasks", "winogrande,piqa", "--batch-size", "2", "--bits-per-byte", str(tmp_path / "sea.jsonl")]
        with redirect_stderr(io.StringIO()) as said:
            code = main(["eval", *map(str, folders), *words, "--out", str(out)])
        return code, batches.count("scored"), said.getvalue()

    (first, none), (second, other) = run_ranks(2, work)
    assert (none, other) == (None, None)
    assert (first[0], second[0]) == (2, 2)
    assert first[1] <= 4  # of about 20
    assert second[1] == 1
    for name, problem in (("scored", "damaged (on rank 1"), ("measured", "no text (on rank 1"), ("written", "no room")):
        assert f"{name}: {problem}" in first[2]
        assert f"error: {name}: {problem}" in first[2] + second[2]
    assert [path.parent.name for path in out.glob("*/results.json")] == ["good"]
    requests = read_result(out / "good")["requests"]["scored_by_rank"]
    assert len(requests) == 2
    assert min(requests) > 0


# --- the checkpoints of a run -------------------------------------------------------------------


def test_processes_share_the_checkpoints_of_a_run(
    tmp_path: Path, fetched: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_with_items(fetched, tmp_path / "cache")
    short = {"train.total_tokens": 3 * 768, "schedule.warmup_tokens": 0, "data.validation_fraction": 0.0}
    config = parse_config(
        merged(TINY, short | {"run.root": str(tmp_path), "checkpoint.save_every_steps": 1, "checkpoint.keep_last": 3})
    )
    assert train(config) == 0
    checkpoints = list_checkpoints(config.run_folder / "checkpoints")
    for file in checkpoints[1].glob("*.safetensors"):
        file.write_bytes(b"damaged")

    def work(*words: str) -> tuple[int, str]:
        os.environ["AURORA_CACHE"] = str(cache)
        evaluation_run.evaluation = partial(evaluation_run.evaluation, package=fetched["package"])
        command = ["eval", str(config.run_folder), "--every-checkpoint", "--tasks", "winogrande", "--no-cache"]
        with redirect_stderr(io.StringIO()) as said:
            code = main([*command, "--limit", "4", *words])
        return code, said.getvalue()

    for words, problem in (([], "damaged"), (["--selection", "spread"], "choose another --out")):
        (first, none), (second, other) = run_ranks(2, partial(work, *words))
        assert (none, other) == (None, None)
        assert first[0] == second[0] == 2
        assert "step-00000002" in first[1] + second[1]
        assert problem in first[1] + second[1]
    found = sorted((config.run_folder / "eval").glob("*/results.json"))
    assert [file.parent.name for file in found] == [checkpoints[0].name, checkpoints[2].name]
    for file in found:
        result = read_result(file)
        assert sum(result["requests"]["scored_by_rank"]) == 8
        assert min(result["requests"]["scored_by_rank"]) > 0
    alone = tmp_path / "alone"
    shutil.copytree(config.run_folder / "eval", tmp_path / "shared")
    monkeypatch.setenv("AURORA_CACHE", str(cache))
    monkeypatch.setattr(evaluation_run, "evaluation", partial(evaluation_run.evaluation, package=fetched["package"]))
    command = ["eval", str(config.run_folder), "--every-checkpoint", "--tasks", "winogrande", "--limit", "4"]
    assert main([*command, "--out", str(alone)]) == 2
    for file in found:
        one, two = (json.loads(path.read_text())["tasks"] for path in (file, alone / file.parent.name / file.name))
        outcomes = [[(item["doc_hash"], item["acc"]) for item in task["winogrande"]["items"]] for task in (one, two)]
        assert outcomes[0] == outcomes[1]
