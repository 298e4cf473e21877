"""Runs: what a lane reads from prepared data, consecutive documents of one split as one array of tokens."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pretrain.data.prepared.layout import DocumentTable


@dataclass(frozen=True, slots=True)
class TokenRun:
    """Consecutive documents, each followed by its separator."""

    first_row: int
    """Row of the first document in its unit."""
    tokens: npt.NDArray[Any]
    """Unsigned integers [tokens], a view of the file."""
    ends: list[int]
    """Index of the first token after each document."""
    sizes: list[int]
    """UTF-8 bytes of the documents before each one, and of all of them: one number more than `ends` has."""

    @classmethod
    def of_document(cls, tokens: npt.NDArray[Any], text_bytes: int) -> "TokenRun":
        """Return the run of a single document whose tokens end with its separator."""
        return cls(0, tokens, [len(tokens)], [0, text_bytes])

    def before(self, token: int) -> tuple[int, int]:
        """Return how many documents and how many UTF-8 bytes of text lie before a token.

        A document counts once its separator does. As everywhere, the bytes of a document are spread evenly over its
        tokens and its separator, in whole numbers.
        """
        ends, sizes = self.ends, self.sizes
        index = bisect_right(ends, token)
        before = sizes[index]
        if index == len(ends):
            return index, before
        begin = ends[index - 1] if index else 0
        return index, before + (sizes[index + 1] - before) * (token - begin) // (ends[index] - begin)


def token_runs(
    tokens: npt.NDArray[Any], table: DocumentTable, rows: range, chosen: npt.NDArray[np.bool_] | None, row_0: int = 0
) -> Iterator[TokenRun]:
    """Yield the runs of a unit.

    Args:
        tokens: those of the unit.
        table: its documents; `ends` and `text_bytes` count from the beginning of the unit.
        rows: those to read, consecutive.
        chosen: [documents], which documents to read; None for all.
        row_0: the row of `table` from which the runs count theirs.

    """
    if not rows:
        return
    borders = [rows.start, rows.stop]
    if chosen is not None:
        edges = np.flatnonzero(np.diff(chosen[rows.start : rows.stop], prepend=False, append=False))
        borders = (edges + rows.start).tolist()
    for begin, end in zip(borders[::2], borders[1::2], strict=True):
        start = int(table.ends[begin - 1]) if begin else 0
        size = int(table.text_bytes[begin - 1]) if begin else 0
        ends = (table.ends[begin:end] - np.uint64(start)).tolist()
        sizes = [0, *(table.text_bytes[begin:end] - np.uint64(size)).tolist()]
        yield TokenRun(begin - row_0, tokens[start : start + ends[-1]], ends, sizes)
