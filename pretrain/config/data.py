"""Config section `data`: which text is read, and in which order."""

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from pretrain.config.base import CONTENTS, EXECUTION, NOTE, RESULT, STORED, Section
from pretrain.config.fields import InputPath, PositiveFloat, PositiveInt
from pretrain.config.row_filter import parse_condition
from pretrain.config.source_path import is_remote, path_problem
from pretrain.config.text_field import parse_text_field
from pretrain.config.tokenizer import TokenizerConfig
from pretrain.processes.errors import did_you_mean

__all__ = ["DataConfig", "SourceConfig", "StageConfig", "TokenizerConfig", "is_remote"]

_MAX_EPOCHS = 4
# A smaller part of the tokens is less than a sequence of any run.
_LEAST_SHARE = 1e-12


class SourceConfig(Section):
    """One source of text: a file, every readable file below a folder, or the files that a glob matches."""

    key_class = RESULT

    path: Annotated[InputPath, CONTENTS]
    """A file, a folder (searched recursively) or a glob such as `corpus/**/*.parquet`, relative to the working
    directory. Files are `.parquet`, or `.jsonl`, `.ndjson` or `.json`, each also `.gz`, `.zst` or `.zstd`, in any case.
    A `.json` holds one object per line or one array of objects. A path that does not exist is an error
    before training starts. A run can be resumed with its data elsewhere, as long as the files and their order match."""

    name: Annotated[str | None, NOTE] = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    """What mixtures, progress and errors call the source: letters, digits, `-` and `_`. If null, the last part of the
    path that is not a pattern, without the kind of file: `web` for `/data/web/**/*.parquet`. Unique."""

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

    split_units: int = Field(default=1, ge=1, le=65_536)
    """The number of read units into which each file (JSON lines) or row group (parquet) is divided, by taking every
    n-th row. For small sources with fewer units than `data.lanes`. Every unit reads the file again, so keep it low."""

    max_epochs: PositiveInt | None = _MAX_EPOCHS
    """The largest number of times that the source may be read; null for no limit. Up to about 4 epochs, repeated text
    is nearly as good as new text; see `data.past_max_epochs` for what happens then."""

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

    def implied(self) -> Collection[str]:
        """The default limit, which only stops a run that would pass it, and no condition."""
        return {key for key, value in {"max_epochs": _MAX_EPOCHS, "where": None}.items() if getattr(self, key) == value}

    @model_validator(mode="before")
    @classmethod
    def _refuse_weight(cls, data: Any, info: ValidationInfo) -> Any:
        """An older version stored `weight: 1.0`, which one source is read with today."""
        if not isinstance(data, Mapping) or "weight" not in data:
            return data
        if info.context == STORED and data["weight"] == 1:
            return {key: value for key, value in data.items() if key != "weight"}
        raise ValueError(
            "weight: is replaced by data.mixture, which gives each source a share of the tokens instead of passes per "
            "epoch: remove it, and set data.mixture or data.stages if the sources are to be mixed other than by size"
        )


class StageConfig(Section):
    """A part of the run with a mixture of its own."""

    key_class = RESULT

    mixture: dict[str, Annotated[float, Field(ge=0)]]
    """The share of the tokens of each source, by name, in any unit. A source that is missing, or has the share 0, is
    not read in this stage and continues later from where it stopped."""

    until_tokens: PositiveInt | None = None
    """Where the stage ends, in tokens since the beginning of the run, rounded up to a whole sequence. Null for the last
    stage, and only there."""


