"""Scores are kept batch by batch: what was scored before a kill is not scored again, and the result is the same."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from eval.errors import EvalError
from eval.harness import evaluate, evaluation
from eval.results import read_result
from eval.schema import EvalResult
from eval.score_cache import ScoreCache, ScoreSettings
from eval.scoring import Score
from pretrain.cli import evaluation_run, main
from tests.eval.conftest import cache_with_items, export_model, small_llama
from tests.eval.forked import CONTEXT, TIMEOUT_SECONDS, run_forked

SETTINGS: ScoreSettings = {
    "model": "0" * 64,
    "dtype": "float32",
    "device": "cpu",
    "context_length": 128,
    "bos": "none",
    "versions": {"torch": "1"},
}
TASKS = ["hellaswag", "winogrande"]
BATCH = 5  # texts


# --- the files ----------------------------------------------------------------------------------


def test_scores_come_back_in_another_process_to_the_last_bit(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path, SETTINGS)
    scores = {"a": (-1.2345678901234567, True), "b": (-1e-17, False)}
    cache.add(scores)  # not closed: a process may be killed
    assert ScoreCache(tmp_path, SETTINGS).known({"a", "b", "c"}) == scores
    assert cache.known({"a"}) == {"a": scores["a"]}
    assert json.loads((cache.folder / "settings.json").read_text()) == SETTINGS


def test_writers_do_not_disturb_each_other(tmp_path: Path) -> None:
    one, two = ScoreCache(tmp_path, SETTINGS), ScoreCache(tmp_path, SETTINGS)
    for index in range(20):
        (one if index % 2 else two).add({str(index): (float(-index), True)})
    assert len(ScoreCache(tmp_path, SETTINGS).known(set(map(str, range(20))))) == 20


@pytest.mark.parametrize("key", list(SETTINGS))
def test_other_settings_have_other_scores(tmp_path: Path, key: str) -> None:
    ScoreCache(tmp_path, SETTINGS).add({"a": (-1.0, True)})
    value: Any = SETTINGS[key]  # type: ignore[literal-required]
    other = {"torch": "2"} if key == "versions" else value + 1 if key == "context_length" else value + "1"
    changed: Any = {**SETTINGS, key: other}
    assert ScoreCache(tmp_path, changed).known({"a"}) == {}


def test_a_damaged_line_is_ignored_wherever_it_is(tmp_path: Path) -> None:
    cache = ScoreCache(tmp_path, SETTINGS)
    for key in "abc":
        cache.add({key: (-1.0, True)})
    cache.close()
    (file,) = cache.folder.glob("*.scores")
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(1, len(lines[2]) + 1):  # a kill may stop a write anywhere
        file.write_bytes(whole[:-cut])
        kept = {"a", "b", "c"} if cut == 1 else {"a", "b"}  # without the line feed the line is whole
        assert set(ScoreCache(tmp_path, SETTINGS).known({"a", "b", "c"})) == kept
    file.write_bytes(lines[0] + lines[1].replace(b"-1.0", b"-9.0") + lines[2] + b"\xff\n" + b"zzzzzzzz {\n\n")
    assert set(ScoreCache(tmp_path, SETTINGS).known({"a", "b", "c"})) == {"a", "c"}


def test_a_cache_that_cannot_be_written_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "eval-scores").write_text("a file")
    with pytest.raises(EvalError, match=r"cannot keep scores in .*--no-cache"):
        ScoreCache(tmp_path, SETTINGS).add({"a": (-1.0, True)})


# --- evaluations --------------------------------------------------------------------------------


@pytest.fixture
def models(model_folder: Path, tmp_path: Path) -> list[Path]:
    return [model_folder, export_model(tmp_path / "other", small_llama(seed=1))]


def options(fetched: Mapping[str, Any], cache: Path) -> dict[str, Any]:
    """Arguments of `evaluate` with made-up items, in a cache of its own."""
    return {**fetched, "cache": cache_with_items(fetched, cache), "batch_size": BATCH, "keep_scores": True}


def unchanging(result: EvalResult) -> dict[str, Any]:
    return {key: value for key, value in result.items() if key not in ("date", "seconds", "requests")}


def test_the_second_evaluation_scores_nothing(tmp_path: Path, model_folder: Path, fetched: dict[str, Any]) -> None:
    given = options(fetched, tmp_path) | {"limit": 7}
    first = evaluate(model_folder, TASKS, **given)
    again = evaluate(model_folder, TASKS, **given)
    requests = first["requests"]["scored_by_rank"][0]
    assert requests >= 40
    assert again["requests"] == {"scored_by_rank": [0], "reused": requests}
    assert unchanging(again) == unchanging(first)
    part = evaluate(model_folder, ["hellaswag"], **{**given, "limit": 3})
    assert part["requests"]["scored_by_rank"] == [0]
    without = evaluate(model_folder, TASKS, **{**given, "keep_scores": False})
    assert without["requests"] == first["requests"]


def test_other_weights_dtypes_and_tokenizers_are_scored_by_themselves(
    tmp_path: Path, models: list[Path], fetched: dict[str, Any]
) -> None:
    given = options(fetched, tmp_path / "cache") | {"limit": 2}
    first = evaluate(models[0], TASKS, **given)
    for model, dtype in ((models[1], "auto"), (models[0], "bfloat16")):
        assert evaluate(model, TASKS, dtype=dtype, **given)["requests"] == first["requests"]
    tokenizer = models[1] / "tokenizer_config.json"
    tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()) | {"model_max_length": 100}))
    assert evaluate(models[1], TASKS, **given)["requests"] == first["requests"]


def killed_while_scoring(
    models: list[Path], given: dict[str, Any], kills: list[int], scored: Path
) -> Callable[[], list[EvalResult]]:
    """Evaluate `models`, but let the process kill itself after so many batches, just before or after keeping them.

    `scored` gets a line for each batch that was scored: its requests.
    """
    real = ScoreCache.add

    def evaluated() -> list[EvalResult]:
        def add(self: ScoreCache, scores: Mapping[str, Score]) -> None:
            with scored.open("a") as file:
                file.write(" ".join(scores) + "\n")
            kills[0] -= 1
            if kills[0] == 0 and kills[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            real(self, scores)
            if kills[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        ScoreCache.add = add  # type: ignore[method-assign]
        with evaluation(TASKS, **given) as prepared:
            return [prepared.run(model) for model in models]

    return evaluated


@pytest.mark.parametrize("number", [2, pytest.param(5, marks=pytest.mark.long)])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_kills_cost_a_batch_each_and_change_nothing(
    tmp_path: Path, models: list[Path], fetched: dict[str, Any], number: int, seed: int
) -> None:
    undisturbed = [evaluate(model, TASKS, **{**options(fetched, tmp_path), "keep_scores": False}) for model in models]
    rng = random.Random(seed)
    cache, scored = tmp_path / "cache", tmp_path / "scored"
    given = options(fetched, cache)
    for index in range(number):
        before = index % 2  # the batch is lost
        work = killed_while_scoring(models, given, [rng.randrange(2, 70 // number), before], scored)
        assert run_forked(work) == -signal.SIGKILL
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScoreCache, "add", ScoreCache.add)  # is replaced, and put back
        final = killed_while_scoring(models, given, [-1, 0], scored)()
    assert [unchanging(result) for result in final] == [unchanging(result) for result in undisturbed]
    batches = [line.split() for line in scored.read_text().splitlines()]
    largest = max(map(len, batches))  # a row is never divided
    assert largest <= 2 * BATCH
    total = sum(result["requests"]["scored_by_rank"][0] for result in undisturbed)
    assert sum(map(len, batches)) <= total + largest * number
    # Nothing but the items and the scores stays.
    left = {path.relative_to(cache).parts[0] for path in cache.rglob("*") if path.is_file()}
    assert left <= {"eval-items", "eval-scores"}


def command_that_counts(models: list[Path], out: Path, cache: Path, package: Any, scored: Path) -> Callable[[], None]:
    """`aurora eval MODEL MODEL`, slowed down; `scored` gets a line for each batch before its scores are kept."""
    real = ScoreCache.add

    def work() -> None:
        os.environ["AURORA_CACHE"] = str(cache)

        def add(self: ScoreCache, scores: Mapping[str, Score]) -> None:
            # The batch has been scored already: a kill before this line is written loses a batch that nobody counts.
            with scored.open("a") as file:
                file.write(" ".join(scores) + "\n")
            time.sleep(0.02)
            real(self, scores)

        ScoreCache.add = add  # type: ignore[method-assign]
        evaluation_run.evaluation = partial(evaluation_run.evaluation, package=package)  # type: ignore[assignment]
        words = ["--tasks", ",".join(TASKS), "--batch-size", str(BATCH), "--out", str(out)]
        os._exit(main(["eval", *map(str, models), *words]))

    return work


def batches_in(scored: Path) -> list[list[str]]:
    """The requests of each batch, but for a line that a kill cut short."""
    text = scored.read_text() if scored.exists() else ""
    return [line.split() for line in text.splitlines(keepends=True) if line.endswith("\n")]


def killed_after(work: Callable[[], None], scored: Path, batches: int, delay: float) -> int:
    """Run `work`, and kill it from outside some time after its so many batches; return the exit code."""
    before = len(batches_in(scored))
    process = CONTEXT.Process(target=work)
    process.start()
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while process.is_alive() and len(batches_in(scored)) < before + batches and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_the_command_is_killed_five_times_at_any_moment(
    tmp_path: Path, models: list[Path], fetched: dict[str, Any], seed: int
) -> None:
    rng, scored, out = random.Random(seed), tmp_path / "scored", tmp_path / "out"
    undisturbed = [evaluate(model, TASKS, **{**options(fetched, tmp_path), "keep_scores": False}) for model in models]
    cache, kills = cache_with_items(fetched, tmp_path / "cache"), 5
    work = command_that_counts(models, out, cache, fetched["package"], scored)
    for _ in range(kills):
        assert killed_after(work, scored, rng.randrange(1, 9), rng.random() * 0.05) == -signal.SIGKILL
    assert len(list(out.rglob("results.json"))) < len(models)
    assert run_forked(work) == 0
    final = [read_result(out / folder.name) for folder in models]
    for one, other in zip(final, undisturbed, strict=True):
        assert {**unchanging(one), "model": {}} == {**unchanging(other), "model": {}}
        assert one["model"]["sha256"] == other["model"]["sha256"]
    counted = batches_in(scored)
    largest, total = max(map(len, counted)), sum(result["requests"]["scored_by_rank"][0] for result in undisturbed)
    assert largest <= 2 * BATCH
    assert total <= sum(map(len, counted)) <= total + largest * kills
    assert not list(cache.rglob("*.tmp"))
