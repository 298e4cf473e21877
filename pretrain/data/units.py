"""Read units: what a lane reads before it moves on to the next place in the data."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Unit:
    """Every `parts`-th row, beginning with row `part`, of a file or of one of its row groups."""

    path: str
    text_field: str
    row_group: int | None
    """Index of the row group; None for a file without row groups (JSON lines)."""
    rows: int | None
    """Rows of the row group or file; None if they have not been counted."""
    part: int
    parts: int
    file_bytes: int | None = None
    """Size of the file according to the catalog; None: not known, and not checked."""
