"""Data efficiency: how many times more tokens another model needs for the same score, under three definitions.

All of them are ratios (tokens of the other) / (tokens of the subject) at equal score. They differ in what the other is:
the claim's reference, the shortest public AdamW run that scores as high, or a power law through AdamW scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.comparison.facts import ByTokens, Claim, Facts

BASELINE = "AdamW"
_FEWEST_POINTS = 3


@dataclass(frozen=True)
class PublicRun:
    """A published score of a run.

    Attributes:
        name: the run, with its text.
        tokens: tokens of training.
        parameters: number of parameters; None if not known.
        score: the score.
        plus_minus: uncertainty of reading it.
        sources: names of the sources of score and token count.
    """

    name: str
    tokens: float
    parameters: float | None
    score: float
    plus_minus: float
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Fit:
    """The power law error = c * tokens^-exponent, fitted by least squares of the logarithms; error = 1 - score.

    Attributes:
        exponent: the exponent; more tokens help only if it is above 0.
        log_c: natural logarithm of c.
        largest_deviation: largest distance of a point from the law, in score.
    """

    exponent: float
    log_c: float
    largest_deviation: float

    def tokens_for(self, score: float) -> float | None:
        """Return the tokens at which the law reaches a score below 1; None if it never does."""
        if self.exponent <= 0 or score >= 1:
            return None
        power = (self.log_c - math.log(1 - score)) / self.exponent
        return math.exp(power) if power < math.log(1e30) else None


@dataclass(frozen=True)
class Extrapolation:
    """What a power law says about the tokens for a score.

    Attributes:
        tokens: the estimate.
        low: smallest estimate of the same fit with one point left out.
        high: largest one; None if one of those fits never reaches the score.
        beyond: the estimate as a multiple of the largest token count of the data; 1 and below is no extrapolation.
        deviation: largest distance of a point from the law, in score.
    """

    tokens: float
    low: float
    high: float | None
    beyond: float
    deviation: float


def token_ratio(facts: Facts, claim: Claim) -> float:
    """Return the reference's published token count divided by the subject's."""
    tokens = [facts.models[label].tokens for label in (claim.reference, claim.subject)]
    return tokens[0].value / tokens[1].value  # type: ignore[union-attr]


def public_runs(facts: Facts, task: str) -> Iterator[PublicRun]:
    """Yield the published scores of AdamW runs on a task."""
    for group in facts.by_data:
        if group.optimizer == BASELINE and group.task == task:
            for text, score in group.scores.items():
                name = f"{group.name} on {text}"
                yield PublicRun(name, group.tokens, group.parameters, score, group.plus_minus, (group.source,))
    for series in facts.by_tokens:
        if series.optimizer == BASELINE and series.task == task:
            for point in series.points:
                yield PublicRun(series.name, point.tokens, series.parameters, point.value, 0.0, (point.source,))
    for label, model in facts.models.items():
        if model.optimizer == BASELINE and model.tokens is not None:
            size = model.parameters.value if model.parameters else None
            for found in model.published:
                if found.task == task:
                    sources = tuple(dict.fromkeys((found.source, model.tokens.source)))
                    yield PublicRun(label, model.tokens.value, size, found.value, 0.0, sources)


def shortest(runs: Sequence[PublicRun], score: float) -> list[PublicRun]:
    """Return the runs with the fewest tokens among those that score at least as high; several if they tie.

    A run counts only if its score is as high even at the low end of its uncertainty of reading.
    """
    as_good = [run for run in runs if run.score - run.plus_minus >= score]
    fewest = min((run.tokens for run in as_good), default=0.0)
    return [run for run in as_good if run.tokens == fewest]


def fit(tokens: Sequence[float], scores: Sequence[float]) -> Fit | None:
    """Fit the power law; None with fewer than two different token counts, or with a score of 1."""
    if len(set(tokens)) < 2 or max(scores) >= 1:
        return None
    x, y = np.log(np.array(tokens)), np.log1p(-np.array(scores))
    slope, log_c = np.polyfit(x, y, 1)
    deviation = float(np.abs(np.exp(log_c + slope * x) - np.exp(y)).max())
    return Fit(-float(slope), float(log_c), deviation)


def extrapolate(series: ByTokens, score: float) -> Extrapolation | None:
    """Return the tokens at which a series would reach a score; None with fewer than three points or without a trend."""
    tokens, scores = [point.tokens for point in series.points], [point.value for point in series.points]
    whole = fit(tokens, scores)
    estimate = whole.tokens_for(score) if whole is not None else None
    if whole is None or estimate is None or len(set(tokens)) < _FEWEST_POINTS:
        return None
    others = []
    for left_out in range(len(tokens)):
        part = fit(tokens[:left_out] + tokens[left_out + 1 :], scores[:left_out] + scores[left_out + 1 :])
        others.append(part.tokens_for(score) if part is not None else None)
    known = [other for other in others if other is not None]
    high = max([estimate, *known]) if len(known) == len(others) else None
    return Extrapolation(estimate, min([estimate, *known]), high, estimate / max(tokens), whole.largest_deviation)
