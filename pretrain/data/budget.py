"""How often a run reads each source: the tokens that it takes from the source over those that the source holds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pretrain.config import Config
from pretrain.data.estimate import Quantity, SourceEstimate, rounded
from pretrain.data.order import exact

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
    """As configured."""

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


def source_budgets(config: Config, estimates: Sequence[SourceEstimate]) -> list[SourceBudget]:
    """Divide the tokens of a run among the sources of its config."""
    trained = 1 - config.data.validation_fraction
    available = [Quantity(one.tokens.value * trained, one.tokens.error * trained) for one in estimates]
    passes = [float(exact(source.weight)) for source in config.data.sources]
    epoch = sum(weight * text.value for weight, text in zip(passes, available, strict=True))
    return [
        SourceBudget(
            name=estimate.path,
            tokens=config.train.total_tokens * share,
            share=share,
            available=text,
            max_epochs=source.max_epochs,
        )
        for source, estimate, text, weight in zip(config.data.sources, estimates, available, passes, strict=True)
        for share in [weight * text.value / epoch if epoch else 0.0]
    ]


def describe_data(budgets: Sequence[SourceBudget]) -> list[str]:
    """One line per source, in the form of `pretrain.planning.summary.describe`."""
    return [f"data      {one}" for one in budgets]


def budget_problems(budgets: Sequence[SourceBudget]) -> list[str]:
    """The sources that a run would certainly read more often than `max_epochs` allows, one message each."""
    return [
        f"data.sources.{index}.max_epochs: {one.name} holds {one.available} tokens of training text, but the run takes "
        f"{rounded(one.tokens)} tokens from it: {rounded(one.epochs)} epochs, and {one.max_epochs:g} are allowed; "
        "lower train.total_tokens, add data, lower the share of this source, or raise its max_epochs"
        for index, one in enumerate(budgets)
        if one.available.value and one.least_epochs > one.max_epochs
    ]


def budget_warnings(config: Config, budgets: Sequence[SourceBudget]) -> list[str]:
    """What is allowed, but most likely not meant; one line each."""
    found = []
    for one in budgets:
        if not one.available.value:
            found.append(f"{one.name}: no text was found in a sample of it, so its epochs are not known")
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


def vocabulary_warning(config: Config, rows: int) -> list[str]:
    """A warning if the tokenizer, whose largest id is `rows` - 1, leaves much of the model's vocabulary unused."""
    size = config.model.vocab_size
    if rows >= _LEAST_USED * size:
        return []
    return [
        f"model.vocab_size: {config.tokenizer.path} has {rows:,} entries, so {size - rows:,} of the {size:,} rows of "
        "the embedding are never used"
    ]
