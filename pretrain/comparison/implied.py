"""What the claims imply, and what else could explain the scores: the training text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pretrain.comparison.document import EMPTY, NOT_RUN, Cell, Part, Table
from pretrain.comparison.efficiency import Extrapolation, PublicRun, extrapolate, public_runs, shortest, token_ratio
from pretrain.comparison.facts import ByData, Claim, Facts, Score
from pretrain.comparison.measured import Measured
from pretrain.comparison.scores import plain_score, setting
from pretrain.comparison.sizes import scientific, short_count, training_flops
from pretrain.comparison.sources import Sources

_DEFINITION = (
    "Data efficiency is the number of tokens that another model needs for the same score, divided by the number that "
    "the subject was trained on. It depends on the other model, so each row names it. None of these definitions "
    "separates the optimizer from the text, the size, the schedule and the number of epochs: only runs that differ in "
    "the optimizer alone do. Tokens are counted by each model's own tokenizer, and are of different lengths."
)
_LIMITS = [
    "Tokens of the reference: a ratio of token counts is a data efficiency only if the scores are equal, which the "
    "last column says for our own measurement. The reference may have needed fewer tokens for that score than it was "
    "trained on.",
    "Shortest public AdamW run: at most this, since a shorter run may reach the score as well. These runs differ from "
    "the subject in text, size and harness.",
    "Power law: 1 − score = c × tokens^−a through the published scores of one AdamW model. The brackets are the "
    "smallest and largest estimate with one point left out, not a confidence interval. Beyond the largest token count "
    "it is an extrapolation, and it says nothing about AdamW on another text.",
]


def efficiency_part(facts: Facts, measured: Measured, sources: Sources) -> Part | None:
    """Return the part about the data efficiency that each claim implies; None without claims."""
    if not facts.claims:
        return None
    tables = []
    for claim, verdicts in zip(facts.claims, measured["verdicts"], strict=True):
        rows = [_stated(claim, sources), *_of_reference(facts, claim, verdicts, sources)]
        for score in facts.models[claim.subject].published:
            rows += _of_shortest(facts, claim, score, sources)
            rows += _of_power_law(facts, claim, score, sources)
        heads = ("Definition", "Compared with", "Task", "Tokens, ratio", "Training FLOPs, ratio", "At equal score?")
        tables.append(Table(claim.text, heads, rows, frozenset({3, 4})))
    return Part("efficiency", "Data efficiency", paragraphs=[_DEFINITION], tables=tables, notes=_LIMITS)


def _stated(claim: Claim, sources: Sources) -> list[Cell]:
    ratio = Cell(times(claim.ratio), claim.ratio, "", sources.cite(claim.source))
    return [Cell("as claimed", "0"), Cell(claim.reference), EMPTY, ratio, EMPTY, Cell("claimed")]


def _of_reference(facts: Facts, claim: Claim, verdicts: dict[str, str], sources: Sources) -> Iterator[list[Cell]]:
    ratio = token_ratio(facts, claim)
    models = [facts.models[label] for label in (claim.reference, claim.subject)]
    cited = sources.cite(*(model.tokens.source for model in models if model.tokens))
    costs = [training_flops(model) for model in models]
    flops = EMPTY
    if costs[0] is not None and costs[1] is not None:
        quotient = costs[0].value / costs[1].value
        flops = Cell(times(quotient), quotient, "", sources.cite(*costs[0].sources, *costs[1].sources))
    for task, verdict in (verdicts or {"": NOT_RUN}).items():
        yield [
            Cell("tokens of the reference", "1"),
            Cell(claim.reference),
            Cell(task) if task else EMPTY,
            Cell(times(ratio), ratio, "", cited),
            flops,
            Cell(verdict, small="measured by us" if task else ""),
        ]


def _of_shortest(facts: Facts, claim: Claim, score: Score, sources: Sources) -> Iterator[list[Cell]]:
    subject = facts.models[claim.subject]
    found = shortest([run for run in public_runs(facts, score.task) if run.name != claim.subject], score.value)
    if not found or subject.tokens is None:
        return
    ratio = found[0].tokens / subject.tokens.value
    used = [score.source, subject.tokens.source, *(source for run in found for source in run.sources)]
    yield [
        Cell("shortest public AdamW run", "2"),
        Cell("; ".join(run.name for run in found), small=f"{short_count(found[0].tokens)} tokens"),
        Cell(score.task),
        Cell(f"at most {times(ratio)}", ratio, "", sources.cite(*used)),
        _flops_ratio(found, facts, claim),
        Cell(
            f"{', '.join(plain_score(run.score) for run in found)} against {plain_score(score.value)}",
            small="published scores, different harnesses",
        ),
    ]


def _flops_ratio(found: Sequence[PublicRun], facts: Facts, claim: Claim) -> Cell:
    """6 x parameters x tokens of the smallest of the runs, relative to the subject's training FLOPs."""
    own = training_flops(facts.models[claim.subject])
    sizes = [run.parameters for run in found if run.parameters is not None]
    if own is None or not sizes:
        return EMPTY
    ratio = 6 * min(sizes) * found[0].tokens / own.value
    return Cell(f"at most {times(ratio)}", ratio, f"{scientific(ratio * own.value)} against {scientific(own.value)}")


