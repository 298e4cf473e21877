"""What a run reads besides its config: data and tokenizer, looked at before it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pretrain.config import Config, ConfigError
from pretrain.config.tokenizer import TokenizerConfig
from pretrain.data import (
    Catalog,
    DocumentEncoder,
    fingerprint,
    separator_id,
    survey,
    tokenizer_problems,
    vocabulary_rows,
)
from pretrain.data.budget import (
    SourceBudget,
    budget_problems,
    budget_warnings,
    source_budgets,
    stage_warnings,
    vocabulary_warning,
)
from pretrain.data.catalog import Locked
from pretrain.data.estimate import source_tokens
from pretrain.data.hub_tokenizer import local_file
from pretrain.data.text_count import TextCount
from pretrain.data.tokenizer_checks import ids_or_none
from pretrain.files import file_sha256


@dataclass(frozen=True)
class Inputs:
    """What a run reads besides its config."""

    catalog: Catalog
    data: dict[str, Any]
    """The data's fingerprint."""
    tokenizer_sha256: str
    budgets: tuple[SourceBudget, ...] = ()
    """How often the run reads each source, estimated; empty if a source cannot be looked at."""
    warnings: tuple[str, ...] = ()


def check_inputs(
    config: Config,
    tokenizer: Tokenizer | None,
    locked: Locked | None = None,
    located: TokenizerConfig | None = None,
    *,
    online: bool = True,
) -> Inputs:
    """Read every local file that the run reads and the first texts of its remote sources; estimate the epochs.

    Args:
        config: the run's config.
        tokenizer: loaded; None: it is not on this machine, and not looked at.
        locked: the remote sources; those that are absent are resolved here.
        located: names the local file of the tokenizer; None: the one in the cache if it is on the Hub.
        online: whether remote sources are read.

    Raises:
        ConfigError: with everything that is wrong.
    """
    encoder = None
    if tokenizer is not None:
        encoder = DocumentEncoder(tokenizer, separator_id(tokenizer, config.tokenizer), config.tokenizer.path)
    counts: dict[int, TextCount] = {}
    catalog, problems = survey(config.data, locked, encoder, online=online, counts=counts)
    sha256, budgets, warnings = "", list[SourceBudget](), stage_warnings(config)
    if tokenizer is not None:
        rows = vocabulary_rows(tokenizer)
        if rows > config.model.vocab_size:
            problems.append(
                f"model.vocab_size: expected at least {rows}, the largest token id in {config.tokenizer.path} plus 1, "
                f"got {config.model.vocab_size}"
            )
        located = located or config.tokenizer.model_copy(
            update={"path": str(local_file(config.tokenizer.path, config.data))}
        )
        problems += tokenizer_problems(catalog, tokenizer, located)
        problems += _prompt_problems(config, tokenizer)
        sha256 = file_sha256(Path(located.path))
        warnings += vocabulary_warning(config, rows)
        if not problems and all(source.files and (online or source.pinned is None) for source in catalog.sources):
            budgets = source_budgets(config, source_tokens(config.data, catalog, tokenizer, counts))
            problems += budget_problems(budgets, config.train.total_tokens)
            warnings += budget_warnings(config, budgets)
    if problems:
        raise ConfigError(problems)
    return Inputs(catalog, dict(fingerprint(config.data, catalog)), sha256, tuple(budgets), tuple(warnings))


def _prompt_problems(config: Config, tokenizer: Tokenizer) -> list[str]:
    """The prompts that would fail at the first sample."""
    if config.samples.every_steps is None:
        return []
    problems = []
    for index, prompt in enumerate(config.samples.prompts):
        ids = ids_or_none(tokenizer, prompt)
        if ids is None:
            problems.append(f"samples.prompts.{index}: {config.tokenizer.path} cannot encode {prompt[:80]!r}")
        elif len(ids) + 1 >= config.model.context_length:
            problems.append(
                f"samples.prompts.{index}: expected fewer than model.context_length ({config.model.context_length}) - "
                f"1 tokens, so that something can follow, got {len(ids)}"
            )
    return problems
