"""Formats: rows of text from an open file, whatever its kind.

A format is a class that implements `TextFile`, and an entry in `FORMATS` for each suffix. Files are read in batches
and never loaded as a whole.
"""

from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

from pretrain.data.cache import open_file
from pretrain.data.json_lines import JsonLinesText
from pretrain.data.parquet import ParquetText
from pretrain.data.units import TextRecipe, Unit


class TextFile(Protocol):
    """An open file, read row by row. Every method may be called any number of times, one after the other.

    All methods raise `DataError` if the file is damaged.
    """

    def row_groups(self) -> tuple[int, ...] | None:
        """Return the rows of each row group; None if the format has none."""

    def values(self, column: str, limit: int) -> set[str]:
        """Return the distinct strings of a column, more than `limit` only to show that there are more.

        Empty if there is no such column, or if the format cannot read one column on its own.
        """

    def rows(self, unit: Unit, first_row: int, batch_bytes: int) -> Iterator[tuple[int, str]]:
        """Yield (row, text) of a unit from `first_row` on; see `read_unit`."""

    def last_texts(self, units: list[Unit], sample_bytes: int) -> Iterator[str]:
        """Yield the texts of about the last `sample_bytes` of the file, whose units these are.

        Yields nothing if the end cannot be reached without reading the rest.
        """


FORMATS: dict[str, Callable[[BinaryIO, str, TextRecipe], TextFile]] = {
    ".parquet": ParquetText,
    ".jsonl": JsonLinesText,
    ".jsonl.gz": JsonLinesText,
    ".jsonl.zst": JsonLinesText,
}
"""The class that reads the files with a suffix; called with the open file, its path and the recipe."""

SUFFIXES = tuple(FORMATS)


def text_file(file: BinaryIO, path: str, recipe: TextRecipe) -> TextFile:
    """Read an open file in the format that its path names.

    Raises:
        DataError: the file is damaged or has no such text field.

    """
    return next(kind for suffix, kind in FORMATS.items() if path.lower().endswith(suffix))(file, path, recipe)


def read_unit(unit: Unit, first_row: int, batch_bytes: int) -> Iterator[tuple[int, str]]:
    """Open the file of a unit and yield (row, text) from `first_row` on, holding about `batch_bytes` of text.

    Rows are counted from 0 within the unit, in the order of the file. A unit that is part k of n holds every n-th row
    of its file or row group, beginning with row k.

    Raises:
        DataError: the file is missing, damaged or not the one in the catalog, or a row holds no valid text.

    """
    with open_file(unit.file) as file:
        yield from text_file(file, unit.file.path, unit.recipe).rows(unit, first_row, batch_bytes)
