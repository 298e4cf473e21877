"""Examples of items that exactly one of two models gets right, with their texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.compare_schema import Comparison, Flip, TaskComparison
from eval.errors import EvalError
from eval.item_texts import ItemView, show_items
from eval.results import read_result
from eval.schema import EvalResult, ItemOutcome

Pair = tuple[ItemOutcome, ItemOutcome]


def flipped_items(comparison: Comparison, most: int, **options: Any) -> list[Flip]:
    """Return up to `most` items that the model wins and `most` that it loses, for each row of a comparison.

    They are spread evenly over all flipped items, so no kind of item is preferred.

    Args:
        comparison: of `eval.compare.compare`; its files are read again.
        most: number of items in each direction.
        options: `cache`, `package` and `progress` of `eval.item_texts.show_items`.

    Raises:
        EvalError: the items are not available, or are not those of the results.
    """
    results = {model["label"]: read_result(Path(model["file"])) for model in comparison["models"]}
    chosen = [
        (row, _spread(_flips(row, results, won), most), won)
        for row in comparison["comparisons"]
        for won in (True, False)
    ]
    wanted: dict[str, set[int]] = {}
    for _, pairs, _ in chosen:
        for task, (item, _) in pairs:
            wanted.setdefault(task, set()).add(item["doc_id"])
    if not wanted:
        return []
    source = results[comparison["models"][0]["label"]]["items_source"]["kind"]
    shown = show_items({task: sorted(places) for task, places in wanted.items()}, items=source, **options)
    return [_flip(row, task, pair, won, shown[task]) for row, pairs, won in chosen for task, pair in pairs]


def _flips(row: TaskComparison, results: dict[str, EvalResult], won: bool) -> list[tuple[str, Pair]]:
    """The items that flipped in one direction and their tasks, by ascending doc_id."""
    metric, change = row["metric"], 1 if won else -1
    found = []
    for task in row.get("tasks", [row["task"]]):
        one, two = (
            {item["doc_id"]: item for item in results[label]["tasks"][task]["items"]}
            for label in (row["baseline"], row["model"])
        )
        places = (place for place in sorted(one) if two[place][metric] - one[place][metric] == change)
        found += [(task, (one[place], two[place])) for place in places]
    return found


def _spread(pairs: Sequence[tuple[str, Pair]], most: int) -> list[tuple[str, Pair]]:
    count = min(most, len(pairs))
    return [pairs[place * len(pairs) // count] for place in range(count)]


def _flip(row: TaskComparison, task: str, pair: Pair, won: bool, shown: dict[int, ItemView]) -> Flip:
    item, other = pair
    view = shown.get(item["doc_id"])
    if view is None or view.doc_hash != item["doc_hash"]:
        raise EvalError(
            f"{task}: the item {item['doc_id']} of the results is not the one at hand; --examples needs those"
            " that were evaluated"
        )
    figures = []
    for outcome in (item, other):
        known = outcome.get("log_likelihoods", [])
        figures.append(known if len(known) == len(view.choices) else [None] * len(view.choices))
    return {
        "task": task,
        "model": row["model"],
        "won": won,
        "doc_id": item["doc_id"],
        "prompt": view.prompt,
        "choices": [
            {
                "text": text,
                "correct": index in view.correct,
                "baseline_log_likelihood": figures[0][index],
                "log_likelihood": figures[1][index],
            }
            for index, text in enumerate(view.choices)
        ],
    }
