"""The file of published figures: what others say about models, each figure with its source.

Scores are fractions between 0 and 1. Nothing here was measured by us, except where a source says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from pretrain.comparison.errors import ComparisonError
from pretrain.config.base import Section
from pretrain.config.errors import ConfigError
from pretrain.config.fields import Fraction, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pretrain.config.loader import read_yaml
from pretrain.config.model import ModelConfig
from pretrain.config.validate import validate_section
from pretrain.processes.errors import did_you_mean
from pretrain.processes.redaction import redact

UNKNOWN = "unknown"


def _not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("expected some text")
    return text


def _a_public_address(text: str) -> str:
    if not text.startswith(("https://", "http://")) or redact(text) != text:
        raise ValueError("expected an http or https address without user name, query and fragment")
    return text


Text = Annotated[str, AfterValidator(_not_blank)]
SourceName = Text
"""A key of `sources`."""


class Source(Section):
    """Where a figure comes from."""

    text: Text
    """What a reader has to look for: author, title, table."""

    url: Annotated[str, AfterValidator(_a_public_address)] | None = None
    """Where it is."""

    read: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    """The date on which it was read, as 2026-11-26."""

    how: str = ""
    """How it was read, if it was not read in the original."""


class Figure(Section):
    """A published number."""

    value: PositiveFloat
    source: SourceName
    note: str = ""


class Licence(Section):
    """A model's licence."""

    name: Text
    source: SourceName
    note: str = ""


class Shape(Section):
    """The shape of a Llama-style model, for its numbers of parameters and FLOPs."""

    vocab_size: PositiveInt
    hidden_size: PositiveInt
    intermediate_size: PositiveInt
    num_layers: PositiveInt
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    tie_embeddings: bool

    training_sequence: PositiveInt | None = None
    """Tokens per training sequence. Without it the FLOPs of attention are left out."""

    source: SourceName
    note: str = ""

    def config(self) -> ModelConfig:
        """Return the model section that a run of ours would have."""
        sizes = self.model_dump(exclude={"training_sequence", "source", "note"})
        return ModelConfig(**sizes, context_length=self.training_sequence or 1)


class Score(Section):
    """A published score."""

    task: Text
    """As lm-eval names it."""

    value: Fraction
    """Between 0 and 1."""

    metric: Text
    """Such as acc_norm; `unknown` if the source does not say."""

    shots: NonNegativeInt | Literal["unknown"]
    """Solved examples in the prompt."""

    harness: Text
    """The program that measured it."""

    source: SourceName
    note: str = ""


class ModelFacts(Section):
    """What is published about one model."""

    optimizer: Text
    tokens: Figure | None = None
    """Tokens it was trained on."""

    parameters: Figure | None = None
    parameters_without_embeddings: Figure | None = None
    licence: Licence | None = None
    shape: Shape | None = None
    published: Annotated[tuple[Score, ...], Field(strict=False)] = ()
    note: str = ""


class Claim(Section):
    """A claim of data efficiency: `subject` is as good as `reference` with `ratio` times fewer tokens."""

    text: Text
    ratio: PositiveFloat
    source: SourceName
    subject: Text
    reference: Text


class ByData(Section):
    """Runs that differ in their text only."""

    name: Text
    optimizer: Text
    parameters: PositiveFloat
    tokens: PositiveFloat
    source: SourceName
    task: Text
    metric: Text
    shots: NonNegativeInt | Literal["unknown"]
    plus_minus: NonNegativeFloat = 0.0
    """Uncertainty of reading the scores, as when they come from a plot."""

    scores: Annotated[dict[Text, Fraction], Field(min_length=1)]
    """Text -> score."""

    note: str = ""


class Point(Section):
    """A score after some number of tokens."""

    tokens: PositiveFloat
    value: Fraction
    source: SourceName


class ByTokens(Section):
    """Checkpoints or runs that differ in their number of tokens only."""

    name: Text
    optimizer: Text
    parameters: PositiveFloat
    source: SourceName
    data: Text
    task: Text
    metric: Text
    shots: NonNegativeInt | Literal["unknown"]
    points: Annotated[tuple[Point, ...], Field(strict=False, min_length=1)]
    note: str = ""


class Facts(Section):
    """The whole file."""

    title: Text = "Models compared"
    question: str = ""
    sources: dict[Text, Source] = Field(default_factory=dict)
    models: dict[Text, ModelFacts] = Field(default_factory=dict)
    """Label, as in the evaluation's config -> what is published about the model."""

    claims: Annotated[tuple[Claim, ...], Field(strict=False)] = ()
    by_data: Annotated[tuple[ByData, ...], Field(strict=False)] = ()
    by_tokens: Annotated[tuple[ByTokens, ...], Field(strict=False)] = ()


def read_facts(path: Path, labels: Iterable[str]) -> Facts:
    """Read and check a file of published figures.

    Args:
        path: the YAML file.
        labels: labels of the models that are compared; the file may only speak of those.

    Raises:
        ComparisonError: a figure has no source, or another value is not usable; one line per problem.
    """
    try:
        facts, problems = validate_section(Facts, read_yaml(path), "")
    except ConfigError as error:
        raise ComparisonError(str(error)) from error
    if facts is not None:
        problems = [*_problems(facts, list(labels))]
    if problems:
        raise ComparisonError("\n".join(f"{path}: {problem.removeprefix('.')}" for problem in problems))
    found: Facts = facts
    return found


def _problems(facts: Facts, labels: list[str]) -> Iterator[str]:
    used = set()
    for where, source in cited(facts):
        used.add(source)
        if source not in facts.sources:
            yield f"{where}: {source!r} is not one of the sources{did_you_mean(source, facts.sources)}"
    for name in facts.sources:
        if name not in used:
            yield f"sources.{name}: no figure comes from it; remove it"
    for label, model in facts.models.items():
        if label not in labels:
            yield f"models.{label}: no model of the config has this label{did_you_mean(label, labels)}"
        if model.shape is not None and model.shape.hidden_size % model.shape.num_heads:
            yield f"models.{label}.shape.num_heads: {model.shape.num_heads} does not divide hidden_size"
    for place, claim in enumerate(facts.claims):
        for key, label in (("subject", claim.subject), ("reference", claim.reference)):
            if facts.models.get(label) is None or facts.models[label].tokens is None:
                yield f"claims.{place}.{key}: the token count of {label!r} is not among the models' figures"


def cited(facts: Section, where: str = "") -> Iterator[tuple[str, str]]:
    """Yield every place that names a source, with the source's name, in the order of the file."""
    for key in type(facts).model_fields:
        yield from _cited_in(getattr(facts, key), f"{where}.{key}".lstrip("."))


def _cited_in(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if where.rpartition(".")[2] == "source" and isinstance(value, str):
        yield where, value
    elif isinstance(value, Section):
        yield from cited(value, where)
    elif isinstance(value, (dict, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(part, Section):
                yield from cited(part, f"{where}.{key}")
