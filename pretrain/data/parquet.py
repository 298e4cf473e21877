"""Parquet files: a row group is a read unit, and one column holds the text."""

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pretrain.data.errors import DataError
from pretrain.data.units import TextRecipe, Unit

_MAX_BATCH_ROWS = 4096
_SAMPLE_ROWS = 1024


class ParquetText:
    """The text column of an open parquet file; implements `pretrain.data.formats.TextFile`.

    Args:
        file: the open file. It stays open when this object is dropped.
        path: its name, for messages.
        recipe: how a row becomes text.

    Raises:
        DataError: the file is damaged, it lacks the column, or the column holds something other than strings.

    """

    def __init__(self, file: BinaryIO, path: str, recipe: TextRecipe) -> None:
        text_field = recipe.text_field
        self._path, self._text_field = path, text_field
        try:
            # Column chunks are read through a small buffer: they may be larger than the memory for all lanes together.
            self._file = pq.ParquetFile(file, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read as parquet: {error}") from error
        schema = self._file.schema_arrow
        if schema.names.count(text_field) > 1:
            raise DataError(f"{path}: has {schema.names.count(text_field)} columns {text_field!r}, expected one")
        if text_field not in schema.names:
            raise DataError(
                f"{path}: has no column {text_field!r}; its columns are {', '.join(schema.names) or 'none'}: "
                "set text_field to the one that holds the text"
            )
        kind = schema.field(text_field).type
        if not _is_text(kind):
            raise DataError(f"{path}: column {text_field!r} holds {kind}, expected string")

    def row_groups(self) -> tuple[int, ...]:
        """Return the number of rows of each row group."""
        return tuple(self._file.metadata.row_group(index).num_rows for index in range(self._file.num_row_groups))

    def values(self, column: str, limit: int) -> set[str]:
        """Return the distinct strings of a column of strings or of lists of strings; see `TextFile`."""
        schema = self._file.schema_arrow
        if schema.names.count(column) != 1 or not _holds_strings(schema.field(column).type):
            return set()
        found: set[Any] = set()
        try:
            for batch in self._file.iter_batches(columns=[column], use_threads=False):
                values = batch.column(0)
                found.update(pc.unique(pc.list_flatten(values) if _is_list(values.type) else values).to_pylist())
                if len(found) > limit:
                    break
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{self._path}: column {column!r} is damaged: {error}") from error
        return {value for value in found if isinstance(value, str)}

    def rows(self, unit: Unit, first_row: int, batch_bytes: int) -> Iterator[tuple[int, str]]:
        """Yield (row, text) of a unit; see `pretrain.data.formats.read_unit`.

        Rows before `first_row` are decoded but never become Python objects.
        """
        wanted = unit.part + first_row * unit.parts  # row of the row group
        base = 0  # row of the row group that the batch begins with
        batches = self._file.iter_batches(
            self._rows_per_batch(unit, batch_bytes),
            row_groups=[unit.row_group],
            columns=[self._text_field],
            use_threads=False,
        )
        while (batch := self._next_batch(batches, unit)) is not None:
            end = base + batch.num_rows
            if wanted < end:
                rows = range(wanted - base, batch.num_rows, unit.parts)
                for text in self._texts(batch.column(0), rows, unit, base):
                    yield wanted // unit.parts, text
                    wanted += unit.parts
            base = end

    def last_texts(self, units: list[Unit], sample_bytes: int) -> Iterator[str]:
        """Yield the texts of the last 1024 rows of the last row group."""
        for _, text in self.rows(units[-1], max(0, (units[-1].rows or 0) - _SAMPLE_ROWS), sample_bytes):
            yield text

    def _next_batch(self, batches: Iterator[pa.RecordBatch], unit: Unit) -> pa.RecordBatch | None:
        try:
            return next(batches, None)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{self._path}: row group {unit.row_group} is damaged: {error}") from error

    def _rows_per_batch(self, unit: Unit, batch_bytes: int) -> int:
        group = self._file.metadata.row_group(unit.row_group)
        chunk = group.column(self._file.schema_arrow.get_field_index(self._text_field))
        bytes_per_row = max(1, chunk.total_uncompressed_size // max(1, group.num_rows))
        return max(1, min(_MAX_BATCH_ROWS, batch_bytes // bytes_per_row))

    def _texts(self, column: pa.Array, rows: range, unit: Unit, base: int) -> list[str]:
        """Return the chosen rows of a batch as Python strings, each of them checked."""
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        column = column.slice(rows.start) if rows.step == 1 else column.take(pa.array(rows))
        problem: Exception | None = None
        if column.null_count == 0:
            try:
                return column.to_pylist()
            except UnicodeDecodeError as error:
                problem = error  # the loop below finds the row
        for row, value in zip(rows, column, strict=True):
            where = f"{self._path}: row {base + row} of row group {unit.row_group} (both counted from 0)"
            try:
                if value.as_py() is None:
                    raise DataError(f"{where} holds no text in {self._text_field!r}: remove such rows from the file")
            except UnicodeDecodeError as error:
                raise DataError(f"{where} is not valid UTF-8: {error}") from error
        raise DataError(
            f"{self._path}: row group {unit.row_group} has a damaged row between {base} and {base + rows[-1]}: "
            f"{problem or 'its count of null values is wrong'}"
        )


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _holds_strings(kind: Any) -> bool:
    return _is_text(kind.value_type if _is_list(kind) else kind)
