"""The models: tokens, parameters, FLOPs and licences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pretrain.comparison.document import DASH, EMPTY, NOT_RUN, Cell, Part, Table
from pretrain.comparison.facts import Facts, Figure, ModelFacts
from pretrain.comparison.measured import Measured
from pretrain.comparison.sources import Sources
from pretrain.model.cost import flops_per_token, parameter_count

FORMULA = (
    "Training FLOPs are tokens × (6 × multiplied weights + 6 × layers × hidden size × sequence length). The multiplied "
    "weights are the matrices of the blocks and the head; the embedding is a look-up. The second term is causal "
    "attention; it is left out where the length of the training sequences is not known. Where the shape is not known "
    "either, they are 6 × tokens × parameters without embeddings, a lower bound. The work of teachers, of pruning and "
    "of the optimizer is not counted."
)
_SUPPOSED = "6ND, lower bound"


@dataclass(frozen=True)
class Flops:
    """FLOPs of a training.

    Attributes:
        value: their number.
        counted: how they were counted, in a few words.
        sources: names of the sources of what they were computed from.
    """

    value: float
    counted: str
    sources: tuple[str, ...]


def training_flops(model: ModelFacts | None, recorded_tokens: int | None = None) -> Flops | None:
    """Return the training FLOPs that published figures imply; None if the tokens or the size are not known.

    Args:
        model: the published figures.
        recorded_tokens: the tokens that the weights themselves record, which take precedence over published ones.
    """
    if model is None or (model.tokens is None and recorded_tokens is None):
        return None
    tokens, cited = float(recorded_tokens or 0), []
    if recorded_tokens is None and model.tokens is not None:
        tokens, cited = model.tokens.value, [model.tokens.source]
    if model.shape is not None:
        length = model.shape.training_sequence
        per_token = flops_per_token(model.shape.config(), length or 0)
        counted = "6ND with attention" if length else "6ND without attention"
        return Flops(tokens * per_token, counted, (*cited, model.shape.source))
    size = model.parameters_without_embeddings
    return Flops(6 * tokens * size.value, _SUPPOSED, (*cited, size.source)) if size else None


def models_part(facts: Facts, measured: Measured, sources: Sources) -> Part:
    """Return the part about the models."""
    published = Table(
        "As published",
        ("Model", "Optimizer", "Tokens", "Parameters", "Without embeddings", "Training FLOPs", "Licence"),
        [_published_row(label, place, facts.models.get(label), sources) for label, place in measured["models"].items()],
        frozenset({2, 3, 4, 5}),
    )
    loaded = Table(
        "As loaded for the evaluation",
        ("Model", "Weights", "Parameters", "Without embeddings", "Tokens", "Context", "Dtype", "Items", "Date"),
        [_loaded_row(label, measured) for label in measured["models"]],
        frozenset({2, 3, 4, 5}),
    )
    notes = [
        FORMULA,
        "Published parameters follow from the published shape where there is one. Loaded parameters are counted in "
        "the weights; tied embeddings count once. Loaded tokens are from the record that our runs leave in their "
        "checkpoints.",
    ]
    return Part("models", "Models", tables=[published, loaded], notes=notes)


def _published_row(label: str, place: str, model: ModelFacts | None, sources: Sources) -> list[Cell]:
    name = Cell(label, label, "; ".join(filter(None, [place, model.note if model else ""])))
    if model is None:
        return [name, *[EMPTY] * 6]
    flops, licence = training_flops(model), model.licence
    cost, of_licence = EMPTY, EMPTY
    if flops is not None:
        remark = "; ".join(filter(None, (flops.counted, model.shape.note if model.shape else "")))
        cost = Cell(scientific(flops.value), flops.value, remark, sources.cite(*flops.sources))
    if licence is not None:
        of_licence = Cell(licence.name, licence.name, licence.note, sources.cite(licence.source))
    sizes = (_figure(model.tokens, sources), *_parameters(model, sources))
    return [name, Cell(model.optimizer, model.optimizer), *sizes, cost, of_licence]


def _parameters(model: ModelFacts, sources: Sources) -> list[Cell]:
    """Return the cells of the parameters with and without embeddings: stated ones, or those of the shape."""
    cells = [_figure(model.parameters, sources), _figure(model.parameters_without_embeddings, sources)]
    if model.shape is not None:
        counts = parameter_count(model.shape.config())
        computed = (counts["total"], counts["total"] - counts["embedding"] - counts["head"])
        cited = sources.cite(model.shape.source)
        of_shape = [Cell(short_count(value), value, "", cited) for value in computed]
        cells = [own if own is not EMPTY else other for own, other in zip(cells, of_shape, strict=True)]
    return cells


def _figure(figure: Figure | None, sources: Sources) -> Cell:
    if figure is None:
        return EMPTY
    return Cell(short_count(figure.value), figure.value, figure.note, sources.cite(figure.source))


def _loaded_row(label: str, measured: Measured) -> list[Cell]:
    found = measured["results"].get(label)
    if found is None:
        return [Cell(label, label), Cell(NOT_RUN), *[EMPTY] * 7]
    without, tokens = found.get("parameters_without_embeddings"), found.get("tokens")
    return [
        Cell(label, label),
        Cell(found["origin"], found["origin"]),
        Cell(short_count(found["parameters"]), found["parameters"]),
        EMPTY if without is None else Cell(short_count(without), without),
        EMPTY if tokens is None else Cell(short_count(tokens), tokens),
        Cell(f"{found['context_length']:,}", found["context_length"]),
        Cell(found["dtype"], found["dtype"], f"BOS: {found['bos']}" if "bos" in found else ""),
        Cell(found["items"], found["items"]),
        Cell(found["date"], found["date"]),
    ]


def flops_of(facts: Facts, measured: Measured) -> Mapping[str, Flops]:
    """Return the training FLOPs of each model for which they are known; of a run of ours, for its recorded tokens."""
    found = {}
    for label in measured["models"]:
        result = measured["results"].get(label)
        flops = training_flops(facts.models.get(label), result.get("tokens") if result is not None else None)
        if flops is not None:
            found[label] = flops
    return found


def short_count(value: float) -> str:
    """Format 36e12 as "36T" and 1_720_567_808 as "1.72B"."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}" if value < 1e3 * size else f"{value / size:,.0f}{letter}"
    return f"{value:g}"


def scientific(value: float | None) -> str:
    """Format 7.64e20 as "7.64e20"."""
    return DASH if value is None else f"{value:.2e}".replace("e+", "e")
