"""What identifies an item, for lists of items that come from elsewhere. Loads neither lm-eval nor `datasets`."""

from __future__ import annotations

from typing import NamedTuple

IDENTIFYING_COLUMNS = {
    # An `ind` occurs in several splits; with the video or article it is unique.
    "hellaswag": ("ind", "source_id"),
    "arc_easy": ("id",),
    "arc_challenge": ("id",),
    "openbookqa": ("id",),
}
"""The columns that identify an item in its data set, by task."""


class ItemIdentity(NamedTuple):
    """One item of a split; its position is the doc_id."""

    doc_hash: str
    """As in a result."""
    text_hash: str
    """Of its prompt with the correct choice, as in a report of overlap."""
    columns: tuple[str, ...]
    """The values of the task's `IDENTIFYING_COLUMNS`, as text; empty if it has none."""
