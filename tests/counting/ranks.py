"""What the ranks of the counting tests do; importable by their processes."""

from __future__ import annotations

from typing import Any

from tests.counting.counters import Collective, Operators, collectives
from tests.counting.where import configured, train


def counted(root: str, changes: dict[str, Any], steps: int | None = None) -> list[Collective]:
    """Train so many steps and stop, or to the end; this rank's collectives."""
    with collectives() as found:
        train(configured(root, changes), "never", steps)
    return found.calls


def added(root: str, changes: dict[str, Any], elements: int) -> list[str]:
    """Train one step; the dtypes of the tensors of so many elements that something was added to in place."""
    with Operators("add_") as operators:
        train(configured(root, changes), "never", 1)
    return [str(call.dtypes[0]) for call in operators.calls if call.elements == elements]
