"""The validation set of remote and prepared sources: drawn once, kept in the run folder, and part of its identity."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from pretrain.config import Config, identity_hash
from pretrain.data import DocumentEncoder, TokenBatch, separator_id
from pretrain.data.validation_sample import SampledSource, ValidationSample, is_sampled, sample_validation
from pretrain.engine.base import Engine
from pretrain.files import replacing
from pretrain.run.inputs import Inputs

_VERSION = 1
"""Of the way in which a sample is drawn and stored."""


@dataclass(frozen=True)
class ValidationStore:
    """The file of a run that holds its validation set.

    Attributes:
        path: the file.
        key: what the set depends on; a file with another key is not used.
    """

    path: Path
    key: str

    def load(self) -> ValidationSample | None:
        """Read the set; None if it is not stored, or the file is damaged."""
        try:
            with np.load(self.path, allow_pickle=False) as file:
                if str(file["key"]) != self.key:
                    return None
                sources = tuple(SampledSource(**source) for source in json.loads(str(file["sources"])))
                found = ValidationSample(file["tokens"], file["lengths"], int(file["text_bytes"]), sources)
                return found if found.sha256 == str(file["sha256"]) else None
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
            return None

    def save(self, sample: ValidationSample) -> None:
        """Write the set in one rename."""
        with replacing(self.path) as partial, partial.open("wb") as file:
            np.savez(
                file,
                key=self.key,
                sha256=sample.sha256,
                tokens=sample.tokens,
                lengths=sample.lengths,
                text_bytes=sample.text_bytes,
                sources=json.dumps([asdict(source) for source in sample.sources]),
            )


@dataclass(frozen=True)
class ValidationSet:
    """The validation set of a run, and where it is kept."""

    sample: ValidationSample
    store: ValidationStore

    def keep(self) -> None:
        """Save the set unless it is there already."""
        if self.store.load() is None:
            self.store.save(self.sample)

    def batches(self, rows: int) -> list[TokenBatch]:
        """Return the set in batches of `rows` sequences."""
        tokens, lengths = torch.from_numpy(self.sample.tokens), torch.from_numpy(self.sample.lengths)
        return [TokenBatch(*pair) for pair in zip(tokens.split(rows), lengths.split(rows), strict=True)]

    def record(self) -> dict[str, Any]:
        """Return what the manifest says of it."""
        return {
            "sha256": self.sample.sha256,
            "tokens": int(self.sample.lengths.sum()),
            "text_bytes": self.sample.text_bytes,
            "sources": [asdict(source) for source in self.sample.sources],
        }


def validation_set(
    config: Config,
    inputs: Inputs,
    tokenizer: Tokenizer,
    path: Path,
    identity: dict[str, Any],
    engine: Engine,
) -> ValidationSet | None:
    """Load the validation set of a run, or draw it on rank 0; None if all sources are local text, or there is none.

    A collective.

    Args:
        config: the run.
        inputs: its sources.
        tokenizer: its tokenizer.
        path: the file in the run folder that keeps the set; `ValidationSet.keep` writes it.
        identity: what the run computes: decides whether the file is that of this run.
        engine: knows all ranks of the run; says what a set consists of that is drawn now.

    Raises:
        DataError: see `sample_validation`.
    """
    if not config.data.validation_fraction or not is_sampled(inputs.catalog):
        return None
    limits = {
        "max_tokens": config.validation.max_tokens,
        "max_read_mib": config.validation.max_read_mib,
    }
    key = identity_hash(
        {"version": _VERSION, "identity": identity, "sequence_length": config.sequence_length, **limits}
    )
    store = ValidationStore(path, key)
    # Averaged over the whole run: all stages, and the ends of sources.
    shares = [budget.share for budget in inputs.budgets]
    found: list[ValidationSample] = []

    def find() -> None:
        stored = store.load()
        if stored is None:
            engine.say("drawing the validation set")
            stored = _draw(config, inputs, tokenizer, shares)
            for source in stored.sources:
                engine.say(f"validation {source}")
        found.append(stored)

    engine.ranks.on_rank_0(find, long=True)
    # Not as its result, of which every rank would receive a copy from each rank.
    return ValidationSet(engine.ranks.broadcast(found[0] if found else None), store)


def _draw(config: Config, inputs: Inputs, tokenizer: Tokenizer, shares: Sequence[float]) -> ValidationSample:
    encoder = DocumentEncoder(tokenizer, separator_id(tokenizer, config.tokenizer), config.tokenizer.path)
    return sample_validation(
        config.data,
        inputs.catalog,
        encoder,
        config.sequence_length,
        shares=shares,
        max_tokens=config.validation.max_tokens,
        max_bytes=config.validation.max_read_mib << 20,
    )
