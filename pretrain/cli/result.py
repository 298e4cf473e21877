"""``aurora result``: show a result of an evaluation again, mark its items, or convert it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.cli.arguments import add_marks

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
    from eval.results import read_result, write_result

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
    mark(result, options)
    print(format_table(result))
    if options.format == "lm-eval":
        convert(result, options.out)
    if options.overlap or options.subset:
        file = options.result if options.result.is_dir() else options.result.parent
        print(f"result in {write_result(result, options.out or file)}")
    return 0


def check_marks(options: argparse.Namespace) -> None:
    """Read the report and the lists that --overlap and --subset name, to refuse bad ones before anything is scored.

    Raises:
        EvalError: one of them cannot be read.
    """
    if options.overlap:
        from eval.overlap_report import read_overlap_report

        read_overlap_report(options.overlap)
    if options.subset:
        from eval.subsets import read_subset

        for request in options.subset:
            read_subset(request)


def mark(result: EvalResult, options: argparse.Namespace) -> None:
    """Carry out --overlap and --subset."""
    if not (options.overlap or options.subset):
        return
    from eval.controls import items_of
    from eval.identities import item_identities
    from eval.overlap_report import read_overlap_report
    from eval.parts import add_subset, mark_overlap
    from eval.subsets import read_subset

    report = read_overlap_report(options.overlap) if options.overlap else None
    subsets = [read_subset(request) for request in options.subset or []]
    tasks = list(dict.fromkeys(map(items_of, result["tasks"])))
    identities = item_identities(tasks, items=result["items_source"]["kind"]) if tasks else {}
    if report:
        for note in mark_overlap(result, report, identities):
            print(f"note: {note}")
    for subset in subsets:
        add_subset(result, subset, identities)


def convert(result: EvalResult, out: Path) -> None:
    """Carry out --format lm-eval."""
    from eval.lm_eval_files import write_lm_eval_files

    for path in write_lm_eval_files(result, out):
        print(f"wrote {path}")
