"""Rows that cannot be used, and how many of them a run puts up with."""

from dataclasses import dataclass

from pretrain.data.errors import BadRowsError

_MOST_LISTED = 20


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that holds no usable text, or several that are damaged together. Can be pickled."""

    path: str
    """Its file."""
    place: str
    """Which row of the file, for people; empty if the problem says so itself."""
    problem: str
    """What is wrong with it: a sentence with file and place."""
    rows: int = 1
    """How many rows are lost."""

    def __str__(self) -> str:
        return self.problem


class BadRowBudget:
    """Counts bad rows until there are too many.

    Args:
        limit: how many may be skipped.
        rows: how many have been counted elsewhere.

    """

    def __init__(self, limit: int, rows: int = 0) -> None:
        self.limit = limit
        self.rows = rows
        self.first: list[BadRow] = []
        """The first of them, for messages."""

    def spend(self, bad: BadRow) -> None:
        """Count a bad row.

        Raises:
            BadRowsError: there are more than `limit`.

        """
        self.rows += bad.rows
        if len(self.first) < _MOST_LISTED:
            self.first.append(bad)
        if self.rows > self.limit:
            raise too_many(bad, self.rows, self.limit)


def too_many(bad: BadRow, rows: int, limit: int) -> BadRowsError:
    """Return the error that a bad row is one too many.

    Args:
        bad: the row.
        rows: how many there are with it.
        limit: data.max_bad_rows.

    """
    found = f"{rows:,} bad rows" if rows > 1 else "1 bad row"
    return BadRowsError(
        f"{bad.problem}; {found} so far, more than the {limit:,} of data.max_bad_rows: repair or remove the row, or "
        "raise data.max_bad_rows to skip such rows",
        bad.path,
    )
