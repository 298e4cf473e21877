"""From a row of JSON to its text: the fields that a recipe names, and the condition that the row must meet."""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from pretrain.config.row_filter import parse_condition
from pretrain.config.text_field import parse_text_field
from pretrain.data.row_filter import meets
from pretrain.data.units import TextRecipe
from pretrain.processes.errors import nearest

MISSING: Final = object()
"""What `lookup` returns for a field that a row does not have."""

_MOST_NAMES, _MOST_LETTERS = 30, 80  # in a message


class RowError(Exception):
    """A row has no usable text; the message continues a sentence that begins with its place."""


def lookup(row: Mapping[str, Any], field: str) -> Any:
    """Return the value of a field; a dot leads into an object, unless a key has the dot in its own name."""
    if field in row:
        return row[field]
    head = field
    while (dot := head.rfind(".")) > 0:
        head = field[:dot]
        inner = row.get(head)
        if isinstance(inner, dict) and (found := lookup(inner, field[dot + 1 :])) is not MISSING:
            return found
    return MISSING


class JsonRecipe:
    """A recipe, ready to be applied to rows of JSON."""

    def __init__(self, recipe: TextRecipe) -> None:
        self._field = parse_text_field(recipe.text_field)
        self._condition = parse_condition(recipe.where) if recipe.where else None

    def text(self, row: object) -> str:
        """Return the text of a row; empty if the row does not meet the condition.

        Raises:
            RowError: it is not an object, or one of the fields is missing, not a string or not valid Unicode.

        """
        if not isinstance(row, dict):
            field = self._field.fields[0]
            raise RowError(f" holds a JSON {type(row).__name__}, expected an object with a key {field!r}")
        if self._condition is not None and not meets(self._condition, lambda field: _or_none(lookup(row, field))):
            return ""
        values = [_string(row, field) for field in self._field.fields]
        if not self._field.is_template:
            return values[0]
        return fill_template(self._field.literals, values)


def fill_template(literals: tuple[str, ...], values: list[str]) -> str:
    """Return the text of a template; empty if all of its fields are."""
    if not any(values):
        return ""
    return "".join(part for pair in zip(literals, [*values, ""], strict=True) for part in pair)


def _or_none(value: Any) -> Any:
    return None if value is MISSING else value


def _string(row: dict[str, Any], field: str) -> str:
    value = row[field] if field in row else lookup(row, field)
    if value is MISSING:
        raise RowError(f" has no key {field!r}; {named(row, field, 'keys')}: set text_field to the text's")
    if not isinstance(value, str):
        raise RowError(f": {field!r} holds {type(value).__name__}, expected a string")
    try:
        value.encode()  # JSON escapes can spell half a surrogate pair, which no encoding can write
    except UnicodeEncodeError as error:
        raise RowError(f": {field!r} is not valid Unicode: {error}") from error
    return value


def named(names: Iterable[str], wanted: str, what: str) -> str:
    """Say which fields there are, and which of them may have been meant."""
    names = list(names)
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    listed = ", ".join(map(_shown, names[:_MOST_NAMES])) or "none"
    near = [_shown(name) for name in nearest(wanted, names)]
    return f"its {what} are {listed}{more}" + (f" (did you mean {near[0]}?)" if near else "")


def _shown(name: str) -> str:
    """A name on one line of a message; data may call a field anything."""
    cut = name if len(name) <= _MOST_LETTERS else name[:_MOST_LETTERS] + "..."
    return cut if cut.isprintable() else repr(cut)[1:-1]
