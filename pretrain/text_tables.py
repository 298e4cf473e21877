"""Tables as plain text and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each row, with columns as wide as their longest cell and two blanks apart.

    Args:
        rows: at least one; all with the same number of cells.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def markdown_row(cells: Iterable[str]) -> str:
    """Return a row of a table in Markdown; the cells must have been escaped."""
    return f"| {' | '.join(cells)} |"
