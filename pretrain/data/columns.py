"""Fields of a parquet file: which column, or part of a column, a field is, and reading no more than those needed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


class DoubledError(Exception):
    """Several columns have the name that is looked for."""


@dataclass(frozen=True, slots=True)
class Column:
    """Where a field is in a schema."""

    top: int
    """Index of the column."""
    names: tuple[str, ...]
    """The fields that lead from that column into its structs; none if the column itself is meant."""
    type: Any
    """The Arrow type of what is found there."""
    leaves: range
    """The primitive columns of the file that it consists of."""


def find_column(schema: Any, field: str) -> Column | None:
    """Find a field; a dot leads into a struct, unless a column has the dot in its own name.

    Returns:
        None if there is no such field.

    Raises:
        DoubledError: several columns have the name.

    """
    tops = list(schema)
    starts = [0]
    for top in tops:
        starts.append(starts[-1] + _count_leaves(top.type))
    for index, names in _candidates(tops, field):
        name, *inner = names
        if schema.names.count(name) > 1:
            raise DoubledError(f"has {schema.names.count(name)} columns {name!r}, expected one")
        kind, leaf = tops[index].type, starts[index]
        for one in inner:
            if len(kind.get_all_field_indices(one)) > 1:
                raise DoubledError(
                    f"has {len(kind.get_all_field_indices(one))} fields {one!r} in {name!r}, expected one"
                )
            child = kind.get_field_index(one)
            leaf += sum(_count_leaves(kind.field(before).type) for before in range(child))
            kind = kind.field(child).type
        return Column(index, tuple(inner), kind, range(leaf, leaf + _count_leaves(kind)))
    return None


def count_columns(schema: Any) -> int:
    """Return the number of primitive columns of a file with this schema."""
    return sum(_count_leaves(field.type) for field in schema)


def _candidates(fields: Iterable[Any], name: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Yield the index of a field and the names on the way from it, the longest first name first."""
    fields = list(fields)
    head = name
    while head:
        rest = name[len(head) + 1 :]
        for index, field in enumerate(fields):
            if field.name != head:
                continue
            if head == name:
                yield index, (head,)
            elif pa.types.is_struct(field.type):
                for _, names in _candidates(field.type, rest):
                    yield index, (head, *names)
        head = head.rpartition(".")[0]


def _count_leaves(kind: Any) -> int:
    if isinstance(kind, pa.BaseExtensionType):
        return _count_leaves(kind.storage_type)
    if pa.types.is_map(kind):
        return _count_leaves(kind.key_type) + _count_leaves(kind.item_type)
    if pa.types.is_struct(kind):
        return sum(_count_leaves(field.type) for field in kind)
    if pa.types.is_nested(kind):  # lists of every sort
        return _count_leaves(kind.value_type)
    return 1


def pick(batch: Any, columns: Iterable[Column], wanted: Column) -> Any:
    """Return the array of a field from a batch that was read with the leaves of `columns`."""
    array = batch.column(sorted({column.top for column in columns}).index(wanted.top))
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    for name in wanted.names:
        array = pc.struct_field(array, [array.type.get_field_index(name)])
    return array.storage if isinstance(array, pa.ExtensionArray) else array
