"""The routing table of an optimizer: its groups as they are now, with the reasons of the model they came from."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from .blocks import blocks, row_blocks, views
from .routing import Route, row


def table_routes(groups: Sequence[Mapping[str, Any]], of_model: Sequence[Route]) -> list[Route]:
    """The rows of an optimizer's groups, in the order of the model's and then of the groups.

    Args:
        groups: complete ones.
        of_model: the rows of the model that the first groups were made of; its frozen parameters are in no group.
    """
    found: dict[str, list[Route]] = {}
    for index, group in enumerate(groups):
        for line in group_routes(group, index):
            found.setdefault(line.name, []).append(line)
    first: dict[str, Route] = {}
    for line in of_model:
        first.setdefault(line.name, line)
    rows: list[Route] = []
    for name, line in first.items():
        here = found.pop(name, [line] if line.optimizer == "frozen" else [])
        same = all(own.optimizer == line.optimizer for own in here)
        rows += [replace(own, why=line.why, role=line.role) if same else own for own in here]
    return rows + [line for lines in found.values() for line in lines]


def group_routes(group: Mapping[str, Any], index: int) -> list[Route]:
    """The rows of a group that was not made from a model."""
    rows: list[Route] = []
    names = group.get("param_names", [f"group {index} parameter {i}" for i in range(len(group["params"]))])
    entries = [(None, None)] * len(names)
    if group["kind"] == "matrix":
        entries = list(zip(row_blocks(group), views(group), strict=True))  # type: ignore[arg-type]
    for name, p, (split, view) in zip(names, group["params"], entries, strict=True):
        is_matrix = group["kind"] == "matrix" or (group["kind"] == "mixed" and p.ndim == 2 and min(p.shape) > 1)
        why = f"in a group of kind {group['kind']!r}"
        if not is_matrix:
            rows.append(row(name, tuple(p.shape), "adamw", None, why, "hidden" if p.ndim == 2 else "vector"))
            continue
        shapes = Counter(block.shape for block in blocks(p, split, view))
        rows += [row(name, shape, "matrix", group, why, blocks=count) for shape, count in shapes.items()]
    return rows


def format_table(rows: Iterable[Route]) -> list[str]:
    """A routing table as text, in columns: name, shape, form, optimizer, direction, lr scale, why."""
    cells = [("parameter", "shape", "form", "optimizer", "direction", "lr scale", "why")]
    for line in rows:
        shape = " x ".join(map(str, line.shape)) + (f" ({line.blocks} blocks)" if line.blocks > 1 else "")
        scale = "" if line.lr_scale is None else f"{line.lr_scale:.4g}"
        cells.append((line.name, shape, line.form, line.optimizer, line.direction, scale, line.why))
    widths = [max(len(cell[column]) for cell in cells) for column in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(texts, widths, strict=True)).rstrip() for texts in cells]
