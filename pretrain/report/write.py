"""Write the report: a self-contained HTML page, with its numbers in a JSON file next to it.

load() -> Sweep -> tables() -> ReportResult -> report.json
                -> figures  -> render()     -> report.html
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from pretrain.files import replace_text
from pretrain.report.errors import ReportError
from pretrain.report.page import render
from pretrain.report.schema import Evaluations, ReportResult
from pretrain.report.sweep import load
from pretrain.report.tables import tables

PAGE_FILE = "report.html"


def write_report(
    path: Path,
    out: Path | None = None,
    evaluations: Callable[[Mapping[str, Path]], Evaluations | None] = lambda runs: None,
) -> Path:
    """Write the page for a run or sweep folder, and a JSON file of the same name; replace earlier ones.

    Args:
        path: the folder.
        out: the path of the page; None for report.html in the folder.
        evaluations: returns the evaluation results of runs, given their folders by name; None if there are none.

    Returns:
        The path of the page.

    Raises:
        ReportError: the folder is not a run or a sweep, contains a malformed file (one line per problem), or the page
            cannot be written.
    """
    sweep = load(path)
    found = tables(sweep)
    evaluated = evaluations({job.run.name: job.run.path for job in sweep.jobs if not job.is_waiting})
    if evaluated is not None:
        found["evaluations"] = evaluated
    page = render(sweep, found)
    target = out or path / PAGE_FILE
    if target.suffix != ".html":
        raise ReportError(f"{target}: expected a file name that ends in .html")
    _replace(target.with_suffix(".json"), json.dumps(found, indent=1, allow_nan=False) + "\n")
    _replace(target, page)
    return target


def results(path: Path) -> ReportResult:
    """Return the contents of report.json for a run or sweep folder, without writing it.

    Raises:
        ReportError: as for `write_report`.
    """
    return tables(load(path))


def _replace(target: Path, text: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_text(target, text)
    except OSError as error:
        raise ReportError(f"cannot write the report to {target}: {error}") from error
