"""Scores: measured ones and published ones in columns of their own, and both against training FLOPs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pretrain.comparison.document import DASH, EMPTY, NOT_RUN, Cell, Chart, Mark, Part, Table
from pretrain.comparison.facts import UNKNOWN, Facts, Score
from pretrain.comparison.measured import Measured, MeasuredTask
from pretrain.comparison.sizes import Flops, flops_of, scientific
from pretrain.comparison.sources import Sources

_HEADS = ("Model", "Measured [95 %]", "Setting", "Published", "Published setting", "Training FLOPs")


def score_part(facts: Facts, measured: Measured, sources: Sources) -> Part:
    """Return the part with one table for each task that has a score of either kind."""
    flops = flops_of(facts, measured)
    tables = [
        Table(
            task,
            _HEADS,
            [_row(label, task, facts, measured, flops, sources) for label in measured["models"]],
            frozenset({1, 3, 5}),
        )
        for task in tasks_of(facts, measured)
    ]
    return Part(
        "scores",
        "Scores",
        tables=tables,
        notes=[
            "Scores are fractions. The interval covers the choice of items (of their sources, where the data set names "
            "them), not training seeds.",
            f"Published scores are other people's, by other programs and often with other prompts: compare them with "
            f'measured ones at your own risk. "{UNKNOWN}": the source does not say. A model that we have not run '
            f'is "{NOT_RUN}".',
        ],
    )


def bits_part(measured: Measured) -> Part | None:
    """Return the part about bits per byte; None if none were measured."""
    found = {label: result.get("bits_per_byte", {}) for label, result in measured["results"].items()}
    texts = list(dict.fromkeys(text for bits in found.values() for text in bits))
    if not texts:
        return None
    rows = [
        [Cell(label, label), *(_bits(found.get(label, {}).get(text)) for text in texts)] for label in measured["models"]
    ]
    return Part(
        "bits",
        "Bits per byte on held-out texts",
        tables=[Table("", ("Model", *texts), rows, frozenset(range(1, len(texts) + 1)))],
        notes=["Measured. Fewer are better. Unlike a loss per token, they do not depend on the tokenizer."],
    )


def _bits(value: float | None) -> Cell:
    return Cell(NOT_RUN) if value is None else Cell(f"{value:.4f}", value)


def tasks_of(facts: Facts, measured: Measured) -> list[str]:
    """Return the tasks that have a score: measured ones first, then those with the most published scores."""
    names = [task for result in measured["results"].values() for task in result["tasks"]]
    published = Counter(score.task for label in measured["models"] for score in _published(facts, label))
    return list(dict.fromkeys([*names, *(task for task, _ in published.most_common())]))


def _published(facts: Facts, label: str) -> Sequence[Score]:
    return facts.models[label].published if label in facts.models else ()


def _row(
    label: str, task: str, facts: Facts, measured: Measured, flops: Mapping[str, Flops], sources: Sources
) -> list[Cell]:
    result = measured["results"].get(label)
    found = result["tasks"].get(task) if result is not None else None
    published = [score for score in _published(facts, label) if score.task == task]
    cost = flops.get(label)
    return [
        Cell(label, label),
        Cell(NOT_RUN) if found is None else _measured(found),
        EMPTY if found is None else Cell(setting(found["metric"], found["shots"]), small=_items(found)),
        _published_cell(published, sources),
        EMPTY if not published else Cell("; ".join(_published_setting(score) for score in published)),
        EMPTY if cost is None else Cell(scientific(cost.value), cost.value, "", sources.cite(*cost.sources)),
    ]


def _measured(found: MeasuredTask) -> Cell:
    return Cell(f"{found['score']:.4f} [{found['low']:.4f}, {found['high']:.4f}]", found["score"])


def _items(found: MeasuredTask) -> str:
    part = "" if found["num_items"] == found["num_items_in_split"] else f" of {found['num_items_in_split']:,}"
    items = f"{found['num_items']:,}{part} items, {found['split']}"
    return f"{items}; {found['note']}" if "note" in found else items


def _published_cell(scores: Sequence[Score], sources: Sources) -> Cell:
    if not scores:
        return EMPTY
    text = "; ".join(plain_score(score.value) for score in scores)
    notes = "; ".join(dict.fromkeys(score.note for score in scores if score.note))
    return Cell(text, scores[0].value, notes, sources.cite(*(score.source for score in scores)))


def _published_setting(score: Score) -> str:
    harness = "harness unknown" if score.harness == UNKNOWN else score.harness
    return f"{setting(score.metric, score.shots)}, {harness}"


def setting(metric: str, shots: int | str) -> str:
    """Describe how a task was scored, such as "acc_norm, 0 shots"."""
    of_metric = "metric unknown" if metric == UNKNOWN else metric
    of_shots = "shots unknown" if shots == UNKNOWN else "1 shot" if shots == 1 else f"{shots} shots"
    return f"{of_metric}, {of_shots}"


def plain_score(value: float | None) -> str:
    """Format a published score with three decimal places, or four if it has them."""
    if value is None:
        return DASH
    return f"{value:.3f}" if abs(value - round(value, 3)) < 1e-9 else f"{value:.4f}"


def chart_part(facts: Facts, measured: Measured) -> Part | None:
    """Return the part with scores against training FLOPs; None if no task has two scores of models of known cost."""
    flops = flops_of(facts, measured)
    letters = {label: _letter(place) for place, label in enumerate(measured["models"])}
    charts, drawn = [], set[str]()
    for task in tasks_of(facts, measured):
        by_model = {
            label: _marks(letters[label], label, task, cost.value, facts, measured) for label, cost in flops.items()
        }
        marks = [mark for own in by_model.values() for mark in own]
        if len(marks) > 1:
            charts.append(Chart(task, [*marks, *_by_data(facts, task)]))
            drawn |= {label for label, own in by_model.items() if own}
    if not charts:
        return None
    return Part(
        "cost",
        "Scores against training FLOPs",
        charts=charts,
        legend=[(letters[label], label) for label in measured["models"] if label in drawn],
        notes=[
            "Filled dots: measured, with 95 % interval. Hollow diamonds: published. Crosses: published scores of one "
            "AdamW model on different texts, with 6ND FLOPs (see the influence of the text). The horizontal axis is "
            "logarithmic; the vertical one does not start at 0. The FLOPs of our own runs are those of the tokens "
            "that it has recorded."
        ],
    )


def _letter(place: int) -> str:
    """A, B, ..., Z, AA, AB, ..."""
    rest, last = divmod(place, 26)
    return (_letter(rest - 1) if rest else "") + chr(ord("A") + last)


def _marks(letter: str, label: str, task: str, cost: float, facts: Facts, measured: Measured) -> list[Mark]:
    marks = [
        Mark(letter, cost, score.value, None, "published") for score in _published(facts, label) if score.task == task
    ]
    result = measured["results"].get(label)
    if result is not None and task in result["tasks"]:
        found = result["tasks"][task]
        marks.append(Mark(letter, cost, found["score"], (found["low"], found["high"]), "measured"))
    return marks


def _by_data(facts: Facts, task: str) -> list[Mark]:
    return [
        Mark("", 6 * group.parameters * group.tokens, score, None, "by data")
        for group in facts.by_data
        if group.task == task
        for score in group.scores.values()
    ]
