"""Config section `data`: which text is read, and in which order."""

from typing import Annotated

from pydantic import Field

from pretrain.config.base import CONTENTS, EXECUTION, NOTE, RESULT, Section
from pretrain.config.fields import InputPath
from pretrain.config.tokenizer import TokenizerConfig

__all__ = ["DataConfig", "SourceConfig", "TokenizerConfig"]


class SourceConfig(Section):
    """One source of text: a file, every readable file below a folder, or the files that a glob matches."""

    key_class = RESULT

    path: Annotated[InputPath, CONTENTS]
    """A file, a folder (searched recursively) or a glob such as `corpus/**/*.parquet`, relative to the working
    directory. Files are `.parquet`, `.jsonl`, `.jsonl.gz` or `.jsonl.zst`. A path that does not exist is an error
    before training starts. A run can be resumed with its data elsewhere, as long as the files and their order match."""

    weight: float = Field(default=1.0, gt=0)
    """Passes over the source per epoch: 1 reads each document once, 2 twice, 0.5 a seeded half of the read units
    in each epoch, 1.5 all of them and a seeded half. Too high a weight repeats text often enough to be memorised."""

    text_field: str = Field(default="text", min_length=1)
    """The parquet column, or the key of each JSON line, that holds the text. If it does not exist, the error lists
    the columns that do."""

    split_units: int = Field(default=1, ge=1)
    """The number of read units into which each file (JSON lines) or row group (parquet) is divided, by taking every
    n-th row. For small sources with fewer units than `data.lanes`. Every unit reads the file again, so keep it low."""

    max_epochs: Annotated[float, EXECUTION] = Field(default=4.0, gt=0)
    """How often the run may read the source. If its tokens, which are estimated from a sample, are certainly too few
    for that, the run is refused before it starts. Up to about four epochs, repeated text is worth nearly as much as new
    text; beyond that ever less."""

    licence: Annotated[str | None, NOTE] = None
    """The licence of the text, for the manifest and the model card, if the text has no column `licence`."""


class DataConfig(Section):
    """The text stream of a run. All keys but `workers` decide which token comes when."""

    key_class = RESULT

    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False, min_length=1)]
    """The sources, mixed by `weight`. Their order decides the order of the stream."""

    lanes: int = Field(default=128, ge=1)
    """Parallel readers of the stream, each with its own read units; sequences are dealt from them in turn. The number
    of lanes fixes the order of the text for any number of processes and workers, so it cannot change within a run. At
    most the number of read units; with fewer lanes than processes times workers, some workers stay idle."""

    workers: Annotated[int, EXECUTION] = Field(default=0, ge=0)
    """Reading processes per training process. 0 reads in the training process itself, which then tokenizes between
    two steps. Each worker uses one core. Changes the speed, never the stream."""

    seed: int = Field(default=0, ge=0)
    """Seed of the order in which units are read, which is different in every epoch. Does not depend on the rank."""

    validation_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of the documents, chosen by a hash of their text, that are never trained on and form the validation
    split: the same documents on every machine and in any order. 0 means no validation split."""

    document_mask: bool = False
    """Whether a token attends to its own document only, instead of everything before it in the sequence. This passes
    an explicit mask, so the fused causal attention kernel cannot be used."""

    reset_positions: bool = False
    """Whether rotary positions start at 0 in each document, instead of once per sequence."""
