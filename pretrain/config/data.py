"""Config section `data`: which text is read, and in which order."""

from typing import Annotated

from pydantic import Field, field_validator

from pretrain.config.base import CONTENTS, EXECUTION, NOTE, RESULT, Section
from pretrain.config.fields import InputPath
from pretrain.config.row_filter import parse_condition
from pretrain.config.text_field import parse_text_field
from pretrain.config.tokenizer import TokenizerConfig

__all__ = ["DataConfig", "SourceConfig", "TokenizerConfig"]


class SourceConfig(Section):
    """One source of text: a file, every readable file below a folder, or the files that a glob matches."""

    key_class = RESULT

    path: Annotated[InputPath, CONTENTS]
    """A file, a folder (searched recursively) or a glob such as `corpus/**/*.parquet`, relative to the working
    directory. Files are `.parquet`, or `.jsonl`, `.ndjson` or `.json`, each also `.gz`, `.zst` or `.zstd`, in any case.
    A `.json` holds one object per line or one array of objects. A path that does not exist is an error
    before training starts. A run can be resumed with its data elsewhere, as long as the files and their order match."""

    weight: float = Field(default=1.0, gt=0)
    """Passes over the source per epoch: 1 reads each document once, 2 twice, 0.5 a seeded half of the read units
    in each epoch, 1.5 all of them and a seeded half. Too high a weight repeats text often enough to be memorised."""

    text_field: str = Field(default="text", min_length=1)
    """The parquet column, or the key of each JSON object, that holds the text. If it does not exist, the error lists
    those that do. A dot leads into a nested field (`meta.text`), unless a field has the dot in its own name. A value
    with braces is a template of fields, such as `"{title}\\n\\n{text}"`: names only; `{{` and `}}` stand for braces. A
    row whose fields are all empty has no text."""

    where: str | None = None
    """Which rows are read, as a condition on their fields: `language == "en" and score >= 3`. Knows `==`, `!=`, `<`,
    `<=`, `>`, `>=`, `in ("a", "b")`, `not in`, `is null`, `is not null`, `and`, `or`, `not` and parentheses; strings in
    quotes, numbers, `true` and `false`; dots lead into nested fields, and names in backquotes may hold any character.
    Where a field is null or missing, every test of it but `is null` is false, `!=` and `not in` included; a value of
    another kind than the literal is different from it, and neither smaller nor larger. None reads every row."""

    split_units: int = Field(default=1, ge=1)
    """The number of read units into which each file (JSON lines) or row group (parquet) is divided, by taking every
    n-th row. For small sources with fewer units than `data.lanes`. Every unit reads the file again, so keep it low."""

    licence: Annotated[str | None, NOTE] = None
    """The licence of the text, for the manifest and the model card, if the text has no column `licence`."""

    @field_validator("text_field")
    @classmethod
    def _text_field_is_valid(cls, value: str) -> str:
        parse_text_field(value)
        return value

    @field_validator("where")
    @classmethod
    def _where_is_valid(cls, value: str | None) -> str | None:
        if value is not None:
            parse_condition(value)
        return value

    def implied(self) -> tuple[str, ...]:
        """`where` is newer than the first runs."""
        return ("where",) if self.where is None else ()


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

    max_bad_rows: Annotated[int, EXECUTION] = Field(default=0, ge=0)
    """The number of rows that may be skipped in an epoch because they cannot be used: text that is null, not a string
    or not valid UTF-8, broken JSON, rows of a damaged parquet page. Each one is logged. With one more, the run
    saves and ends with an error that names file and row; it can be resumed with a higher number."""

    max_document_mib: Annotated[int, EXECUTION] = Field(default=128, ge=1)
    """The largest row, in MiB, that is read; a larger one counts as a bad row. Bounds the memory that a broken or
    malicious file can take."""

    max_zstd_window_mib: Annotated[int, EXECUTION] = Field(default=128, ge=1, le=2048)
    """The largest window, in MiB, of a zstd file; a file that needs a larger one is refused. Every open file takes this
    much memory, and there is one for each lane. 128 is what `zstd --long` writes and what `zstd -d` reads without
    being asked; files written with `zstd --long=31` need 2048."""

    document_mask: bool = False
    """Whether a token attends to its own document only, instead of everything before it in the sequence. This passes
    an explicit mask, so the fused causal attention kernel cannot be used."""

    reset_positions: bool = False
    """Whether rotary positions start at 0 in each document, instead of once per sequence."""
