"""What identifies the items of a task, for lists of items that come from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from eval.item_texts import doc_hash, item_text
from eval.overlap_report import text_hash
from eval.tasks import loaded_tasks

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


def item_identities(tasks: Sequence[str], **options: Any) -> dict[str, list[ItemIdentity]]:
    """Return what identifies every item of `tasks`, by task.

    Args:
        tasks: names of tasks.
        options: as for `eval.tasks.loaded_tasks`.

    Raises:
        EvalError: a task is unknown, or its items are not available.
    """
    with loaded_tasks(tasks, **options) as loaded:
        return {
            name: [
                ItemIdentity(
                    doc_hash(doc),
                    text_hash(item_text(task, doc)),
                    tuple(str(doc[column]) for column in IDENTIFYING_COLUMNS.get(name, ())),
                )
                for doc in task.eval_docs
            ]
            for name, task in loaded.tasks.items()
        }
