"""The evaluation results of the models of a config, for the comparison page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.compare import LEFT_OUT, compare
from eval.compare_groups import joined, shared_groups
from eval.compare_schema import Comparison
from eval.compare_tables import HEADS, explanations, tables, verdict
from eval.config import load_eval_config
from eval.errors import EvalError
from eval.results import RESULT_FILE, read_result
from eval.schema import EvalResult
from eval.scores import Score, group_of, interval_of, main_metric, scores
from pretrain.comparison.facts import Claim
from pretrain.comparison.measured import Measured, MeasuredModel, MeasuredTask, PairedRows
from pretrain.files import exists, named_path
from pretrain.processes.errors import did_you_mean


def models_of(config: Path) -> dict[str, str]:
    """Return label -> where the model is, in the order of an evaluation's config.

    Raises:
        ConfigError: the file is not the config of an evaluation.
        EvalError: it names no models, or two of the same label.
    """
    models = load_eval_config(config).models
    if not models:
        raise EvalError(f"{config}: models: expected at least one model to compare")
    counts = Counter(model.name for model in models)
    problems = [f"{config}: models: {count} models are called {name!r}" for name, count in counts.items() if count > 1]
    if problems:
        raise EvalError("\n".join(problems))
    return {model.name: model.model for model in models}


def result_files(models: Mapping[str, str], places: Sequence[str]) -> dict[str, Path]:
    """Return label -> result, in the order of the models; one without a result is absent.

    Args:
        models: label -> where the model is.
        places: folders that contain LABEL/results.json, or LABEL=RESULT.

    Raises:
        EvalError: a folder does not exist, a label is not a model's, or a model has two results.
    """
    found: dict[str, Path] = {}
    problems = []
    for word in places:
        label, path = named_path(word)
        if label is not None and label not in models:
            problems.append(f"{word}: no model of the config is called {label!r}{did_you_mean(label, models)}")
            continue
        if not exists(path):
            problems.append(f"{word}: no such file or folder")
            continue
        files = {name: path / name / RESULT_FILE for name in models} if label is None else {label: path}
        for name, file in files.items():
            if not file.exists():
                continue
            if name in found and found[name].resolve() != file.resolve():
                problems.append(f"{name} has two results: {found[name]} and {file}; name one of the folders")
            found[name] = file
    if problems:
        raise EvalError("\n".join(problems))
    return {label: found[label] for label in models if label in found}


def measured_models(
    models: Mapping[str, str], files: Mapping[str, Path], claims: Sequence[Claim], margin: float
) -> Measured:
    """Read and compare the results.

    Args:
        models: label -> where the model is.
        files: label -> result; the first one is the baseline of the paired differences.
        claims: for each, its subject is compared with its reference if both were run.
        margin: differences of scores below it count as equivalent.

    Raises:
        EvalError: a result cannot be read; one line per problem.
    """
    results, problems = {}, []
    for label, file in files.items():
        try:
            results[label] = read_result(file)
        except EvalError as error:
            problems.append(str(error))
    if problems:
        raise EvalError("\n".join(problems))
    notes = [note for label, result in results.items() for note in _identity_notes(label, models[label], result)]
    comparison = _compared(files, results, margin, notes)
    verdicts = [_verdicts(claim, files, results, margin, notes) for claim in claims]
    pairs: list[PairedRows] = []
    if comparison is not None:
        pairs = [{"title": title, "heads": list(HEADS), "rows": rows} for title, rows in tables(comparison)]
    return {
        "models": dict(models),
        "results": {label: _measured(result) for label, result in results.items()},
        "pairs": pairs,
        "explanations": explanations(comparison) if comparison is not None else [],
        "verdicts": verdicts,
        "notes": list(dict.fromkeys(notes)),
    }


def _identity_notes(label: str, model: str, result: EvalResult) -> list[str]:
    """Say so if a result is of another model than the config's."""
    name = result["model"]["name"]
    same = name == model or (result["model"]["source"] == "folder" and Path(name).resolve() == Path(model).resolve())
    return [] if same else [f"{label}: the result is of {name}, while the config says {model}"]


