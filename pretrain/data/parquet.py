"""Parquet files: a row group is a read unit, and one column or more hold the text."""

import io
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pretrain.config.row_filter import condition_fields, parse_condition
from pretrain.config.text_field import parse_text_field
from pretrain.data.bad_rows import BadRow
from pretrain.data.columns import Column, DoubledError, count_columns, find_column, pick
from pretrain.data.errors import DataError
from pretrain.data.json_fields import fill_template, named
from pretrain.data.row_filter import mask
from pretrain.data.units import TextRecipe, Unit

_MAX_BATCH_ROWS = 4096
_SAMPLE_ROWS = 1024
_MAX_BATCH_BYTES = 256 << 20
_DAMAGE = (pa.ArrowException, OSError, UnicodeDecodeError)


class ParquetText:
    """The texts of an open parquet file; implements `pretrain.data.formats.TextFile`.

    Args:
        file: the open file. It stays open when this object is dropped.
        path: its name, for messages.
        recipe: which rows are read and how they become text.

    Raises:
        DataError: the file is damaged, it lacks a column of the text, or one holds something other than strings.

    """

    def __init__(self, file: BinaryIO, path: str, recipe: TextRecipe) -> None:
        self._bytes, self._path, self._limits = file, path, recipe
        self.row_bytes = (0, 0)
        self._field = parse_text_field(recipe.text_field)
        self._condition = parse_condition(recipe.where) if recipe.where else None
        try:
            self._file = _open(file)
            self._schema = self._file.schema_arrow
            self._names: list[str] = self._schema.names
        except _DAMAGE as error:
            raise DataError(f"{path}: cannot be read as parquet: {error}") from error
        if count_columns(self._schema) != self._file.metadata.num_columns:
            raise DataError(f"{path}: its columns are nested in a way that cannot be read: {self._schema}")
        self._texts_in = [self._text_column(field) for field in self._field.fields]
        fields = condition_fields(self._condition) if self._condition else ()
        self._tested = {field: column for field in fields if (column := self._find(field)) is not None}

    def row_groups(self) -> tuple[int, ...]:
        """Return the number of rows of each row group."""
        return tuple(self._file.metadata.row_group(index).num_rows for index in range(self._file.num_row_groups))

    def values(self, column: str, limit: int) -> set[str]:
        """Return the distinct strings of a column of strings or of lists of strings; see `TextFile`."""
        try:
            place = find_column(self._schema, column) if column in self._names else None
        except DoubledError:
            place = None
        if place is None or not _holds_strings(place.type):
            return set()
        found: set[Any] = set()
        try:
            for group in range(self._file.num_row_groups):
                for batch in self._file.reader.iter_batches(
                    _MAX_BATCH_ROWS, row_groups=[group], column_indices=list(place.leaves), use_threads=False
                ):
                    values = pick(batch, [place], place)
                    found.update(pc.unique(pc.list_flatten(values) if _is_list(values.type) else values).to_pylist())
                    if len(found) > limit:
                        return {value for value in found if isinstance(value, str)}
        except _DAMAGE as error:
            raise DataError(f"{self._path}: column {column!r} is damaged: {error}") from error
        return {value for value in found if isinstance(value, str)}

    def field_names(self) -> list[str]:
        """Return the names of the columns; see `TextFile`."""
        return self._names

    def rows(
        self, unit: Unit, first_row: int, batch_bytes: int, first_byte: int = 0
    ) -> Iterator[tuple[int, str | BadRow]]:
        """Yield the rows of a unit; see `pretrain.data.formats.read_unit`.

        Rows before `first_row` are decoded but never become Python objects. If a page cannot be decoded, the rest of
        the row group counts as bad.
        """
        wanted = unit.part + first_row * unit.parts  # row of the row group
        base = 0  # row of the row group that the batch begins with
        batches = self._batches(unit, batch_bytes)
        while (batch := self._next_batch(batches, unit)) is not None:
            if isinstance(batch, str):
                lost = len(range(wanted, self._file.metadata.row_group(unit.row_group).num_rows, unit.parts))
                if lost:
                    place = f"row group {unit.row_group}"
                    yield wanted // unit.parts, BadRow(self._path, place, f"{self._path}: {place} {batch}", lost)
                return
            rows = range(wanted - base, batch.num_rows, unit.parts)
            if rows:
                chosen = self._chosen(batch, rows)
                for row, text in zip(chosen, self._texts(batch, chosen, unit, base), strict=True):
                    yield (base + row) // unit.parts, text
                wanted += len(rows) * unit.parts
            base += batch.num_rows

    def last_texts(self, units: list[Unit], sample_bytes: int) -> Iterator[str | BadRow]:
        """Yield the texts of the last 1024 rows of the last row group."""
        for _, text in self.rows(units[-1], max(0, (units[-1].rows or 0) - _SAMPLE_ROWS), sample_bytes):
            yield text

    def _find(self, field: str) -> Column | None:
        try:
            return find_column(self._schema, field)
        except DoubledError as error:
            raise DataError(f"{self._path}: {error}: rename one of them") from error

    def _text_column(self, field: str) -> Column:
        column = self._find(field)
        if column is None:
            raise DataError(
                f"{self._path}: has no column {field!r}; {named(self._names, field, 'columns')}: "
                "set text_field to the one that holds the text"
            )
        if not _is_text(column.type):
            raise DataError(f"{self._path}: column {field!r} holds {column.type}, expected string")
        return column

    @property
    def _columns(self) -> list[Column]:
        return [*self._texts_in, *self._tested.values()]

    def _batches(self, unit: Unit, batch_bytes: int) -> Iterator[Any]:
        leaves = sorted({leaf for column in self._columns for leaf in column.leaves})
        group = self._file.metadata.row_group(unit.row_group)
        size = sum(group.column(leaf).total_uncompressed_size for leaf in leaves)
        rows = min(_MAX_BATCH_ROWS, batch_bytes // max(1, size // max(1, group.num_rows)))
        # A value of a dictionary may come back in every row, at a few bits each in the file.
        largest = max(self._dictionary_bytes(group.column(leaf)) for leaf in leaves)
        rows = max(1, min(rows, _MAX_BATCH_BYTES // max(1, largest)))
        batches: Iterator[Any] = self._file.reader.iter_batches(
            rows, row_groups=[unit.row_group], column_indices=leaves, use_threads=False
        )
        return batches

    def _dictionary_bytes(self, chunk: Any) -> int:
        """Return the size of the dictionary of a column chunk, as its page header states it; 0 if it has none."""
        if not chunk.has_dictionary_page or chunk.physical_type != "BYTE_ARRAY" or not chunk.dictionary_page_offset:
            return 0
        self._bytes.seek(chunk.dictionary_page_offset)
        header = self._bytes.read(16)
        # Thrift's compact protocol: field 1, the kind of page (a dictionary), and field 2, its size, as zigzag varints.
        if header[:3] != b"\x15\x04\x15":
            return 0
        size = 0
        for index, byte in enumerate(header[3:8]):
            size |= (byte & 127) << 7 * index
            if byte < 128:
                break
        return size >> 1

    def _next_batch(self, batches: Iterator[Any], unit: Unit) -> Any:
        """Return the next batch, None at the end, or what is wrong with it."""
        try:
            return next(batches, None)
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise DataError(f"{self._path}: cannot be read: {error}") from error
            return f"is damaged: {error}"

    def _chosen(self, batch: Any, rows: range) -> Sequence[int]:
        """Return those of the rows of a batch that meet the condition."""
        if self._condition is None:
            return rows
        columns = self._columns

        def column_of(field: str) -> Any:
            return pick(batch, columns, self._tested[field]) if field in self._tested else None

        try:
            chosen = mask(self._condition, column_of, batch.num_rows).to_numpy(zero_copy_only=False)
        except ValueError as error:
            raise DataError(f"{self._path}: {error}") from error
        return [row for row in rows if chosen[row]]

    def _texts(self, batch: Any, rows: Sequence[int], unit: Unit, base: int) -> Sequence[str | BadRow]:
        """Return the texts of the chosen rows of a batch."""
        columns = self._columns
        fields = [
            self._strings(pick(batch, columns, column), rows, field, unit, base)
            for field, column in zip(self._field.fields, self._texts_in, strict=True)
        ]
        if not self._field.is_template:
            return fields[0]
        return [self._filled(values) for values in zip(*fields, strict=True)]

    def _filled(self, values: Sequence[str | BadRow]) -> str | BadRow:
        strings: list[str] = []
        for value in values:
            if isinstance(value, BadRow):
                return value
            strings.append(value)
        return fill_template(self._field.literals, strings)

    def _strings(
        self, column: Any, rows: Sequence[int], field: str, unit: Unit, base: int
    ) -> list[str] | list[str | BadRow]:
        """Return the chosen values of a column as Python strings, each of them checked."""
        if pa.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        whole = isinstance(rows, range) and rows.step == 1
        column = column.slice(rows[0]) if whole and rows else column.take(pa.array(rows, pa.int64()))
        if column.null_count == 0 and column.nbytes <= self._limits.max_document_bytes:
            try:
                strings: list[str] = column.to_pylist()
                return strings
            except UnicodeDecodeError:
                pass  # found row by row
        return [self._string(value, base + row, field, unit) for row, value in zip(rows, column, strict=True)]

    def _string(self, value: Any, row: int, field: str, unit: Unit) -> str | BadRow:
        place = f"row {row} of row group {unit.row_group}"
        where = f"{self._path}: {place} (both counted from 0)"
        try:
            text: str | None = value.as_py()
        except UnicodeDecodeError as error:
            return BadRow(self._path, place, f"{where} is not valid UTF-8: {error}")
        if text is None:
            return BadRow(self._path, place, f"{where} holds no text in {field!r}")
        most = self._limits.max_document_bytes
        if len(text) * 4 > most and len(text.encode()) > most:
            return BadRow(
                self._path, place, f"{where} is longer than the {most >> 20} MiB of data.max_document_mib in {field!r}"
            )
        return text


def _open(file: BinaryIO) -> Any:
    # Column chunks are read through a small buffer: they may be larger than the memory for all lanes together.
    options: dict[str, Any] = {
        "buffer_size": 1 << 20,
        "pre_buffer": False,
        "page_checksum_verification": True,
        "arrow_extensions_enabled": False,
    }
    try:
        return pq.ParquetFile(file, **options)
    except pa.ArrowInvalid:
        # The Arrow schema that some writers add to the footer only refines the types; the file is good without it.
        footer = _footer_without_arrow_schema(file)
        if footer is None:
            raise
        return pq.ParquetFile(file, metadata=pq.read_metadata(io.BytesIO(footer)), **options)


def _footer_without_arrow_schema(file: BinaryIO) -> bytes | None:
    """Return the end of a parquet file, with the entry of the Arrow schema renamed; None if there is no such entry."""
    end = file.seek(-8, io.SEEK_END)
    length, magic = int.from_bytes(file.read(4), "little"), file.read(4)
    if magic != b"PAR1" or length > end:
        return None
    file.seek(end - length)
    footer = file.read(length)
    if b"ARROW:schema" not in footer:
        return None
    return b"PAR1" + footer.replace(b"ARROW:schema", b"ARROW:ignore") + length.to_bytes(4, "little") + magic


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: Any) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)


def _holds_strings(kind: Any) -> bool:
    return _is_text(kind.value_type if _is_list(kind) else kind)
