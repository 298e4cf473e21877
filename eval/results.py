"""Write and read the result file of an evaluation."""

from __future__ import annotations

import json
import math
import os
import types
from collections.abc import Container, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NotRequired, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from eval.errors import EvalError
from eval.schema import SCHEMA_VERSION, EvalResult, TaskResult
from eval.suites import TaskChoice
from eval.validity_schema import BitsPerByte
from pretrain.files import replace_text

RESULT_FILE = "results.json"
_MOST_PROBLEMS = 10  # shown for one file


def write_result(result: EvalResult, out_dir: Path) -> Path:
    """Write `out_dir`/results.json, replacing an earlier one. An incomplete file is never visible.

    Raises:
        EvalError: the folder is not writable.
    """
    target = Path(out_dir) / RESULT_FILE
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

    Raises:
        EvalError: the folder cannot be written to, or holds something that would be lost.
    """
    existing = next(folder for folder in (out_dir, *out_dir.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise EvalError(f"cannot write a result to {out_dir}: {existing} is not a folder that you may write to")
    file = out_dir / RESULT_FILE
    if not file.exists():
        return
    try:
        earlier = read_result(file)
    except EvalError as error:
        raise EvalError(f"{file} exists and cannot be read as a result; move it, or choose another --out") from error
    choices = {task.name: task for task in (TaskChoice(task) if isinstance(task, str) else task for task in tasks)}
    name, kept = earlier["model"]["name"], _not_covered(earlier, choices)
    kept += [f"bits per byte on {text}" for text in earlier.get("bits_per_byte", {}) if text not in texts]
    other_shots = sorted(
        task for task, choice in choices.items() if choice.shots != _shots(earlier, task, otherwise=choice.shots)
    )
    lost = [
        f"it is of the model {name}" if name != model else "",
        f"it also has {', '.join(kept)}" if kept else "",
        f"it has another number of solved examples for {', '.join(other_shots)}" if other_shots else "",
        f"it is of {earlier['limit'] or 'all'} items a task, the new one of {limit}"
        if limit is not None and (earlier["limit"] is None or earlier["limit"] > limit)
        else "",
        f"its items were selected by {earlier['selection']!r}"
        if None not in (limit, earlier["limit"]) and selection != earlier["selection"]
        else "",
    ]
    if any(lost):
        raise EvalError(
            f"{file} holds an earlier result that would be lost: {'; '.join(filter(None, lost))}; choose another --out"
            " or pass --overwrite"
        )


def _not_covered(earlier: EvalResult, tasks: Container[str]) -> list[str]:
    """The tasks of an earlier result that are neither among `tasks` nor in a group that is."""
    covered = {name for group, found in earlier.get("groups", {}).items() if group in tasks for name in found["tasks"]}
    return sorted(name for name in earlier["tasks"] if name not in tasks and name not in covered)


def _shots(earlier: EvalResult, task: str, otherwise: int) -> int:
    """The number of solved examples with which an earlier result has a task or group."""
    group = earlier.get("groups", {}).get(task)
    found = earlier["tasks"].get(group["tasks"][0] if group else task)
    return otherwise if found is None else found.get("num_fewshot", 0)


def read_result(path: Path) -> EvalResult:
    """Read and check a result file, or the one in a folder.

    Raises:
        EvalError: there is none, it is malformed, or its figures contradict its items; one line per problem.
    """
    file = path / RESULT_FILE if path.is_dir() else path
    try:
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
        if type(value) not in (int, float) or not math.isfinite(value):
            yield f"{where} is {_short(value)}, expected a finite number"
    elif type(value) is not kind:
        yield f"{where} is {_short(value)}, expected {kind.__name__}"


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
    if len({item["doc_id"] for item in items}) < len(items):
        yield "several items have the same doc_id"
    for metric in ("acc", "acc_norm"):
        outcomes = [item.get(metric) for item in items]
        if metric not in task:
            continue
        if not set(outcomes) <= {0, 1}:
            yield f"{metric} is not 0 or 1 for every item"
        elif abs(sum(cast(list[int], outcomes)) / len(items) - task[metric]) > 1e-9:
            yield f"{metric} is {task[metric]}, which is not the mean of its items"
    if len({"source" in item for item in items}) > 1:
        yield "some items have a source and others have none"


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
