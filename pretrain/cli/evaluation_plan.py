"""What ``aurora eval`` is asked for by its command line and a config file together."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.config import EvalConfig, ModelSection, load_eval_config
from eval.suites import DEFAULT_SUITE, TaskChoice, choose, suite
from pretrain.cli.held_out import VALIDATION
from pretrain.processes.errors import UserError


@dataclass(frozen=True)
class Plan:
    """What the command line and a config ask for together."""

    models: list[ModelSection]
    tasks: list[TaskChoice]
    suite: str | None
    settings: dict[str, Any]
    """Arguments of `eval.harness.evaluation`."""
    texts: list[str]
    """The held-out texts to measure bits per byte on."""
    stride: int | None
    """Tokens that a window advances over them; None for half of the context."""
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
    models = [*config.models, *(ModelSection(model=name) for name in options.models if name not in files)]
    if not models:
        raise UserError(f"{files[0]}: models: it names none; add some, or give them on the command line")
    given = {"dtype": options.dtype} if options.dtype else {}
    given |= {"trust_remote_code": True} if options.trust_remote_code else {}
    models = [model.model_copy(update=given) for model in models]

    name = options.suite or (None if options.tasks else config.suite)
    tasks = [*(suite(name) if name else ()), *(options.tasks or ())]
    tasks = tasks if options.suite or options.tasks else config.choices()
    if not tasks and options.tasks is None:
        name = DEFAULT_SUITE
        tasks = list(suite(name))
    only_texts = options.bits_per_byte and options.tasks == [] and not tasks
    labels = [model.name for model in models]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise UserError(
            f"several models have the label {', '.join(twice)}, which names the folder of a result; give each a label "
            "in a YAML file"
        )
    return Plan(
        models=models,
        tasks=[] if only_texts else choose(tasks, options.shots),
        suite=name,
        settings=_settings(options, config),
        texts=options.bits_per_byte or [],
        stride=options.stride,
        apart=bool(files) or len(models) > 1,
    )


def _settings(options: argparse.Namespace, config: EvalConfig) -> dict[str, Any]:
    defaults = {"items": "packaged", "limit": None, "selection": "first", "batch_size": "auto", "device": None}
    found = {}
    for name, default in defaults.items():
        values = (getattr(options, name), getattr(config, name), default)
        found[name] = next((value for value in values if value is not None), None)
    return found


def check_plan(plan: Plan, out: Path, overwrite: bool) -> None:
    """Refuse what can be refused before anything is fetched or loaded.

    Raises:
        UserError: one line for each problem.
    """
    from eval.harness import check_request
    from eval.models import check_model, locate_model
    from eval.results import check_out
    from eval.texts import text_name, text_problems
    from pretrain.export.run import is_run_or_checkpoint

    asked = plan.settings
    check_request(plan.tasks, asked["limit"], asked["batch_size"], asked["items"], asked["selection"])
    # The validation split of a run is not a file.
    problems = text_problems([word for word in plan.texts if word != VALIDATION])
    for model in plan.models:
        try:
            ours = is_run_or_checkpoint(Path(model.source))
            source = None if ours else locate_model(model.source)
            name = source.name if source else model.source
            if not overwrite:
                texts = map(text_name, plan.texts)
                check_out(plan.folder(model, out), name, plan.tasks, asked["limit"], asked["selection"], [*texts])
            # One of several models that is missing does not stop the others.
            if source and len(plan.models) == 1:
                check_model(source)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
