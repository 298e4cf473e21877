"""Write the report: a self-contained HTML page, with its numbers in a JSON file next to it.

load() -> Sweep -> tables() -> ReportResult -> report.json
                -> figures  -> render()     -> report.html
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pretrain.files import replace_text
from pretrain.report.errors import ReportError
from pretrain.report.page import render
from pretrain.report.schema import Evaluations, ReportResult
from pretrain.report.sweep import load, load_runs
from pretrain.report.tables import tables

PAGE_FILE = "report.html"


def write_report(
    path: Path | Sequence[Path],
    out: Path | None = None,
    evaluations: Callable[[Mapping[str, Path]], Evaluations | None] = lambda runs: None,
) -> Path:
    """Write the page for a run or sweep folder, and a JSON file of the same name; replace earlier ones.

    Args:
        path: the folder; or those of several runs, which are compared with the first one.
        out: the path of the page; None for report.html in the folder. Several runs need a path.
        evaluations: returns the evaluation results of runs, given their folders by name; None if there are none.

    Returns:
        The path of the page.

    Raises:
        ReportError: the folder is not a run or a sweep, contains a malformed file (one line per problem), or the page
            cannot be written.
    """
    paths = [path] if isinstance(path, Path) else list(path)
    if out is None and len(paths) > 1:
        raise ReportError(
            f"a report about {len(paths)} runs is in none of their folders; name the page: --out FILE.html"
        )
    sweep = load(paths[0]) if len(paths) == 1 else load_runs(paths)
    found = tables(sweep)
    evaluated = evaluations(sweep.run_folders)
    if evaluated is not None:
        found["evaluations"] = evaluated
    page = render(sweep, found)
    target = out or paths[0] / PAGE_FILE
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
