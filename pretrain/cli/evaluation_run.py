"""``aurora eval`` at work: evaluate what a plan names, print the tables, and write the results."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from eval.config import ModelSection
from eval.harness import Evaluation, evaluation
from eval.result_table import format_scores, format_table
from eval.results import check_same_model, write_result
from eval.schema import EvalResult, ModelIdentity
from eval.sharing import Team
from eval.texts import text_name
from pretrain.cli.evaluated_models import as_model, check_no_revision
from pretrain.cli.evaluation_plan import Plan, check_folder
from pretrain.cli.held_out import held_out_texts
from pretrain.cli.log_scores import ScoreLog, run_of
from pretrain.cli.result import check_marks_of, convert, mark, marks_asked
from pretrain.cli.series import Request, check_run, evaluate_checkpoints
from pretrain.processes.errors import UserError


def evaluate_plan(plan: Plan, options: argparse.Namespace, team: Team) -> None:
    """Evaluate each model with the processes of the team; the first one prints and writes.

    Raises:
        UserError: a model cannot be evaluated; a single process has evaluated the others.
    """
    writes = team.ranks.rank == 0
    logged = plan.models if options.log and writes else []
    logs = {model.name: ScoreLog(run_of(Path(model.model))) for model in logged}
    results: dict[str, EvalResult] = {}
    failures = []
    started = time.monotonic()
    with _prepared(plan, options, team) as prepared:
        for number, model in enumerate(plan.models, start=1):
            if writes and len(plan.models) > 1:
                _say(f"[{number}/{len(plan.models)}] {model.name}: {model.source}")
            try:
                out = plan.folder(model, options.out)
                result = _result(prepared, plan, model, model.model, team, None if options.overwrite else out)
                if writes:
                    _write(result, out, options)
                if model.name in logs:
                    logs[model.name].add(result)
                results[model.name] = result
            except UserError as error:
                # Several processes must not part ways.
                if len(plan.models) == 1 or team.ranks.world_size > 1:
                    raise
                failures += [f"{model.name}: {line}" for line in str(error).splitlines()]
                _say(f"{failures[-1]}; continuing with the other models")
                continue
            if writes:
                _say_what_remains(number, len(plan.models), time.monotonic() - started)
    if writes and len(results) > 1:
        print(f"\n{format_scores(results)}")
    if failures:
        raise UserError("\n".join(failures))


def evaluate_checkpoints_of(plan: Plan, options: argparse.Namespace) -> None:
    """Evaluate the checkpoints of the run that the plan names.

    Raises:
        UserError: it is not a run, a result would be lost, or a checkpoint is damaged.
    """
    if len(plan.models) != 1:
        raise UserError(f"--every-checkpoint: expected one run, got {', '.join(model.name for model in plan.models)}")
    run, team = Path(plan.models[0].model), Team()
    asked = plan.settings
    check_no_revision(plan.models[0])
    check_run(run, options.follow)

    texts, marks = [text_name(word) for word in plan.texts], marks_asked(options)
    with ExitStack() as opened:
        # The tasks are loaded once, and only if a checkpoint has to be evaluated.
        prepared = functools.cache(lambda: opened.enter_context(_prepared(plan, options, team)))

        def evaluate(checkpoint: Path, out: Path, overwrite: bool) -> EvalResult:
            if not overwrite:
                check_folder(plan, out, str(checkpoint), "folder", marks)
            result = _result(prepared(), plan, plan.models[0], str(checkpoint), team, None if overwrite else out)
            _write(result, out, options)
            return result

        shots = {task.name: task.shots for task in plan.tasks}
        request = Request(shots, asked["limit"], asked["selection"], asked["items"], plan.models[0].dtype, texts)
        evaluate_checkpoints(run, options, request, evaluate, prepared)


@contextmanager
def _prepared(plan: Plan, options: argparse.Namespace, team: Team) -> Iterator[Evaluation]:
    first = team.ranks.rank == 0
    with evaluation(
        plan.tasks, **plan.settings, keep_scores=not options.no_cache, progress=first, team=team
    ) as prepared:
        if first and (options.overlap or options.subset):
            check_marks_of(prepared.tasks.tasks, plan.settings["items"], options)
        yield prepared


def _result(
    prepared: Evaluation, plan: Plan, model: ModelSection, source: str, team: Team, kept: Path | None
) -> EvalResult:
    """Evaluate `source` with the settings of a model of the plan; a result of another model in `kept` is not lost."""

    def accept(identity: ModelIdentity) -> None:
        if kept is not None:
            check_same_model(kept, identity)

    with as_model(source, team) as name:
        texts = held_out_texts(plan.texts, Path(source) if name != source else None)
        result = prepared.run(
            name,
            revision=model.revision,
            dtype=model.dtype,
            trust_remote_code=model.trust_remote_code,
            texts=texts,
            stride=plan.stride,
            accept=accept,
        )
    if name != source:
        result["model"]["name"] = source
    if plan.suite is not None:
        result["suite"] = plan.suite
    return result


def _write(result: EvalResult, out: Path, options: argparse.Namespace) -> None:
    path = write_result(result, out)  # before anything that may fail
    if options.overlap or options.subset:
        mark(result, options)
        write_result(result, out)
    print(format_table(result))
    print(f"result in {path}", flush=True)
    if options.format == "lm-eval":
        convert(result, out)


def _say_what_remains(done: int, models: int, seconds: float) -> None:
    if done < models:
        remaining = seconds / done * (models - done)
        _say(f"{done} of {models} models evaluated in {seconds:,.0f} s; about {remaining:,.0f} s remain")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
