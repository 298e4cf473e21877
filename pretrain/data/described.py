"""What is known of the files of a source before they are read."""

import re
from dataclasses import dataclass
from hashlib import sha256

from pretrain.data.prepared.layout import Origin, TokenizerNeeds
from pretrain.data.units import Compact, DataFile, TextRecipe, Unit


@dataclass(frozen=True, slots=True)
class CatalogFile(Compact):
    """One file."""

    path: str
    """Spelt as in the config; of a remote source the whole URL, with the revision."""
    bytes: int
    row_groups: tuple[int, ...] | None
    """Rows of each row group of a parquet file, documents of each unit of a prepared shard, tokens of each unit of a
    `.bin` shard; None for JSON lines, which would have to be read."""
    digest: str
    """What the contents are recognised by. Of a local file: the sha256 of the first MiB, the last MiB and the size in
    decimal digits, in this order. Of a remote file: what its store states, see `remote_digest`."""

    def units(self, file: DataFile, recipe: TextRecipe, split_units: int) -> list[Unit]:
        """Return the read units of the file: its row groups, or the file itself, each divided by `split_units`.

        Args:
            file: where to read it.
            recipe: how a row becomes text.
            split_units: parts of each.

        """
        if self.row_groups is None:
            return [Unit(file, recipe, None, None, part, split_units) for part in range(split_units)]
        return [
            Unit(file, recipe, group, rows, part, split_units)
            for group, rows in enumerate(self.row_groups)
            for part in range(split_units)
        ]


def remote_digest(file: DataFile) -> str | None:
    """Return ``sha256:...`` or ``etag:...``, or both with a space between them if they differ; None without either.

    `remote_file` reads it.
    """
    parts = [f"sha256:{file.sha256}"] if file.sha256 else []
    parts += [f"etag:{file.etag}"] if file.etag and file.etag != file.sha256 else []
    return " ".join(parts) or None


def remote_file(file: CatalogFile) -> DataFile:
    """Return a remote file of the lock, to be opened in that version."""
    stated = re.fullmatch(r"(?:sha256:([0-9a-f]+))?(?: ?etag:(.*))?", file.digest, re.DOTALL)
    sha256, etag = stated.groups() if stated else (None, None)
    return DataFile(file.path, file.bytes, etag or sha256, sha256)


@dataclass(frozen=True, slots=True)
class CatalogSource:
    """One source of the config."""

    path: str
    """As in the config."""
    files: tuple[CatalogFile, ...]
    """In the order in which they are numbered for reading: by name."""
    names: tuple[str, ...]
    """The values of a parquet column `source`, sorted; empty if there is none, or more than 64 values."""
    licences: tuple[str, ...]
    """The values of a parquet column `licence` or `license`, likewise, or what the store says; if there are none, the
    config's `licence`."""
    pinned: str | None = None
    """Of a remote source: its path with the revision that was found."""
    revision: str | None = None
    """The commit of a remote source, if its store has such a thing."""
    tokenizer: TokenizerNeeds | None = None
    """The tokenizer that the tokens of prepared data were made with; None: the source is text."""
    origin: Origin | None = None
    """What a prepared folder on this machine was made from."""

    @property
    def bytes(self) -> int:
        """The size of all files together."""
        return sum(file.bytes for file in self.files)

    @property
    def contents(self) -> str:
        """A digest of what the files of a remote source hold, in order, whatever they are called."""
        return sha256("\n".join(f"{file.bytes} {_contents(file)}" for file in self.files).encode()).hexdigest()


def _contents(file: CatalogFile) -> str:
    """The digest without the etag if there is a hash: the same file may have another etag elsewhere."""
    return file.digest.partition(" ")[0] if file.digest.startswith("sha256:") else file.digest
