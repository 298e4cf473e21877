"""The evaluation results in run folders, for the report.

A run keeps its results below its folder ``eval``: RUN/eval/NAME/results.json, or RUN/eval/results.json. Results of the
same name are compared between runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from eval.compare import DEFAULT_MARGIN, compare, main_metric
from eval.compare_schema import SCOPE
from eval.compare_tables import verdict
from eval.errors import EvalError
from eval.results import RESULT_FILE, read_result
from eval.schema import EvalResult
from pretrain.report.schema import DifferenceRow, Evaluations, ScoreRow


def evaluations(runs: Mapping[str, Path]) -> Evaluations | None:
    """Return scores and paired differences of runs, given their folders by name; None without results.

    What cannot be read or compared becomes a note: the report is of the runs, too.
    """
    scores: list[ScoreRow] = []
    notes: list[str] = []
    by_file: dict[str, dict[str, Path]] = {}
    for run, folder in runs.items():
        files = [folder / "eval" / RESULT_FILE, *sorted((folder / "eval").glob(f"*/{RESULT_FILE}"))]
        for file in filter(Path.is_file, files):
            name = str(file.relative_to(folder))
            try:
                scores += _scores(run, name, read_result(file))
            except EvalError as error:
                notes += [f"{run}: {line}" for line in str(error).splitlines()]
            else:
                by_file.setdefault(name, {})[run] = file
    if not scores and not notes:
        return None
    differences: list[DifferenceRow] = []
    for name, found in by_file.items():
        if len(found) > 1:
            try:
                differences += _differences(found)
            except EvalError as error:
                notes += [f"{name}: not compared: {line}" for line in str(error).splitlines()]
    return {"scores": scores, "differences": differences, "notes": notes, "margin": DEFAULT_MARGIN, "scope": SCOPE}


def _scores(run: str, file: str, result: EvalResult) -> list[ScoreRow]:
    rows: list[ScoreRow] = []
    for name, task in result["tasks"].items():
        metric = main_metric(task)
        rows.append(
            {
                "run": run,
                "file": file,
                "task": name,
                "metric": metric,
                "score": task[metric],
                "stderr": task["acc_stderr"] if metric == "acc" else task.get("acc_norm_stderr"),
                "num_items": task["num_items"],
                "num_items_in_split": task["num_items_in_split"],
            }
        )
    return rows


def _differences(found: Mapping[str, Path]) -> list[DifferenceRow]:
    """Compare results of the same name with that of the first run."""
    comparison = compare(list(found.values()), labels=list(found))
    return [
        {
            "run": row["model"],
            "baseline": row["baseline"],
            "task": row["task"],
            "metric": row["metric"],
            "num_items": row["num_items"],
            "difference": row["difference"],
            "low": row["interval"][0],
            "high": row["interval"][1],
            "won": row["won"],
            "lost": row["lost"],
            "outcome": row["outcome"],
            "verdict": verdict(row),
        }
        for row in comparison["comparisons"]
    ]
