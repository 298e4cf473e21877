"""The items of tasks as text: for the search for them in training data, and for readers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.utils import handle_non_serializable, hash_string

from eval.tasks import loaded_tasks


@dataclass(frozen=True)
class ItemView:
    """An item for readers."""

    prompt: str
    """What comes before the choices or, after an ellipsis, behind them."""
    choices: list[str]
    """One for a task that has a single answer."""
    correct: frozenset[int]
    """Index of the correct choice; a few tasks have several."""
    doc_hash: str
    """As in a result."""


def item_texts(tasks: Sequence[str], **options: Any) -> dict[str, list[str]]:
    """Return the text of every item of `tasks`, by task: its prompt, continued by the correct choice.

    The position of a text is the `doc_id` of its item in a result.

    Args:
        tasks: names of tasks, or of groups, which stand for their tasks.
        options: as for `eval.tasks.loaded_tasks`.

    Raises:
        EvalError: a task is unknown, or its items are not available.
    """
    with loaded_tasks(tasks, **options) as loaded:
        return {name: [item_text(task, doc) for doc in task.eval_docs] for name, task in loaded.tasks.items()}


def show_items(wanted: Mapping[str, Sequence[int]], **options: Any) -> dict[str, dict[int, ItemView]]:
    """Return the prompt and choices of the items with the `wanted` doc_ids, by task; options are as above.

    Raises:
        EvalError: a task is unknown, or its items are not available.
    """
    with loaded_tasks(list(wanted), **options) as loaded:
        return {
            name: {
                place: _item_view(task, task.eval_docs[place]) for place in wanted[name] if place < len(task.eval_docs)
            }
            for name, task in loaded.tasks.items()
        }


def item_text(task: Any, doc: Any) -> str:
    """Return the prompt of an item with its correct choice, as `ConfigurableTask.construct_requests` joins them."""
    delimiter = task.config.target_delimiter
    if task.OUTPUT_TYPE == "loglikelihood":
        return f"{task.doc_to_text(doc)}{task.doc_to_target(doc)}"
    choices = task.doc_to_choice(doc)
    if task.multiple_input:  # the choices are prompts with the same continuation, as in WinoGrande
        return f"{choices[task.doc_to_text(doc)]}{delimiter}{task.doc_to_target(doc)}"
    correct = task.doc_to_target(doc)
    return f"{task.doc_to_text(doc)}{delimiter}{choices[correct] if isinstance(correct, int) else correct}"


def _item_view(task: Any, doc: Any) -> ItemView:
    if task.OUTPUT_TYPE == "loglikelihood":
        return ItemView(task.doc_to_text(doc), [str(task.doc_to_target(doc))], frozenset([0]), doc_hash(doc))
    choices = list(task.doc_to_choice(doc))
    correct = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    prompt = f"... {task.doc_to_target(doc)}" if task.multiple_input else task.doc_to_text(doc)
    answers = correct if isinstance(correct, list) else [correct]
    right = frozenset(answer if isinstance(answer, int) else choices.index(answer) for answer in answers)
    return ItemView(prompt, choices, right, doc_hash(doc))


def doc_hash(doc: Mapping[str, Any]) -> str:
    """Return the doc_hash of an item, as lm-eval computes it for a sample."""
    return str(hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)))
