"""Formats: rows of text from an open file, whatever its kind.

A format is a class that implements `TextFile`, and an entry in `FORMATS` for each suffix. Files are read in batches
and never loaded as a whole.
"""

from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

from pretrain.data.bad_rows import BadRow
from pretrain.data.cache import open_file
from pretrain.data.compression import COMPRESSIONS
from pretrain.data.errors import DataError
from pretrain.data.json_lines import JsonText
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

    def field_names(self) -> list[str]:
        """Return the fields that its rows have, for messages: of all rows, or of the first."""

    row_bytes: tuple[int, int]
    """Where the search for the row that was yielded last began, and that for the next one: places in the file for
    `first_byte` of `rows`. Zeros if the format has no such places."""

    def rows(
        self, unit: Unit, first_row: int, batch_bytes: int, first_byte: int = 0
    ) -> Iterator[tuple[int, str | BadRow]]:
        """Yield (row, text) or (row, what is wrong with it) of a unit from `first_row` on; see `read_unit`.

        `first_byte` is where to look for the first row, if that is known. A place that cannot be right is ignored.
        """

    def last_texts(self, units: list[Unit], sample_bytes: int) -> Iterator[str | BadRow]:
        """Yield the texts of about the last `sample_bytes` of the file, whose units these are.

        Yields nothing if the end cannot be reached without reading the rest.
        """


FORMATS: dict[str, Callable[[BinaryIO, str, TextRecipe], TextFile]] = {
    ".parquet": ParquetText,
    **{
        suffix + compression: JsonText
        for suffix in (".jsonl", ".ndjson", ".json")
        for compression in ("", *COMPRESSIONS)
    },
}
"""The class that reads the files with a suffix, which is spelt in lower case here; called with the open file, its path
and the recipe."""

SUFFIXES = tuple(FORMATS)


def text_file(file: BinaryIO, path: str, recipe: TextRecipe) -> TextFile:
    """Read an open file in the format that its path names.

    Raises:
        DataError: the file is damaged, has no such text field, or is of a kind that cannot be read.

    """
    kind = next((kind for suffix, kind in FORMATS.items() if path.lower().endswith(suffix)), None)
    if kind is None:
        raise DataError(f"{path}: unknown kind of file, expected one of {', '.join(SUFFIXES)}")
    return kind(file, path, recipe)


def read_unit(unit: Unit, first_row: int, batch_bytes: int) -> Iterator[tuple[int, str | BadRow]]:
    """Open the file of a unit and yield its rows from `first_row` on, holding about `batch_bytes` of text.

    A row is yielded as (number, text), or as (number, what is wrong with it). Rows that do not meet the condition of
    the recipe and blank lines are left out or have an empty text. Rows are counted from 0 within the unit, in the
    order of the file, those that are left out included. A unit that is part k of n holds every n-th row of its file or
    row group, beginning with row k.

    Raises:
        DataError: the file is missing, not the one in the catalog, or damaged such that its rows cannot be told apart.

    """
    with open_file(unit.file) as file:
        yield from text_file(file, unit.file.path, unit.recipe).rows(unit, first_row, batch_bytes)


def read_places(
    unit: Unit, first_row: int, first_byte: int, batch_bytes: int
) -> Iterator[tuple[int, str | BadRow, int, int]]:
    """Yield the same as `read_unit`, and for each row the place where to look for it and for the next one.

    With the place of its first row, an uncompressed file of lines is read from there. Other formats have no places,
    which are then 0.

    Args:
        unit: the unit.
        first_row: the row to begin with.
        first_byte: its place; 0 if it is not known.
        batch_bytes: see `read_unit`.

    Raises:
        DataError: see `read_unit`.

    """
    with open_file(unit.file) as file:
        opened = text_file(file, unit.file.path, unit.recipe)
        for row, text in opened.rows(unit, first_row, batch_bytes, first_byte):
            yield row, text, *opened.row_bytes
