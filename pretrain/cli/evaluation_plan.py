"""What ``aurora eval`` is asked for by its command line and a config file together."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.config import EvalConfig, ModelSection, load_eval_config
from eval.suites import DEFAULT_SUITE, TaskChoice, choose, suite
from pretrain.cli.arguments import Marks
from pretrain.cli.held_out import VALIDATION
from pretrain.config.validate import validate_section
from pretrain.files import at_home
from pretrain.processes.errors import UserError


@dataclass(frozen=True)
class Plan:
    """What the command line and a config ask for together."""

    models: list[ModelSection]
    tasks: list[TaskChoice]
    suite: str | None
    """The suite that has these very tasks; None if they were changed, or named one by one."""
    settings: dict[str, Any]
    """Arguments of `eval.harness.evaluation`."""
    texts: list[str]
    """The held-out texts to measure bits per byte on."""
    stride: int | None
    """Tokens that a window advances over them; None for half of the context."""
    marks: Marks
    """Which items to mark."""
    apart: bool
    """Whether the result of each model gets a folder of its own, named after its label."""

    def folder(self, model: ModelSection, out: Path) -> Path:
        """Return the folder for the result of a model."""
        return out / model.name if self.apart else out


def plan_of(options: argparse.Namespace) -> Plan:
    """Join the command line and the config that it names.

    Raises:
        UserError: they are wrong or contradict each other.
    """
    files = [name for name in options.models if name.endswith((".yaml", ".yml"))]
    if len(files) > 1:
        raise UserError(f"expected at most one YAML file, got {', '.join(files)}")
    config = load_eval_config(Path(files[0])) if files else EvalConfig()
    models = [*config.models, *(_model(name) for name in options.models if name not in files)]
    if not models:
        raise UserError(f"{files[0]}: models: it names none; add some, or give them on the command line")
    if (options.stride or config.stride) and not (options.bits_per_byte or config.bits_per_byte):
        raise UserError("stride: works only with texts to measure bits per byte on: add --bits-per-byte")
    given = {"dtype": options.dtype} if options.dtype else {}
    given |= {"trust_remote_code": True} if options.trust_remote_code else {}
    models = [model.model_copy(update=given) for model in models]

    given_tasks = options.suite is not None or options.tasks is not None
    name = options.suite if given_tasks else config.suite
    tasks = [*(suite(name) if name else ()), *(options.tasks or ())] if given_tasks else config.choices()
    texts = options.bits_per_byte or list(config.bits_per_byte)
    # No tasks at all are asked for by an empty list of them.
    only_texts = (
        bool(texts) and not tasks and (options.tasks == [] if given_tasks else "tasks" in config.model_fields_set)
    )
    if not tasks and not given_tasks and not only_texts:
        name = DEFAULT_SUITE
        tasks = list(suite(name))
    labels = [model.name for model in models]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UserError(
            f"several models have the label {', '.join(twice)}, which names the folder of a result; give each a label "
            "in a YAML file"
        )
    chosen = [] if only_texts else choose(tasks, options.shots)
    return Plan(
        models=models,
        tasks=chosen,
        suite=name if name is not None and chosen == list(suite(name)) else None,
        settings=_settings(options, config),
        texts=texts,
        stride=options.stride or config.stride,
        marks=Marks(
            overlap=options.overlap or (at_home(config.overlap) if config.overlap else None),
            subsets=options.subset or config.subset,
        ),
        apart=bool(files) or len(models) > 1,
    )


def _model(name: str) -> ModelSection:
    """A model that the command line names."""
    model, problems = validate_section(ModelSection, {"model": name}, "")
    if problems:
        raise UserError("\n".join(f"MODEL: {problem.removeprefix('.model: ')}" for problem in problems))
    found: ModelSection = model
    return found


def _settings(options: argparse.Namespace, config: EvalConfig) -> dict[str, Any]:
    defaults = {"items": "packaged", "limit": None, "selection": "first", "batch_size": "auto", "device": None}
    found = {}
    for name, default in defaults.items():
        values = (getattr(options, name), getattr(config, name), default)
        found[name] = next((value for value in values if value is not None), None)
    return found


def check_plan(plan: Plan, out: Path, overwrite: bool) -> None:
    """Refuse what can be refused before anything is fetched or loaded.

    Args:
        plan: what is asked for.
        out: the folder to write to.
        overwrite: whether earlier results may be lost.

    Raises:
        UserError: one line for each problem.
    """
    from eval.harness import check_request
    from eval.texts import text_problems
    from pretrain.cli.evaluated_models import locate
    from pretrain.cli.result import mark_problems, marks_asked

    asked = plan.settings
    check_request(plan.tasks, asked["limit"], asked["batch_size"], asked["items"], asked["selection"])
    # The validation split of a run is not a file.
    problems = text_problems([word for word in plan.texts if word != VALIDATION]) + mark_problems(plan.marks)
    marks = marks_asked(plan.marks)
    for model in plan.models:
        try:
            source = locate(model)
            if not overwrite:
                name, kind = (source.name, source.kind) if source else (model.model, "folder")
                check_folder(plan, plan.folder(model, out), name, kind, marks)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def check_folder(plan: Plan, out: Path, model: str, source: str, marks: Collection[str]) -> None:
    """Refuse a folder whose earlier result would be lost; see `eval.results.check_out`.

    Raises:
        UserError: it would.
    """
    from eval.results import check_out
    from eval.texts import text_name

    asked, texts = plan.settings, [text_name(word) for word in plan.texts]
    check_out(
        out,
        model,
        plan.tasks,
        asked["limit"],
        asked["selection"],
        texts,
        source=source,
        items=asked["items"],
        marks=marks,
    )
