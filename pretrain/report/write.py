"""Write the report: one self-contained HTML page, and its numbers as JSON next to it.

load() -> Sweep -> tables() -> ReportResult -> report.json
                -> figures  -> render()     -> report.html
"""

from __future__ import annotations

import json
from pathlib import Path

from pretrain.files import replace_text
from pretrain.report.errors import ReportError
from pretrain.report.page import render
from pretrain.report.schema import ReportResult
from pretrain.report.sweep import load
from pretrain.report.tables import tables

PAGE_FILE = "report.html"


def write_report(path: Path, out: Path | None = None) -> Path:
    """Write the page of a run or sweep folder, and a JSON file of the same name next to it; earlier ones are replaced.

    Args:
        path: the folder.
        out: the page; None for report.html in the folder.

    Returns:
        The page's path.

    Raises:
        ReportError: neither a run nor a sweep, a malformed file in it (a line per problem), or no place to write to.
    """
    sweep = load(path)
    found = tables(sweep)
    page = render(sweep, found)
    target = out or path / PAGE_FILE
    if target.suffix != ".html":
        raise ReportError(f"{target}: expected a file name that ends in .html")
    _replace(target.with_suffix(".json"), json.dumps(found, indent=1, allow_nan=False) + "\n")
    _replace(target, page)
    return target


def results(path: Path) -> ReportResult:
    """The numbers of a run or sweep folder, as report.json has them; writes nothing.

    Raises:
        ReportError: as `write_report`.
    """
    return tables(load(path))


def _replace(target: Path, text: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_text(target, text)
    except OSError as error:
        raise ReportError(f"cannot write the report to {target}: {error}") from error
