"""Several processes score each item once, and get what one process gets."""

from __future__ import annotations

import os
import pickle
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance

from eval import models, sources
from eval.errors import EvalError, TeamError
from eval.harness import _device, evaluate
from eval.hub import Snapshot
from eval.results import read_result
from eval.schema import EvalResult
from eval.score_cache import ScoreCache
from eval.scoring import ContinuationScorer, Score
from eval.sharing import divide, joined_team
from pretrain.cli import evaluation_run, main
from pretrain.processes.environment import World
from pretrain.processes.torchrun import free_port
from tests.eval.conftest import NUM_ITEMS, cache_with_items, export_model, small_llama
from tests.eval.forked import run_ranks

TASKS = ["hellaswag", "winogrande", "piqa"]
PER_TOKEN = 2e-5
MOST_TOKENS = 40  # of a made-up choice


def made_up_requests(seed: int, items: int) -> list[Instance]:
    rng = random.Random(seed)
    requests = []
    for item in range(items):
        context = "c" * rng.randrange(1, 1000)
        for choice in range(rng.choice((1, 2, 4))):
            arguments = (context, "e" * rng.randrange(1, 30))
            requests.append(Instance("loglikelihood", {}, arguments, choice, (f"task{item % 3}", item, 1)))
    return requests


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
def test_requests_are_divided_once_by_item_and_evenly_by_length(parts: int) -> None:
    requests = made_up_requests(parts, 400)
    known = set(random.Random(0).sample(range(len(requests)), len(requests) // 3))
    shares = divide(requests, known, parts)
    assert sorted(index for share in shares for index in share) == list(range(len(requests)))
    owners = {(requests[i].task_name, requests[i].doc_id): part for part, share in enumerate(shares) for i in share}
    assert all(
        owners[requests[i].task_name, requests[i].doc_id] == part for part, share in enumerate(shares) for i in share
    )
    costs = [0] * parts
    for part, share in enumerate(shares):
        assert share == sorted(share)
        items: dict[Any, int] = {}
        for index in set(share) - known:
            context, ending = requests[index].args
            items[requests[index].doc_id] = len(context)
            costs[part] += len(ending) + 16
        costs[part] += sum(items.values())
    assert max(costs) - min(costs) <= 60  # the cost of a short item
    assert divide(requests, known, parts) == shares


def test_there_may_be_more_processes_than_items() -> None:
    shares = divide(made_up_requests(1, 2), set(), 5)
    assert sum(map(bool, shares)) == 2


def shared(model: Path, given: dict[str, Any], counted: Path) -> Callable[[], EvalResult]:
    """Evaluate with the others; each rank writes the requests that it scores to a file of its own."""

    def work() -> EvalResult:
        real = ScoreCache.add

        def add(self: ScoreCache, scores: Mapping[str, Score]) -> None:
            with (counted / os.environ.get("RANK", "alone")).open("a") as file:
                file.writelines(f"{key}\n" for key in scores)
            real(self, scores)

        ScoreCache.add = add  # type: ignore[method-assign]
        with joined_team() as team:
            return evaluate(model, TASKS, team=team, **given)

    return work


def own_cache(fetched: Mapping[str, Any], cache: Path) -> dict[str, Any]:
    return {**fetched, "cache": cache_with_items(fetched, cache), "batch_size": 4, "keep_scores": True}


def same(one: EvalResult, other: EvalResult) -> None:
    assert list(one["tasks"]) == list(other["tasks"])
    for name, task in one["tasks"].items():
        for item, twin in zip(task["items"], other["tasks"][name]["items"], strict=True):
            assert [item["doc_hash"], item["acc"], item.get("acc_norm")] == [
                twin["doc_hash"],
                twin["acc"],
                twin.get("acc_norm"),
            ]
            assert item["log_likelihoods"] == pytest.approx(twin["log_likelihoods"], abs=PER_TOKEN * MOST_TOKENS)
        assert [task["acc"], task["acc_stderr"], task["num_truncated_requests"]] == [
            other["tasks"][name]["acc"],
            other["tasks"][name]["acc_stderr"],
            other["tasks"][name]["num_truncated_requests"],
        ]


@pytest.fixture(scope="module")
def alone(model_folder: Path, fetched: dict[str, Any]) -> EvalResult:
    return evaluate(model_folder, TASKS, **{**fetched, "batch_size": 4})


@pytest.mark.parametrize(("processes", "per_node"), [(2, 2), (4, 2)])
def test_each_item_is_scored_once_and_the_result_is_that_of_one_process(
    tmp_path: Path, model_folder: Path, fetched: dict[str, Any], alone: EvalResult, processes: int, per_node: int
) -> None:
    given = own_cache(fetched, tmp_path / "cache")
    answers = run_ranks(processes, shared(model_folder, given, tmp_path), per_node)
    assert [error for _, error in answers] == [None] * processes
    for result, _ in answers:
        same(result, alone)
    scored = [(tmp_path / str(rank)).read_text().split() for rank in range(processes)]
    counts = Counter(key for keys in scored for key in keys)
    assert set(counts.values()) == {1}
    requests = answers[0][0]["requests"]
    assert sum(requests["scored_by_rank"]) + requests["reused"] == NUM_ITEMS * (4 + 2 + 2)
    # By rank, requests differ in number, since items differ in length; none is idle.
    assert min(requests["scored_by_rank"]) > NUM_ITEMS * 8 / processes / 2
    again = run_ranks(2, shared(model_folder, given, tmp_path / "none"))
    assert [error for _, error in again] == [None, None]
    assert again[0][0]["requests"]["scored_by_rank"] == [0, 0]


def test_a_rank_that_fails_ends_the_others_and_says_why(
    tmp_path: Path, model_folder: Path, fetched: dict[str, Any]
) -> None:
    given = own_cache(fetched, tmp_path / "cache")

    def work() -> int:
        batches = []
        real = ContinuationScorer._score

        def score(self: ContinuationScorer, batch: Any) -> Any:
            batches.append(batch)
            if os.environ["RANK"] == "1" and len(batches) == 2:
                raise MemoryError("no room on this rank")
            if os.environ["RANK"] == "0" and len(batches) == 3:
                time.sleep(3)
            return real(self, batch)

        ContinuationScorer._score = score  # type: ignore[method-assign]
        try:
            with joined_team() as team:
                evaluate(model_folder, TASKS, team=team, **given)
        finally:
            (tmp_path / f"batches{os.environ['RANK']}").write_text(str(len(batches)))
        return 0

    (_, first), (_, second) = run_ranks(2, work)
    assert second is not None
    assert "MemoryError: no room on this rank" in second
    assert first is not None
    assert "rank 1 on" in first
    assert "MemoryError: no room on this rank" in first
    assert int((tmp_path / "batches0").read_text()) <= 4  # of about 20


def fails_on_rank_1(error: Exception) -> Callable[[], str]:
    def work() -> str:
        def attempt() -> None:
            if os.environ["RANK"] == "1":
                raise error

        with joined_team() as team:
            try:
                team.together(attempt)
            except TeamError as bad:
                return f"{bad}; {team.on_first(lambda: os.environ['RANK'])}"
        return "nothing"

    return work


def test_bad_input_on_one_rank_is_bad_input_on_all_which_stay_together() -> None:
    answers = run_ranks(2, fails_on_rank_1(EvalError("no such file")))
    assert answers[0] == answers[1]
    assert answers[0] == (f"no such file (on rank 1, host {socket.gethostname()}); 0", None)


def test_any_other_error_ends_all() -> None:
    (_, first), (_, second) = run_ranks(2, fails_on_rank_1(MemoryError("no room")))
    assert "PeerError: rank 1 on" in str(first)
    assert "MemoryError: no room" in str(second)


def test_processes_that_find_different_models_are_refused(
    tmp_path: Path, model_folder: Path, fetched: dict[str, Any]
) -> None:
    folders = [model_folder, export_model(tmp_path / "other", small_llama(seed=1))]

    def work() -> None:
        with joined_team() as team:
            evaluate(folders[team.ranks.rank], ["winogrande"], team=team, limit=2, **fetched)

    for _, error in run_ranks(2, work):
        assert "TeamError: the processes have different models at" in str(error)
        assert "rank 1 on" in str(error)


def test_the_first_process_decides_what_a_branch_stands_for(
    tmp_path: Path, model_folder: Path, fetched: dict[str, Any]
) -> None:
    """Another one whose request fails would fall back to what it has in its cache."""
    commits = {"new": model_folder, "old": export_model(tmp_path / "other", small_llama(seed=1))}

    def find(name: str, revision: str | None, *, with_code: bool) -> Snapshot:
        commit = revision or ("new", "old")[int(os.environ["RANK"])]
        return Snapshot(commits[commit], commit, "")

    def work() -> EvalResult:
        sources.find_snapshot = models.find_snapshot = find
        with joined_team() as team:
            return evaluate("org/name", ["winogrande"], team=team, limit=2, **fetched)

    for result, error in run_ranks(2, work):
        assert error is None
        assert result["model"]["revision"] == "new"


def test_all_processes_skip_a_model_that_cannot_be_loaded(
    tmp_path: Path, model_folder: Path, fetched: dict[str, Any]
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("[]")

    def work() -> int:
        evaluation_run.evaluation = partial(evaluation_run.evaluation, package=fetched["package"])
        os.environ["AURORA_CACHE"] = str(fetched["cache"])
        words = ["--tasks", "winogrande", "--limit", "2", "--no-cache", "--out", str(tmp_path / "out")]
        return main(["eval", str(broken), str(model_folder), *words])

    assert run_ranks(2, work) == [(2, None), (2, None)]
    assert len(read_result(tmp_path / "out" / model_folder.name)["requests"]["scored_by_rank"]) == 2


@pytest.mark.parametrize("name", ["cuda", None])
def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    monkeypatch.setattr("eval.harness.world", lambda: World(5, 1, 8))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _device(name) == torch.device("cuda:1")
    assert _device("cpu") == torch.device("cpu")
    with pytest.raises(EvalError, match=r"device cuda:0 is one for all of 8 processes.*pass --device cuda"):
        _device("cuda:0")


def launched(folder: Path, model: Path, fetched: Mapping[str, Any], **environment: str) -> list[tuple[int, str]]:
    """Evaluate on two simulated nodes of two processes; return exit code and standard error of each launcher."""
    folder.mkdir()
    (folder / "package").write_bytes(pickle.dumps(fetched["package"]))
    given = {"MADE_UP_PACKAGE": str(folder / "package"), "AURORA_CACHE": str(cache_with_items(fetched, folder / "c"))}
    port = str(free_port())
    launchers = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "pretrain.processes", "--nnodes", "2", "--nproc-per-node", "2"),
                *("--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", port),
                *("-m", "tests.eval.made_up_command", "eval", str(model), "--suite", "core", "--batch-size", "2"),
                *("--out", str(folder / "out")),
            ],
            env={**os.environ, **given, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", **environment},
            cwd=Path(__file__).parents[2],
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    try:
        return [(launcher.wait(300), launcher.communicate()[1]) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()


@pytest.mark.long
def test_two_launchers_share_an_evaluation(
    tmp_path: Path, model_folder: Path, fetched: dict[str, Any], alone: EvalResult
) -> None:
    ended = launched(tmp_path / "whole", model_folder, fetched)
    assert [code for code, _ in ended] == [0, 0], ended
    result = read_result(tmp_path / "whole" / "out")
    assert len(result["requests"]["scored_by_rank"]) == 4
    assert sum(result["requests"]["scored_by_rank"]) + result["requests"]["reused"] == NUM_ITEMS * 6
    for name, task in result["tasks"].items():
        assert task["acc"] == alone["tasks"][name]["acc"]

    ended = launched(tmp_path / "broken", model_folder, fetched, FAULTY_RANK="3")
    assert [code for code, _ in ended] == [1, 1], ended
    assert "MemoryError: no room on this rank" in ended[1][1]
    assert ended[1][1].count("Traceback") == 1
    assert "without reporting" not in ended[0][1]  # both nodes are one host here, where rank 3 has said it already
    assert not (tmp_path / "broken" / "out").exists()