def _compared(
    files: Mapping[str, Path], results: Mapping[str, EvalResult], margin: float, notes: list[str]
) -> Comparison | None:
    """Compare all models with the first one; those that cannot be compared with it are left out, with a note."""
    baseline, *others = [*files] or [""]
    if not others:
        return None
    try:
        return _comparison([baseline, *others], files, results, margin)
    except EvalError:
        pass
    able = []
    for label in others:
        try:
            _comparison([baseline, label], files, results, margin)
            able.append(label)
        except EvalError as error:
            notes += [f"not compared: {line}" for line in str(error).splitlines()]
    if not able:
        return None
    try:
        return _comparison([baseline, *able], files, results, margin)
    except EvalError as error:
        # Each shares a task with the baseline, but no task is shared by all.
        notes += [f"not compared: {line}" for line in str(error).splitlines()]
        return None


def _comparison(
    labels: Sequence[str], files: Mapping[str, Path], results: Mapping[str, EvalResult], margin: float
) -> Comparison:
    """Compare models on the tasks and groups of tasks that all of them have, without the parts of a group."""
    shared = [
        name
        for name in results[labels[0]]["tasks"]
        if all(name in results[label]["tasks"] and name not in group_of(results[label]) for label in labels)
    ]
    shared += shared_groups([results[label] for label in labels])
    if not shared:
        raise EvalError(f"{' and '.join(labels)} have no task in common")
    comparison = compare([files[label] for label in labels], labels=labels, tasks=shared, margin=margin)
    # Of a group that is left out, its name says enough: MMLU has 57 parts.
    notes = [note for note in comparison["notes"] if not note.startswith(LEFT_OUT)]
    for label in labels:
        left_out = [score.name for score in _tasks_then_groups(results[label]) if score.name not in shared]
        notes += [f"{LEFT_OUT}{label}: {', '.join(left_out)}"] if left_out else []
    comparison["notes"] = notes
    return comparison


def _verdicts(
    claim: Claim, files: Mapping[str, Path], results: Mapping[str, EvalResult], margin: float, notes: list[str]
) -> dict[str, str]:
    """Return task -> verdict on the claim's subject against its reference; empty unless both were run."""
    pair = [claim.reference, claim.subject]
    if not all(label in files for label in pair):
        return {}
    try:
        rows = _comparison(pair, files, results, margin)["comparisons"]
    except EvalError as error:
        notes += [f"not compared: {line}" for line in str(error).splitlines()]
        return {"": "cannot be compared"}
    return {row["task"]: verdict(row) for row in rows}


def _measured(result: EvalResult) -> MeasuredModel:
    identity = result["model"]
    revision = identity.get("revision")
    found: MeasuredModel = {
        "tasks": _tasks(result),
        "parameters": identity["parameters"],
        "origin": f"{identity['name']} @ {revision}" if revision else identity["name"],
        "dtype": result["dtype"],
        "context_length": identity["context_length"],
        "items": result["items_source"]["kind"],
        "date": result["date"][:10],
    }
    if "parameters_without_embeddings" in identity:
        found["parameters_without_embeddings"] = identity["parameters_without_embeddings"]
    if "bos" in identity:
        found["bos"] = identity["bos"]
    if "bits_per_byte" in result:
        found["bits_per_byte"] = {text: bits["bits_per_byte"] for text, bits in result["bits_per_byte"].items()}
    if "provenance" in identity:
        found["tokens"] = identity["provenance"]["tokens"]
    return found


def _tasks(result: EvalResult) -> dict[str, MeasuredTask]:
    """Return the tasks of a result, then its groups of tasks, whose parts do not appear."""
    return {score.name: _task(score) for score in _tasks_then_groups(result)}


def _tasks_then_groups(result: EvalResult) -> list[Score]:
    return sorted(scores(result), key=lambda score: score.is_group)


def _task(score: Score) -> MeasuredTask:
    """Return a score over the items of its tasks, which count alike, with its interval."""
    whole = joined(score.tasks)
    metric = main_metric(whole)
    low, high = interval_of(whole["items"], metric)
    found: MeasuredTask = {
        "metric": metric,
        "score": whole[metric],
        "low": low,
        "high": high,
        "num_items": whole["num_items"],
        "num_items_in_split": whole["num_items_in_split"],
        "split": whole["split"],
        "shots": score.shots,
    }
    if "note" in score.tasks[0]:
        found["note"] = score.tasks[0]["note"]
    return found
