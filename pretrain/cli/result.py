"""``aurora result``: show a result of an evaluation again, mark its items, or convert it."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Collection, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pretrain.cli.arguments import Marks, add_marks

if TYPE_CHECKING:
    from eval.schema import EvalResult
    from pretrain.cli.arguments import Verbs


def add(verbs: Verbs) -> None:
    """Declare the verb."""
    parser = verbs.add_parser(
        "result",
        help="show, mark or convert a result of an evaluation",
        description="Show a result of `aurora eval`. With --overlap or --subset, also compute scores without the items "
        "that occur in the training text, or on a subset, and store them in the result; nothing is scored again. With "
        "--format lm-eval, write it as the files of the `lm_eval` command.",
    )
    parser.add_argument(
        "result", metavar="RESULT", nargs="?", type=Path, help="a result file, or the folder that --out of eval named"
    )
    add_marks(parser)
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where to write the marked result or the converted files (default: marks go into RESULT itself)",
    )
    parser.add_argument(
        "--schema",
        choices=("result", "comparison"),
        help="print the JSON Schema of result files, or of `aurora compare --format json`, and nothing else",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show, mark and convert the result, or print a schema."""
    # Imported here: `aurora --help` loads neither torch nor pydantic.
    from eval.errors import EvalError
    from eval.result_table import format_table
    from eval.results import RESULT_FILE, read_result, write_result_file

    if options.schema:
        from eval.json_schema import comparison_schema, result_schema

        schema = result_schema() if options.schema == "result" else comparison_schema()
        print(json.dumps(schema, indent=1))
        return 0
    if options.result is None:
        raise EvalError("no result given; expected a result file or the folder that --out of `aurora eval` named")
    if options.format == "lm-eval" and options.out is None:
        raise EvalError("--format lm-eval needs --out, the folder to write the files to")
    result = read_result(options.result)
    source = options.result / RESULT_FILE if options.result.is_dir() else options.result
    target = options.out / RESULT_FILE if options.out else source
    marks = Marks.of(options)
    if marks:
        _check_target(target, source, result, marks_asked(marks))
    mark(result, marks)
    print(format_table(result))
    if options.format == "lm-eval":
        convert(result, options.out)
    if marks:
        print(f"result in {write_result_file(result, target)}")
    return 0


def _check_target(target: Path, source: Path, result: EvalResult, marks: Collection[str]) -> None:
    """Check that writing a marked result loses no other one.

    Raises:
        EvalError: the file holds another result, or one with more marks.
    """
    from eval.errors import EvalError
    from eval.results import marks_of, read_result

    if not target.exists() or target.resolve() == source.resolve():
        return
    earlier = read_result(target)
    kept = {*marks, *marks_of(result)}
    if unmarked(earlier) != unmarked(result):
        raise EvalError(f"{target} holds another result, which would be lost; choose another --out")
    lost = [mark for mark in marks_of(earlier) if mark not in kept]
    if lost:
        raise EvalError(f"{target} also has {', '.join(lost)}, which would be lost; choose another --out")


def unmarked(result: EvalResult) -> dict[str, Any]:
    """Return a copy of a result without what `mark` adds."""
    copied: dict[str, Any] = copy.deepcopy(dict(result))
    for task in copied["tasks"].values():
        task.pop("overlap", None)
        task.pop("subsets", None)
        for item in task["items"]:
            item.pop("overlap", None)
    return copied


def marks_asked(marks: Marks) -> list[str]:
    """Return what `eval.results.marks_of` finds in a result that has been marked."""
    from eval.results import OVERLAP, subset_mark
    from eval.subsets import subset_name

    names = [subset_name(request) for request in marks.subsets]
    return [*([OVERLAP] if marks.overlap else []), *map(subset_mark, names)]


def mark_problems(marks: Marks) -> list[str]:
    """Read the report and the lists, to refuse bad ones before anything is scored; return what is wrong with them."""
    from eval.errors import EvalError
    from eval.overlap_report import read_overlap_report
    from eval.subsets import read_subset, subset_name

    problems: list[str] = []
    reading: list[Callable[[], object]] = [partial(read_subset, word) for word in dict.fromkeys(marks.subsets)]
    if marks.overlap:
        reading.insert(0, partial(read_overlap_report, marks.overlap))
    for read in reading:
        try:
            read()
        except EvalError as error:
            problems += str(error).splitlines()
    names = [subset_name(word) for word in marks.subsets]
    twice = dict.fromkeys(name for name in names if names.count(name) > 1)
    return problems + [f"several subsets are called {name!r}; give each a name of its own" for name in twice]


def check_marks_of(tasks: Iterable[str], items: str, marks: Marks) -> None:
    """Check before anything is scored that marks suit the tasks and their items.

    Raises:
        EvalError: they are of other tasks or items.
    """
    # A result without outcomes.
    empty = {"tasks": {name: {"items": []} for name in tasks}, "items_source": {"kind": items}}
    _mark(cast("EvalResult", empty), marks)


def mark(result: EvalResult, marks: Marks) -> None:
    """Carry out --overlap and --subset."""
    for note in _mark(result, marks):
        print(f"note: {note}")


def _mark(result: EvalResult, marks: Marks) -> list[str]:
    """Mark a result; return a line for each task that the report is not about."""
    if not marks:
        return []
    from eval.controls import items_of
    from eval.overlap_report import read_overlap_report
    from eval.parts import add_subset, mark_overlap
    from eval.subsets import read_subset

    report = read_overlap_report(marks.overlap) if marks.overlap else None
    subsets = [read_subset(request) for request in marks.subsets]
    # Loads lm-eval, which takes seconds, and so may the Hub.
    from eval.identities import item_identities

    tasks = list(dict.fromkeys(map(items_of, result["tasks"])))
    identities = item_identities(tasks, items=result["items_source"]["kind"]) if tasks else {}
    notes = mark_overlap(result, report, identities) if report else []
    for subset in subsets:
        add_subset(result, subset, identities)
    return notes


def convert(result: EvalResult, out: Path) -> None:
    """Carry out --format lm-eval."""
    from eval.lm_eval_files import write_lm_eval_files

    for path in write_lm_eval_files(result, out):
        print(f"wrote {path}")
