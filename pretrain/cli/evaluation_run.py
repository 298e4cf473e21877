"""``aurora eval`` at work: evaluate what a plan names, print the tables, and write the results."""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import cast

from eval.config import ModelSection
from eval.errors import TeamError
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
        UserError: a model cannot be evaluated; the others have been.
    """
    writes = team.ranks.rank == 0
    logged = plan.models if options.log and writes else []
    logs = team.together(lambda: {model.name: ScoreLog(run_of(Path(model.model))) for model in logged})
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
                team.together(functools.partial(_keep, plan, result, out, options, writes, logs.get(model.name)))
                results[model.name] = result
            except UserError as error:
                # Several processes must not part ways: only a `TeamError` is one of all of them.
                alone = team.ranks.world_size > 1 and not isinstance(error, TeamError)
                if len(plan.models) == 1 or alone:
                    raise
                failures += [f"{model.name}: {line}" for line in str(error).splitlines()]
                if writes:
                    _say(f"{failures[-1]}; continuing with the other models")
                continue
            if writes:
                _say_what_remains(number, len(plan.models), time.monotonic() - started)
    if writes and len(results) > 1:
        print(f"\n{format_scores(results)}")
    if failures:
        raise UserError("\n".join(failures))


def evaluate_checkpoints_of(plan: Plan, options: argparse.Namespace, team: Team) -> None:
    """Evaluate the checkpoints of the run that the plan names with the processes of the team.

    The first process alone looks for checkpoints and writes results.

    Raises:
        UserError: it is not a run, a result would be lost, or a checkpoint is damaged.
    """
    if len(plan.models) != 1:
        raise UserError(f"--every-checkpoint: expected one run, got {', '.join(model.name for model in plan.models)}")
    (model,), asked = plan.models, plan.settings
    run = Path(model.model)
    check_no_revision(model)
    team.together(lambda: check_run(run, options.follow))

    texts, marks = [text_name(word) for word in plan.texts], marks_asked(plan.marks)
    shots = {task.name: task.shots for task in plan.tasks}
    request = Request(shots, asked["limit"], asked["selection"], asked["items"], model.dtype, texts)
    with ExitStack() as opened:
        # The tasks are loaded once, and only if a checkpoint has to be evaluated.
        prepared = functools.cache(lambda: opened.enter_context(_prepared(plan, options, team)))

        def share(job: tuple[Path, Path | None] | None) -> EvalResult | None:
            """Load the tasks; evaluate a checkpoint, if there is one, whose earlier result is not to be lost."""
            evaluation = prepared()
            return _result(evaluation, plan, model, str(job[0]), team, job[1]) if job else None

        def lead(ask: Callable[[tuple[Path, Path | None] | None], EvalResult | None]) -> None:
            def evaluate(checkpoint: Path, out: Path, overwrite: bool) -> EvalResult:
                if not overwrite:
                    check_folder(plan, out, str(checkpoint), "folder", marks)
                result = cast("EvalResult", ask((checkpoint, None if overwrite else out)))
                _write(plan, result, out, options)
                return result

            evaluate_checkpoints(run, options, request, evaluate, lambda: ask(None))

        team.led(lead, share)


@contextmanager
def _prepared(plan: Plan, options: argparse.Namespace, team: Team) -> Iterator[Evaluation]:
    first = team.ranks.rank == 0
    opened = evaluation(plan.tasks, **plan.settings, keep_scores=not options.no_cache, progress=first, team=team)
    with ExitStack() as stack:
        prepared = team.together(lambda: stack.enter_context(opened))
        if plan.marks:
            tasks = prepared.tasks.tasks
            team.together(lambda: check_marks_of(tasks, plan.settings["items"], plan.marks) if first else None)
        yield prepared


def _result(
    prepared: Evaluation, plan: Plan, model: ModelSection, source: str, team: Team, kept: Path | None
) -> EvalResult:
    """Evaluate `source` with the settings of a model of the plan; a result of another model in `kept` is not lost."""

    def accept(identity: ModelIdentity) -> None:
        if kept is not None:
            check_same_model(kept, identity)

    with as_model(source, team) as name:
        texts = team.together(lambda: held_out_texts(plan.texts, Path(source) if name != source else None))
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


def _keep(
    plan: Plan, result: EvalResult, out: Path, options: argparse.Namespace, writes: bool, log: ScoreLog | None
) -> None:
    """Write and log a result, on the process that does."""
    if writes:
        _write(plan, result, out, options)
    if log is not None:
        log.add(result)


def _write(plan: Plan, result: EvalResult, out: Path, options: argparse.Namespace) -> None:
    path = write_result(result, out)  # before anything that may fail
    if plan.marks:
        mark(result, plan.marks)
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
