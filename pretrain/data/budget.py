"""How often a run reads each source: the tokens that it takes from the source over those that the source holds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from pretrain.config import Config
from pretrain.data.mixture import Stage
from pretrain.data.order import make_stages
from pretrain.data.quantity import Quantity, rounded

MANY_EPOCHS = 4.0
"""Up to about four epochs, repeated text is worth nearly as much as new text (Muennighoff et al., "Scaling
Data-Constrained Language Models", NeurIPS 2023)."""
_LEAST_STEPS = 10
_LEAST_USED = 0.9


@dataclass(frozen=True, slots=True)
class SourceBudget:
    """What a run takes from one source."""

    name: str
    tokens: float
    """Tokens of the run that come from this source."""
    share: float
    """Of all tokens of the run."""
    available: Quantity
    """Tokens of the source's training split."""
    max_epochs: float
    """As configured; infinity for no limit."""
    ends: bool
    """Whether the source ends when it has been read that often, instead of the run being refused."""

    @property
    def epochs(self) -> float:
        """Passes over the source, as estimated."""
        return _times(self.tokens, self.available.value)

    @property
    def least_epochs(self) -> float:
        """Passes over the source if it holds two standard errors more than estimated."""
        return _times(self.tokens, self.available.upper)

    @property
    def most_epochs(self) -> float:
        """Passes over the source if it holds two standard errors less than estimated."""
        return _times(self.tokens, self.available.lower)

    def __str__(self) -> str:
        """One line for the start of a run."""
        how = "estimated" if self.available.error else "counted"
        return (
            f"{self.name}: {self.available} tokens of training text ({how}); {self.share:.3g} of the run's tokens, "
            f"about {rounded(self.epochs)} epochs"
        )


def _times(tokens: float, available: float) -> float:
    return tokens / available if available else (math.inf if tokens else 0.0)


def source_budgets(config: Config, tokens: Sequence[Quantity]) -> list[SourceBudget]:
    """Divide the tokens of a run among the sources of its config, as its mixture or stages do, or by their size.

    A source that ends after `max_epochs` (`data.past_max_epochs: end_source`) gives no more than it holds.

    Args:
        config: the run.
        tokens: of each source, of both splits.

    """
    trained = 1 - config.data.validation_fraction
    available = [Quantity(one.value * trained, one.error * trained) for one in tokens]
    limits = [math.inf if limit is None else limit for limit in config.data.epoch_limits]
    most = [limit * text.value if text.value else 0.0 for limit, text in zip(limits, available, strict=True)]
    stages = make_stages(config.data) or (Stage(tuple(Fraction(text.value) for text in available), None),)
    parts = divide(stages, config.train.total_tokens, most)
    return [
        SourceBudget(
            name=name,
            tokens=taken,
            share=taken / config.train.total_tokens,
            available=text,
            max_epochs=math.inf if source.max_epochs is None else source.max_epochs,
            ends=config.data.past_max_epochs == "end_source",
        )
        for name, source, text, taken in zip(config.data.names, config.data.sources, available, parts, strict=True)
    ]


def divide(stages: Sequence[Stage], total: float, most: Sequence[float]) -> list[float]:
    """Return the tokens of each source in a run of `total` tokens, of which source i gives at most `most[i]`.

    When a source has given all, the others of the stage have its share, in proportion. A stage whose sources have all
    ended is left early, as the stream does.
    """
    tokens = [0.0] * len(most)
    done = 0.0
    for stage in stages:
        left = min(total, math.inf if stage.until_tokens is None else stage.until_tokens) - done
        while left > 0:
            live = [index for index, share in enumerate(stage.shares) if share and tokens[index] < most[index]]
            if not live:
                break
            unit = float(sum(stage.shares[index] for index in live))
            parts = {index: float(stage.shares[index]) / unit for index in live}
            first = min(live, key=lambda index: (most[index] - tokens[index]) / parts[index])
            step = min(left, (most[first] - tokens[first]) / parts[first])
            for index, part in parts.items():
                tokens[index] += part * step
            if step < left:
                tokens[first] = most[first]
            left, done = left - step, done + step
    return tokens


def describe_data(budgets: Sequence[SourceBudget]) -> list[str]:
    """One line per source, in the form of `pretrain.planning.summary.describe`."""
    return [f"data      {one}" for one in budgets]


def budget_problems(budgets: Sequence[SourceBudget], total_tokens: float) -> list[str]:
    """The sources that a run would certainly read more often than `max_epochs` allows, one message each."""
    if budgets and budgets[0].ends:
        most = sum(one.max_epochs * one.available.upper for one in budgets)
        if most >= total_tokens:
            return []
        return [
            f"train.total_tokens: the sources give at most {rounded(most)} tokens within their max_epochs, as "
            f"estimated, but the run takes {rounded(total_tokens)}; lower it, add data, or raise max_epochs"
        ]
    return [
        f"data.sources.{index}.max_epochs: {one.name} holds {one.available} tokens of training text, but the run takes "
        f"{rounded(one.tokens)} tokens from it: {rounded(one.epochs)} epochs, and {one.max_epochs:g} are allowed; "
        "lower train.total_tokens, add data, lower the share of this source, raise its max_epochs, or set "
        "data.past_max_epochs to end_source"
        for index, one in enumerate(budgets)
        if one.available.value and one.least_epochs > one.max_epochs
    ]


def budget_warnings(config: Config, budgets: Sequence[SourceBudget]) -> list[str]:
    """Return what is allowed but probably not intended, one line each."""
    found = []
    for one in budgets:
        if not one.available.value:
            found.append(f"{one.name}: no text was found in a sample of it, so its epochs are not known")
        elif one.ends and one.epochs > 0.999 * one.max_epochs:
            found.append(
                f"{one.name}: ends after {one.max_epochs:g} epochs, about {rounded(one.tokens)} tokens, before the run "
                "does; its share then goes to the other sources"
            )
        elif one.most_epochs > one.max_epochs >= one.least_epochs:
            found.append(
                f"{one.name}: the run reads it about {rounded(one.epochs)} times, which may be more than max_epochs "
                f"({one.max_epochs:g}): its tokens are estimated, {one.available}"
            )
        elif one.epochs > MANY_EPOCHS:
            found.append(
                f"{one.name}: the run reads it about {rounded(one.epochs)} times; after about {MANY_EPOCHS:g} epochs "
                "repeated text teaches much less than new text"
            )
        if one.available.value and one.tokens < config.sequence_length:
            found.append(
                f"{one.name}: the run takes {one.tokens:,.0f} tokens from it, which is less than one sequence "
                f"({config.sequence_length}): it may never be read"
            )
    available = sum(one.available.value for one in budgets)
    steps, lanes = available / config.train.global_batch_tokens, config.data.lanes
    if steps < _LEAST_STEPS:
        found.append(f"data.sources: all training text is about {rounded(available)} tokens, {steps:.2g} steps")
    elif available < lanes * config.sequence_length:
        found.append(
            f"data.lanes: about {rounded(available)} tokens of training text are less than a sequence of "
            f"{config.sequence_length} tokens for each of the {lanes} lanes"
        )
    return found


def stage_warnings(config: Config) -> list[str]:
    """A warning if the run ends before its last stages begin; it may be meant, since a run can be extended later."""
    total, length = config.train.total_tokens, config.sequence_length
    stages = config.data.stages or ()
    ends = [-(-(stage.until_tokens or 0) // length) * length for stage in stages[:-1]]  # whole sequences
    index = next((index for index, end in enumerate(ends) if end >= total), None)
    if index is None:
        return []
    late = len(stages) - 1 - index
    what = f"stage {index + 1} never begins" if late == 1 else f"stages {index + 1} to {len(stages) - 1} never begin"
    return [
        f"data.stages.{index}.until_tokens: {what}, since stage {index} ends at {ends[index]:,} tokens and the run at "
        f"{total:,} (train.total_tokens), counting stages from 0"
    ]


def vocabulary_warning(config: Config, rows: int) -> list[str]:
    """A warning if the tokenizer, whose largest id is `rows` - 1, leaves much of the model's vocabulary unused."""
    size = config.model.vocab_size
    if rows >= _LEAST_USED * size:
        return []
    return [
        f"model.vocab_size: {config.tokenizer.path} has {rows:,} entries, so {size - rows:,} of the {size:,} rows of "
        "the embedding are never used"
    ]
