"""Published facts and measured results into the document of the page."""

from __future__ import annotations

from pretrain.comparison.document import Cell, Document, Part, Table
from pretrain.comparison.facts import Facts
from pretrain.comparison.implied import data_part, efficiency_part
from pretrain.comparison.measured import Measured
from pretrain.comparison.scores import bits_part, chart_part, score_part
from pretrain.comparison.sizes import models_part
from pretrain.comparison.sources import Sources


def contents(facts: Facts, measured: Measured) -> Document:
    """Return the document.

    Args:
        facts: the published figures.
        measured: our own results.
    """
    sources = Sources(facts)
    parts = [
        score_part(facts, measured, sources),
        bits_part(measured),
        _pairs_part(measured),
        chart_part(facts, measured),
        models_part(facts, measured, sources),
        efficiency_part(facts, measured, sources),
        data_part(facts, sources),
    ]
    run = len(measured["results"])
    return Document(
        title=facts.title,
        question=facts.question,
        state=f"{run} of {len(measured['models'])} models run",
        notes=measured["notes"],
        parts=[part for part in parts if part is not None],
        sources=sources.listed(),
    )


def _pairs_part(measured: Measured) -> Part:
    """Return the part with the paired differences of the models that were run."""
    tables = [
        Table(pair["title"], tuple(pair["heads"]), [[Cell(text, text) for text in row] for row in pair["rows"]])
        for pair in measured["pairs"]
    ]
    nothing = ["Fewer than two models have results that can be compared, so there is nothing to compare yet."]
    return Part(
        "differences",
        "Paired differences of the models that were run",
        paragraphs=[] if tables else nothing,
        tables=tables,
        notes=measured["explanations"],
    )
