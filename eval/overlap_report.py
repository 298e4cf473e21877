"""The report of `aurora data overlap`, as far as an evaluation needs it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eval.errors import EvalError


class TaskReport(NamedTuple):
    """What the report says of one task."""

    item_hashes: Sequence[str]
    """Of every item of the split, the `text_hash` of the text that was looked for. Empty in reports of earlier
    versions."""
    too_short: int
    overlapping: frozenset[int]
    """Positions of items."""


class OverlapReport(NamedTuple):
    """The report."""

    sha256: str
    """Of the file."""
    ngram: int
    complete: bool
    text_bytes: int
    tasks: dict[str, TaskReport]


def text_hash(text: str) -> str:
    """Return a short hash of an item's text: 64 bits, in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_overlap_report(file: Path) -> OverlapReport:
    """Read the JSON that `aurora data overlap --out` writes.

    Raises:
        EvalError: it cannot be read or is not such a report.
    """
    try:
        data = file.read_bytes()
        content = json.loads(data)
    except OSError as error:
        raise EvalError(f"cannot read {file}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise EvalError(f"{file} is not a report of `aurora data overlap`: {error}") from error
    try:
        coverage = content["coverage"]
        return OverlapReport(
            sha256=hashlib.sha256(data).hexdigest(),
            ngram=_of_type(int, content["ngram"]),
            complete=_of_type(bool, coverage["complete"]),
            text_bytes=_of_type(int, coverage["text_bytes"]),
            tasks={
                name: TaskReport(
                    item_hashes=_of_type(list, task.get("item_hashes", [])),
                    too_short=_of_type(int, task["too_short"]),
                    overlapping=frozenset(_of_type(int, one["item"]) for one in task["overlapping"]),
                )
                for name, task in content["tasks"].items()
            },
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise EvalError(
            f"{file} is not a report of `aurora data overlap`: {type(error).__name__}: {error}; pass what --out wrote"
        ) from error


def _of_type(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is not a {kind.__name__}")
    return value
