"""What identifies each item of a task that is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eval.item_identity import IDENTIFYING_COLUMNS, ItemIdentity
from eval.item_texts import doc_hash, item_text
from eval.overlap_report import text_hash
from eval.tasks import loaded_tasks


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
