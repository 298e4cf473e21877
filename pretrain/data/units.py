"""Read units: what a lane reads before it moves on to the next place in the data."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file of data, in the version that the catalog recorded."""

    path: str
    """Where it is: a path spelt as in the config, or a URL without secrets; a revision of the Hub is a commit."""
    bytes: int | None = None
    """Its size; None: not known yet, and not checked."""
    etag: str | None = None
    """What the server calls this version of the contents, without quotation marks; None: not known, not checked."""
    sha256: str | None = None
    """The hash of the contents as the Hub states it; None: not stated. Reading does not check it; a mirror does."""


@dataclass(frozen=True, slots=True)
class TextRecipe:
    """Which rows are read, how a row becomes text, and what a reader refuses so that its memory stays bounded."""

    text_field: str = "text"
    """The field that holds the text, or a template of fields; see `pretrain.config.text_field`."""
    where: str | None = None
    """The condition that a row must meet; see `pretrain.config.row_filter`. None: every row is read."""
    max_document_bytes: int = 128 << 20
    """A larger row counts as a bad one."""
    max_zstd_window_bytes: int = 128 << 20
    """A file compressed with a larger window is refused."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Every `parts`-th row, beginning with row `part`, of a file or of one of its row groups."""

    file: DataFile
    recipe: TextRecipe
    row_group: int | None
    """Index of the row group; None for a file without row groups (JSON)."""
    rows: int | None
    """Rows of the row group or file; None if they have not been counted."""
    part: int
    parts: int
