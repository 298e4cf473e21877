"""The evaluation results in run folders, for the report.

A run keeps its results below its folder ``eval``: RUN/eval/NAME/results.json, or RUN/eval/results.json. Results of the
same name are compared between runs. Those of its checkpoints (RUN/eval/step-N/results.json or
RUN/eval/NAME/step-N/results.json) are series; of each, the newest step that all runs have is compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from eval.compare import DEFAULT_MARGIN, compare
from eval.compare_groups import joined
from eval.compare_schema import SCOPE
from eval.compare_tables import verdict
from eval.errors import EvalError
from eval.results import RESULT_FILE, read_result
from eval.schema import EvalResult, TaskResult
from eval.scores import bits_interval, group_of, interval_of, main_metric, scores, shots_of
from pretrain.report.schema import BitsRow, DifferenceRow, Evaluations, ScoreRow, SeriesRow

_STEP = re.compile(r"step-([0-9]+)")
_METRICS = ("acc", "acc_norm", "perplexity")


def evaluations(runs: Mapping[str, Path]) -> Evaluations | None:
    """Return scores and paired differences of runs, given their folders by name; None without results.

    What cannot be read or compared becomes a note: the report is of the runs, too.
    """
    found_scores: list[ScoreRow] = []
    rows: list[SeriesRow] = []
    bits: list[BitsRow] = []
    notes: list[str] = []
    by_file: dict[str, dict[str, Path]] = {}
    series: dict[str, dict[str, dict[int, Path]]] = {}
    for run, folder in runs.items():
        newest: dict[str, tuple[int, str, EvalResult]] = {}
        for file in _files(folder):
            name = str(file.relative_to(folder))
            try:
                result = read_result(file)
            except EvalError as error:
                notes += [f"{run}: {line}" for line in str(error).splitlines()]
                continue
            match = _STEP.fullmatch(file.parent.name)
            bits += _bits(run, name, int(match[1]) if match else None, result)
            if match:
                group, step = str(file.parent.parent.relative_to(folder / "eval")), int(match[1])
                rows += _points(run, group, step, result)
                series.setdefault(group, {}).setdefault(run, {})[step] = file
                newest[group] = max(newest.get(group, (-1, name, result)), (step, name, result), key=lambda x: x[0])
            else:
                found_scores += _scores(run, name, result)
                by_file.setdefault(name, {})[run] = file
        for _, name, result in newest.values():
            found_scores += _scores(run, name, result)
    if not found_scores and not bits and not notes:
        return None
    by_file |= _newest_common(series)
    differences: list[DifferenceRow] = []
    for name, found in by_file.items():
        if len(found) > 1:
            try:
                differences += _differences(found)
            except EvalError as error:
                notes += [f"{name}: not compared: {line}" for line in str(error).splitlines()]
    rows.sort(key=lambda row: (row["run"], row["series"], row["task"], row["step"]))
    return {
        "scores": found_scores,
        "series": rows,
        "bits_per_byte": bits,
        "differences": differences,
        "notes": notes,
        "margin": DEFAULT_MARGIN,
        "scope": SCOPE,
    }


def _files(run: Path) -> list[Path]:
    """The results in a run folder."""
    folder = run / "eval"
    deeper = [file for depth in ("*", "*/step-*") for file in sorted(folder.glob(f"{depth}/{RESULT_FILE}"))]
    return [file for file in [folder / RESULT_FILE, *deeper] if file.is_file()]


def _newest_common(series: Mapping[str, Mapping[str, Mapping[int, Path]]]) -> dict[str, dict[str, Path]]:
    """Of each series, the results at the newest step that all runs with the series have, by run."""
    found = {}
    for group, of_runs in series.items():
        common = set.intersection(*(set(steps) for steps in of_runs.values()))
        if common:
            name = f"{group} at step {max(common):,}"
            found[name] = {run: steps[max(common)] for run, steps in of_runs.items()}
    return found


def _points(run: str, series: str, step: int, result: EvalResult) -> list[SeriesRow]:
    """The scores of one checkpoint; a group of tasks is one, over the items of all of them."""
    provenance = result["model"].get("provenance")
    points: list[SeriesRow] = []
    for score in scores(result):
        task = joined(score.tasks)
        low, high = interval_of(task["items"], score.metric)
        points.append(
            {
                "run": run,
                "series": series,
                "step": step,
                "tokens": provenance["tokens"] if provenance else None,
                "task": score.name,
                "metric": score.metric,
                "score": task[score.metric],
                "low": low,
                "high": high,
                "num_items": score.num_items,
            }
        )
    return points


def _scores(run: str, file: str, result: EvalResult) -> list[ScoreRow]:
    """The scores of a result: of its groups of tasks, then of its tasks."""
    groups, owners = result.get("groups", {}), group_of(result)
    rows = [_score(run, file, result, name, cast(Mapping[str, Any], group)) for name, group in groups.items()]
    for name, task in result["tasks"].items():
        rows.append({**_score(run, file, result, name, cast(Mapping[str, Any], task)), "group": owners.get(name)})
    return rows


def _score(run: str, file: str, result: EvalResult, name: str, task: Mapping[str, Any]) -> ScoreRow:
    metric = main_metric(cast(TaskResult, task))
    return {
        "run": run,
        "file": file,
        "task": name,
        "metric": metric,
        "score": task[metric],
        "stderr": task.get(f"{metric}_stderr"),
        "num_items": task["num_items"],
        "num_items_in_split": task.get("num_items_in_split", task["num_items"]),
        "num_fewshot": cast(int, shots_of(result, name)),
        "suite": result.get("suite"),
        "group": None,
        "note": task.get("note", ""),
        "other": _other_figures(task, metric),
    }


def _other_figures(task: Mapping[str, Any], metric: str) -> dict[str, float]:
    """The figures of a task besides its score, and its scores on some of the items."""
    found = {name: value for name, value in task.items() if name != metric and name in _METRICS}
    if "overlap" in task:
        found[f"{metric}: without overlap"] = task["overlap"]["without"].get(metric)
    for name, subset in task.get("subsets", {}).items():
        found[f"{metric}: {name}"] = subset.get(metric)
    return {name: value for name, value in found.items() if value is not None}


def _bits(run: str, file: str, step: int | None, result: EvalResult) -> list[BitsRow]:
    rows: list[BitsRow] = []
    for name, text in result.get("bits_per_byte", {}).items():
        # Intervals are drawn for series alone.
        low, high = (None if step is None else bits_interval(text)) or (None, None)
        rows.append(
            {
                "run": run,
                "file": file,
                "step": step,
                "text": name,
                "bits_per_byte": text["bits_per_byte"],
                "stderr": text["stderr"],
                "low": low,
                "high": high,
                "bytes": text["bytes"],
                "documents": text["documents"],
            }
        )
    return rows


def _differences(found: Mapping[str, Path]) -> list[DifferenceRow]:
    """Compare results of the same name with that of the first run: tasks, parts of their items, and held-out texts."""
    comparison: Mapping[str, Any] = cast(Mapping[str, Any], compare(list(found.values()), labels=list(found)))
    rows = [(row, row["task"]) for row in comparison["comparisons"]]
    rows += [(row, f"{row['task']}: {row['part']}") for row in comparison.get("parts", [])]
    tasks = [_difference(row, task, row["metric"], row["num_items"], verdict(row)) for row, task in rows]
    texts = [
        _difference(row, row["text"], "bits per byte", row["num_documents"], _verdict_on_bits(row))
        for row in comparison.get("bits_per_byte", [])
    ]
    return tasks + texts


def _difference(row: Mapping[str, Any], task: str, metric: str, num_items: int, in_words: str) -> DifferenceRow:
    low, high = row["interval"] or (None, None)
    return {
        "run": row["model"],
        "baseline": row["baseline"],
        "task": task,
        "metric": metric,
        "num_items": num_items,
        "difference": row["difference"],
        "low": low,
        "high": high,
        "won": row["won"],
        "lost": row["lost"],
        "outcome": row["outcome"],
        "verdict": in_words,
    }


def _verdict_on_bits(row: Mapping[str, Any]) -> str:
    return f"{row['better']} is better" if row["outcome"] == "different" else str(row["outcome"])
