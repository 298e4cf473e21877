"""The sections `data` and `tokenizer`: which text is read, in which order, and how it becomes tokens."""

from typing import Annotated

from pydantic import AfterValidator, Field

from pretrain.config.base import Section
from pretrain.shipped import locate


class SourceConfig(Section):
    """One source of text: a file, every readable file below a folder, or the files that a glob matches."""

    path: Annotated[str, AfterValidator(locate)] = Field(min_length=1)
    """A file, a folder (searched recursively) or a glob such as `corpus/**/*.parquet`; relative to the working
    directory. Read are `.parquet`, `.jsonl`, `.jsonl.gz` and `.jsonl.zst`. A wrong path is refused before training."""

    weight: float = Field(default=1.0, gt=0)
    """Passes over the source per epoch: 1 reads each document once, 2 twice, 0.5 a seeded half of the read units
    each epoch, 1.5 all of them and a seeded half. Too high repeats text often enough to be memorised."""

    text_field: str = Field(default="text", min_length=1)
    """The parquet column, or the key of each JSON line, that holds the text. A wrong name is refused and the
    columns that exist are listed."""

    split_units: int = Field(default=1, ge=1)
    """Into how many read units each file (JSON lines) or row group (parquet) is divided, by taking every n-th row.
    For small sources with fewer units than `data.lanes`. Every unit reads its file again, so keep it small."""

    licence: str | None = None
    """The licence of the text, for the manifest and the model card, where no column `licence` states it."""


class DataConfig(Section):
    """The text stream of a run. All keys but `workers` decide which token comes when: identity keys."""

    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False, min_length=1)]
    """The sources, mixed by `weight`. Their order is part of the stream's identity."""

    lanes: int = Field(default=128, ge=1)
    """Parallel readers of the stream, each with read units of its own; sequences are dealt from them in turn. It
    fixes the order of the text whatever the number of processes and workers, so it never changes within a run. At
    most the number of read units; fewer lanes than processes times workers leave some of those idle."""

    workers: int = Field(default=0, ge=0)
    """Reading processes per training process; 0 reads in the training process itself, which then tokenizes between
    two steps. Each worker uses one core. Changes the speed, never the stream."""

    seed: int = Field(default=0, ge=0)
    """Seed of the order in which units are read, other in every epoch. Independent of the rank."""

    validation_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of the documents, chosen by a hash of their text, that is never trained on and forms the validation
    split: the same documents on every machine and in any order. 0 means no validation split."""

    document_mask: bool = False
    """Whether a token attends to its own document only, instead of everything before it in the sequence. Costs
    the fused causal attention kernel: an explicit mask is passed."""

    reset_positions: bool = False
    """Whether rotary positions start at 0 in each document, instead of once per sequence."""


class TokenizerConfig(Section):
    """The tokenizer, a `tokenizer.json` of the tokenizers library."""

    path: Annotated[str, AfterValidator(locate)] = Field(min_length=1)
    """The `tokenizer.json` file, relative to the working directory."""

    eos_token: str = Field(default="<|endoftext|>", min_length=1)
    """The special token that separates documents. It must exist in the tokenizer and be marked special there.
    The same characters inside a text are read as ordinary text."""
