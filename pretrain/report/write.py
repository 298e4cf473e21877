"""Write the report: one HTML page that needs nothing but itself, and its numbers as JSON beside it.

load() -> Sweep -> tables() -> ReportResult -> report.json
                -> figures  -> render()     -> report.html
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from eval.errors import EvalError
from pretrain.report.page import render
from pretrain.report.schema import ReportResult
from pretrain.report.sweep import load
from pretrain.report.tables import tables

PAGE_FILE = "report.html"


def write_report(path: Path, out: Path | None = None) -> Path:
    """Write the page of a run or sweep folder, and the same name with .json beside it; earlier ones are replaced.

    Args:
        path: the folder.
        out: the page; None for report.html in the folder.

    Returns:
        The page's path.

    Raises:
        EvalError: neither a run nor a sweep, a malformed file in it (a line per problem), or no place to write to.
    """
    sweep = load(path)
    found = tables(sweep)
    page = render(sweep, found)
    target = out or path / PAGE_FILE
    if target.suffix != ".html":
        raise EvalError(f"{target}: expected a file name that ends in .html")
    _replace(target.with_suffix(".json"), json.dumps(found, indent=1, allow_nan=False) + "\n")
    _replace(target, page)
    return target


def results(path: Path) -> ReportResult:
    """The numbers of a run or sweep folder, as report.json has them; writes nothing.

    Raises:
        EvalError: as `write_report`.
    """
    return tables(load(path))


def _replace(target: Path, text: str) -> None:
    """Write a file in the place of an earlier one; it is complete or absent."""
    partial = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_text(text, encoding="utf-8")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise EvalError(f"cannot write the report to {target}: {error}") from error