class DataConfig(Section):
    """The text stream of a run. The keys of class *result* decide which token comes when."""

    key_class = RESULT

    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False, min_length=1)]
    """The sources, mixed by `mixture` or `stages`. Their order decides the order of the stream."""

    mixture: dict[str, PositiveFloat] | None = None
    """The share of the tokens of each source, by name, in any unit: `{web: 0.7, code: 0.3}`. After every sequence, each
    source is within one sequence of its share. If neither this nor `stages` is given, all sources are read as
    one: each document once in an epoch, in an order that does not keep the shares even within the epoch."""

    stages: Annotated[tuple[StageConfig, ...] | None, Field(strict=False)] = None
    """Mixtures one after the other, instead of `mixture`; for example a last stage with more of the best sources while
    the learning rate decays. Each begins at exactly the sequence where the previous one ends."""

    past_max_epochs: Literal["error", "end_source"] = "error"
    """What happens if a source is read more than its `max_epochs`: `error` refuses a run whose `train.total_tokens`
    would need that, as estimated before the start, and does not change the stream; `end_source` ends the source after
    that many epochs and gives its share to the others, in proportion. Without a mixture, all sources end together,
    after the largest `max_epochs`."""

    lanes: int = Field(default=128, ge=1)
    """Parallel readers of the text, each with its own read units; sequences are dealt from them in turn. In a mixture,
    each source has so many, or one for each read unit if it has fewer. The number of lanes fixes the order of the text
    for any number of processes and workers, so it cannot change within a run. At most the number of read units of all
    sources; with fewer lanes than processes times workers, some workers stay idle."""

    workers: Annotated[int, EXECUTION] = Field(default=0, ge=0, le=1024)
    """Reading processes per training process. 0 reads in the training process itself, which then tokenizes between
    two steps. Each worker uses one core. Changes the speed, never the stream."""

    seed: int = Field(default=0, ge=0)
    """Seed of the order in which units are read, which is different in every epoch. Does not depend on the rank."""

    retry_minutes: Annotated[float, EXECUTION] = Field(default=30, ge=0)
    """How long a source on a server may be unavailable. Requests that fail are repeated, with growing waits, until one
    of them succeeds; after so many minutes without any progress, the run saves a checkpoint and ends with exit code
    69, which `slurm/pretrain.sbatch` requeues. No effect on files of this machine."""

    validation_fraction: float = Field(default=0.02, ge=0, lt=1)
    """Share of the documents, chosen by a hash of their text, that are never trained on and form the validation
    split: the same documents on every machine and in any order. 0 means no validation split."""

    max_bad_rows: Annotated[int, EXECUTION] = Field(default=0, ge=0)
    """The number of rows that may be skipped because they cannot be used: text that is null, not a string or not valid
    UTF-8, broken JSON, rows of a damaged parquet page. Each is logged, and counted in the first epoch of its source.
    With one more, the run saves and ends with an error that names file and row; it can be resumed with a higher
    number."""

    max_document_mib: Annotated[int, EXECUTION] = Field(default=128, ge=1, le=2048)
    """The largest row, in MiB, that is read; a larger one counts as a bad row. Bounds the memory that a broken or
    malicious file can take."""

    max_zstd_window_mib: Annotated[int, EXECUTION] = Field(default=128, ge=1, le=2048)
    """The largest window, in MiB, of a zstd file; a file that needs a larger one is refused. Every open file takes this
    much memory, and there is one for each lane. 128 is what `zstd --long` writes and what `zstd -d` reads without
    being asked; files written with `zstd --long=31` need 2048."""

    packing: Literal["concatenate", "best_fit"] = "concatenate"
    """How documents become training sequences. `concatenate` joins them without gaps and cuts wherever a sequence is
    full: nothing is padded, and most sequences begin and end within a document. `best_fit` puts whole documents into
    each sequence and cuts only those that are longer than a sequence; the rest of a sequence is padding, about 0.3 to
    3 % of all positions with web text in sequences of 1,024 tokens or more, printed at the end of every epoch. Every
    token is a target exactly once an epoch either way. Padding counts as tokens of the run: in `train.total_tokens`,
    `train.global_batch_tokens`, the schedule, and the shares of a mixture. Each lane reads 16 sequences ahead, also
    when a run is resumed. The validation split is always concatenated. See Ding et al., "Fewer Truncations Improve
    Language Modeling" (2024)."""

    document_mask: bool = False
    """Whether a token attends to its own document only, instead of everything before it in the sequence. Needs
    less time and memory than attention over the whole sequence, since the attention between documents is not computed;
    see `train.document_attention`."""

    reset_positions: bool = False
    """Whether rotary positions start at 0 in each document, instead of once per sequence."""

    lock: Annotated[str | None, EXECUTION] = Field(default=None, min_length=1)
    """The lock file of the remote sources, which `aurora data resolve CONFIG` writes. null: `CONFIG.lock.json` beside
    the config if it exists (`run.lock.json` for `run.yaml`), else that of the run folder; if there is none, the first
    start resolves the sources and saves the lock in the run folder."""

    mirror: Annotated[str | None, EXECUTION] = Field(default=None, min_length=1)
    """A folder that `aurora data fetch CONFIG --to FOLDER` has filled, from which remote sources are read: for compute
    nodes without internet. Never changes the stream."""

    cache_dir: Annotated[str | None, EXECUTION] = Field(default=None, min_length=1)
    """A folder on a local disk where the processes of a node keep the remote files that they read, each downloaded
    once. Null: no cache, files are streamed. Never changes the stream."""

    cache_gib: Annotated[float, EXECUTION] = Field(default=100.0, gt=0)
    """The size of `data.cache_dir` in GiB, beyond which the files that were not read for the longest time are
    deleted."""

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each source, given or derived from its path; unique."""
        taken = {source.name for source in self.sources}
        names: list[str] = []
        for source in self.sources:
            name = base = source.name or _name_of(source.path)
            number = 2
            while source.name is None and name in taken:
                name, number = f"{base}-{number}", number + 1
            taken.add(name)
            names.append(name)
        return tuple(names)

    @property
    def epoch_limits(self) -> tuple[int | None, ...]:
        """The epochs after which each source ends; None if it never does."""
        ends = self.past_max_epochs == "end_source"
        return tuple(source.max_epochs if ends else None for source in self.sources)

    def ineffective(self) -> Mapping[str, str]:
        """The fields that have no effect in this combination, each with the reason."""
        without = dict(self._without_remote_sources())
        if self.past_max_epochs == "end_source" and all(source.max_epochs is None for source in self.sources):
            without["past_max_epochs"] = "no source has a max_epochs"
        return without

    def _without_remote_sources(self) -> Mapping[str, str]:
        """The keys of remote sources, if there is none, and those of the cache, if nothing is read through it."""
        keys = ("lock", "mirror", "cache_dir", "cache_gib")
        if not any(is_remote(source.path) for source in self.sources):
            return dict.fromkeys(keys, "all sources are local")
        if self.mirror is not None:
            return dict.fromkeys(keys[2:], "the sources are read from data.mirror")
        return {} if self.cache_dir is not None else {"cache_gib": "data.cache_dir is not set"}

    def implied(self) -> Collection[str]:
        """The options of mixtures, where they are not used, and today's only packing before there was another."""
        defaults = {"mixture": None, "stages": None, "past_max_epochs": "error", "packing": "concatenate"}
        return {key for key, value in defaults.items() if getattr(self, key) == value}

    @model_validator(mode="before")
    @classmethod
    def _drop_weight_of_one_source(cls, data: Any) -> Any:
        """The config in the folder of an older run says `weight: 1.0`, and may be used for another one."""
        match data:
            case {"sources": [{"weight": 1 | 1.0, **source}], **others}:
                return {**others, "sources": [source]}
        return data

    @model_validator(mode="after")
    def _check_mixtures(self) -> Self:
        problems = [*self._path_problems(), *self._name_problems(), *self._mixture_problems(), *self._stage_problems()]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _path_problems(self) -> Iterator[str]:
        for index, source in enumerate(self.sources):
            if problem := path_problem(source.path):
                yield f"sources.{index}.path: {problem}"

    def _name_problems(self) -> Iterator[str]:
        given = [source.name for source in self.sources]
        for index, name in enumerate(given):
            if name is not None and name in given[:index]:
                yield f"sources.{index}.name: expected a name of its own, got {name}, as for source {given.index(name)}"

    def _mixture_problems(self) -> Iterator[str]:
        if self.mixture is None:
            return
        if self.stages is not None:
            yield "mixture: expected either mixture or stages, got both; move it into the stages"
        yield from self._unknown_names("mixture", self.mixture)
        for name in self.names:
            if name not in self.mixture:
                yield f"mixture.{name}: required, but missing: every source needs a share, or leave the source out"

    def _stage_problems(self) -> Iterator[str]:
        if self.stages is None:
            return
        if not self.stages:
            yield "stages: expected at least one stage"
            return
        previous = 0
        for index, stage in enumerate(self.stages):
            yield from self._unknown_names(f"stages.{index}.mixture", stage.mixture)
            if not any(stage.mixture.values()):
                yield f"stages.{index}.mixture: expected at least one source with a share above 0"
            until, last = stage.until_tokens, index == len(self.stages) - 1
            if last != (until is None):
                what = "null, since the last stage ends with the run" if last else "a number of tokens"
                yield f"stages.{index}.until_tokens: expected {what}, got {until}"
            elif until is not None and until <= previous:
                yield (
                    f"stages.{index}.until_tokens: expected more than the {previous:,} of the stage before it, "
                    f"got {until:,}"
                )
            previous = until or previous
        for name in self.names:
            if not any(stage.mixture.get(name) for stage in self.stages):
                yield f"stages: the source {name} has no share in any stage: give it one, or leave the source out"

    def _unknown_names(self, key: str, mixture: Mapping[str, float]) -> Iterator[str]:
        for name, share in mixture.items():
            if name not in self.names:
                yield f"{key}.{name}: no source has this name{did_you_mean(name, self.names)}"
            elif 0 < share < _LEAST_SHARE * max(mixture.values()):
                yield f"{key}.{name}: {share} is so small a share that the source is never read: leave it out"


def _name_of(path: str) -> str:
    """The last part of a path that is not a pattern, or the name of a data set on the Hub, as a name."""
    scheme, _, location = path.rpartition("://")
    parts = [part for part in location.split("/") if part and not set(part) & set("*?[")]
    if scheme == "hf":  # datasets/ORG/NAME@REVISION/...
        parts = [part.partition("@")[0] for part in parts[:3]]
    name = re.sub(r"(?i)\.(parquet|jsonl?|ndjson)(\.(gz|zstd?))?$", "", parts[-1] if parts else "")
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-_") or "source"
