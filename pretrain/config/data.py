"""Config section `data`: which text is read, and in which order."""

import re
from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from pretrain.config.base import CONTENTS, EXECUTION, NOTE, RESULT, Section
from pretrain.config.fields import InputPath
from pretrain.config.tokenizer import TokenizerConfig

__all__ = ["DataConfig", "SourceConfig", "TokenizerConfig", "is_remote"]


def is_remote(path: str) -> bool:
    """Return whether the path of a source is a URL such as ``hf://...``, whose files a lock lists."""
    return re.match("[a-z][a-z0-9+.-]*://", path, re.IGNORECASE) is not None


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

    licence: Annotated[str | None, NOTE] = None
    """The licence of the text, for the manifest and the model card, if the text has no column `licence`."""


class DataConfig(Section):
    """The text stream of a run. The keys of class *result* decide which token comes when."""

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

    def ineffective(self) -> Mapping[str, str]:
        """Keys of remote sources without such a source, and a cache of what is read from a mirror."""
        keys = ("lock", "mirror", "cache_dir", "cache_gib")
        if not any(is_remote(source.path) for source in self.sources):
            return dict.fromkeys(keys, "all sources are local")
        if self.mirror is not None:
            return dict.fromkeys(keys[2:], "the sources are read from data.mirror")
        return {} if self.cache_dir is not None else {"cache_gib": "data.cache_dir is not set"}
