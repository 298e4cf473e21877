"""Controls: tasks that nobody should do well on, made from the items of another task.

`hellaswag_no_context` is HellaSwag without its context: the model sees four endings and not what they continue. What it
scores above chance comes from how the endings were made, not from understanding (Chizhov et al., "What the HellaSwag?
On the Validity of Common-Sense Reasoning Benchmarks", 2025, arXiv 2504.07825). Its items are those of HellaSwag, with
the same doc_id and doc_hash, so the two can be compared item by item.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Control:
    """A task that differs from another one in its prompt alone."""

    of: str
    """The task whose items it has."""
    definition: str
    """Path of that task's definition, relative to lm-eval's task folder."""
    changes: dict[str, Any]
    """Keys of lm-eval's definition that it replaces."""


CONTROLS = {
    "hellaswag_no_context": Control("hellaswag", "hellaswag/hellaswag.yaml", {"doc_to_text": "", "tag": None}),
}
"""By name."""


def items_of(task: str) -> str:
    """Return the name of the task whose items `task` has: its own, unless it is a control."""
    return CONTROLS[task].of if task in CONTROLS else task


def changes_of(task: str) -> dict[str, Any]:
    """Return the keys of lm-eval's definition that a control replaces; none for other tasks."""
    return dict(CONTROLS[task].changes) if task in CONTROLS else {}


def write_controls(tasks: Sequence[str], folder: Path) -> None:
    """Write lm-eval's definitions of the controls among `tasks`, with the items that lm-eval itself uses."""
    import lm_eval

    definitions = Path(lm_eval.__file__).parent / "tasks"
    for task, control in ((task, CONTROLS[task]) for task in tasks if task in CONTROLS):
        definition = {"include": str(definitions / control.definition), "task": task, **control.changes}
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")
