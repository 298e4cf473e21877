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
from pretrain.data.catalog import Locked
from pretrain.data.hub_tokenizer import local_file
from pretrain.files import file_sha256


@dataclass(frozen=True)
class Inputs:
    """What a run reads besides its config."""

    catalog: Catalog
    data: dict[str, Any]
    """The data's fingerprint."""
    tokenizer_sha256: str


def check_inputs(
    config: Config,
    tokenizer: Tokenizer | None,
    locked: Locked,
    located: TokenizerConfig | None = None,
    *,
    online: bool = True,
) -> Inputs:
    """Read every local file that the run reads, and the first texts of its remote sources.

    Args:
        config: the run's config.
        tokenizer: loaded; None: it is not on this machine, and not looked at.
        locked: the remote sources.
        located: names the local file of the tokenizer; None: the one in the cache if it is on the Hub.
        online: whether remote sources are read.

    Raises:
        ConfigError: with everything that is wrong.
    """
    encoder = None
    if tokenizer is not None:
        encoder = DocumentEncoder(tokenizer, separator_id(tokenizer, config.tokenizer), config.tokenizer.path)
    catalog, problems = survey(config.data, locked, encoder, online=online)
    sha256 = ""
    if tokenizer is not None:
        rows = vocabulary_rows(tokenizer)
        if rows > config.model.vocab_size:
            problems.append(
                f"model.vocab_size: expected at least {rows}, the largest token id in {config.tokenizer.path} plus 1, "
                f"got {config.model.vocab_size}"
            )
        located = located or config.tokenizer.model_copy(update={"path": str(local_file(config.tokenizer.path))})
        problems += tokenizer_problems(catalog, tokenizer, located)
        sha256 = file_sha256(Path(located.path))
    if problems:
        raise ConfigError(problems)
    return Inputs(catalog, dict(fingerprint(config.data, catalog)), tokenizer_sha256=sha256)