def _of_power_law(facts: Facts, claim: Claim, score: Score, sources: Sources) -> Iterator[list[Cell]]:
    subject = facts.models[claim.subject]
    for series in facts.by_tokens:
        found = extrapolate(series, score.value) if series.task == score.task else None
        if found is None or subject.tokens is None:
            continue
        own = subject.tokens.value
        high = "more" if found.high is None else times(found.high / own)
        used = [score.source, subject.tokens.source, series.source, *(point.source for point in series.points)]
        yield [
            Cell("power law through AdamW scores", "3"),
            Cell(
                f"{series.name} on {series.data}",
                small=f"{len(series.points)} points, {setting(series.metric, series.shots)}; {series.note}".rstrip(
                    "; "
                ),
            ),
            Cell(score.task),
            Cell(
                f"{times(found.tokens / own)} [{times(found.low / own)} to {high}]",
                found.tokens / own,
                _beyond(found),
                sources.cite(*used),
            ),
            EMPTY,
            Cell(f"by construction, {plain_score(score.value)}", small=f"points lie within {found.deviation:.3f}"),
        ]


def _beyond(found: Extrapolation) -> str:
    tokens = f"{short_count(found.tokens)} tokens"
    if found.beyond <= 1:
        return f"{tokens}, within the data"
    return f"{tokens}, {times(found.beyond)} beyond the data"


def data_part(facts: Facts, sources: Sources) -> Part | None:
    """Return the part about the influence of the training text; None without such runs."""
    if not facts.by_data:
        return None
    return Part(
        "text",
        "The influence of the text",
        paragraphs=[line for group in facts.by_data for line in _confounded(facts, group)],
        tables=[_by_data(group, sources) for group in facts.by_data],
        notes=[f"{group.name}: {group.note}." for group in facts.by_data if group.note],
    )


def _by_data(group: ByData, sources: Sources) -> Table:
    best = max(group.scores.values())
    uncertainty = f" ± {group.plus_minus:g}" if group.plus_minus else ""
    cited = sources.cite(group.source)
    rows = [
        [
            Cell(text, text),
            Cell(f"{plain_score(score)}{uncertainty}", score, "", cited),
            Cell(f"{score - best:+.3f}" if score != best else "best", score - best),
        ]
        for text, score in sorted(group.scores.items(), key=lambda item: -item[1])
    ]
    title = f"{group.name}, {group.optimizer}, {short_count(group.tokens)} tokens"
    heads = ("Text", f"{group.task}, published", "Difference to the best")
    return Table(f"{title}: {setting(group.metric, group.shots)}", heads, rows, frozenset({1}))


def _confounded(facts: Facts, group: ByData) -> Iterator[str]:
    """Say how much the text moves the score, next to the differences that the claims are about."""
    best, worst = max(group.scores.values()), min(group.scores.values())
    yield (
        f"With one optimizer ({group.optimizer}), one model ({group.name}) and one number of tokens "
        f"({short_count(group.tokens)}), the text alone moves {group.task} by {100 * (best - worst):.1f} points, from "
        f"{plain_score(worst)} to {plain_score(best)}."
    )
    for claim in facts.claims:
        own, other = (_published(facts, label, group.task) for label in (claim.subject, claim.reference))
        if own is not None and other is not None:
            as_high = [text for text, score in group.scores.items() if score >= other.value]
            yield (
                f"{claim.subject} and {claim.reference} are {100 * abs(own.value - other.value):.1f} points apart on "
                f"{group.task} as published, and {len(as_high)} of these {len(group.scores)} AdamW runs score at least "
                f"as high as {claim.reference}. So a score close to it does not show that the optimizer is better: "
                f"that needs a comparison of data × optimizer, in which each text is trained on with each optimizer."
            )


def _published(facts: Facts, label: str, task: str) -> Score | None:
    return next((score for score in facts.models[label].published if score.task == task), None)


def times(ratio: float) -> str:
    """Format a ratio: "3.0x", "360x"."""
    return f"{ratio:.1f}x" if ratio < 10 else f"{ratio:,.0f}x"
