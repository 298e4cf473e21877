"""The meaning of `where`, for one row and for a batch of columns; a test holds the two together.

Every test of a field is true or false, so `not` is its opposite. A field that is missing or null meets only `is null`
and the negation of other tests: `x != 3` and `x not in (3)` are false where x is null. A value of another kind than
the literal (strings, numbers, and true and false are three kinds; lists and objects belong to none) is different
from it, and neither smaller nor larger. Numbers are compared exactly, whatever their type, and strings by code point.
"""

import math
import operator as operators
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pretrain.config.row_filter import Condition, IsNull, Junction, Membership, Not, Operator, Value

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "<": operators.lt,
    "<=": operators.le,
    ">": operators.gt,
    ">=": operators.ge,
}
_COMPARE_ARRAYS: dict[str, Callable[[Any, Any], Any]] = {
    "==": pc.equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


def meets(condition: Condition, value_of: Callable[[str], Any]) -> bool:
    """Return whether a row meets a condition.

    Args:
        condition: the condition.
        value_of: returns the value of a field as JSON gives it; None if it is null or missing.

    """
    if isinstance(condition, Not):
        return not meets(condition.operand, value_of)
    if isinstance(condition, Junction):
        combine = all if condition.operator == "and" else any
        return combine(meets(operand, value_of) for operand in condition.operands)
    value = value_of(condition.field)
    if isinstance(condition, IsNull):
        return (value is None) != condition.negated
    if value is None:
        return False
    if isinstance(condition, Membership):
        return any(_equal(value, one) for one in condition.values) != condition.negated
    if condition.operator in ("==", "!="):
        return _equal(value, condition.value) == (condition.operator == "==")
    return _kind(value) == _kind(condition.value) and _COMPARE[condition.operator](value, condition.value)


def _equal(value: Any, literal: Value) -> bool:
    return _kind(value) == _kind(literal) and bool(value == literal)


def _kind(value: Any) -> str | None:
    if isinstance(value, bool):
        return "truth"
    if isinstance(value, int | float):
        return "number"
    return "string" if isinstance(value, str) else None


def mask(condition: Condition, column_of: Callable[[str], Any], rows: int) -> Any:
    """Return whether each row of a batch meets a condition: a boolean array [rows] without nulls.

    Args:
        condition: the condition.
        column_of: returns the column of a field, [rows]; None if there is no such column.
        rows: their number.

    Raises:
        ValueError: a column holds something that JSON has no equal of, such as a date, and is not only tested for null.

    """
    if isinstance(condition, Not):
        return pc.invert(mask(condition.operand, column_of, rows))
    if isinstance(condition, Junction):
        combine = pc.and_ if condition.operator == "and" else pc.or_
        first, *others = (mask(operand, column_of, rows) for operand in condition.operands)
        for other in others:
            first = combine(first, other)
        return first
    column = column_of(condition.field)
    if column is None:
        column = pa.nulls(rows)
    if isinstance(condition, IsNull):
        return column.is_valid() if condition.negated else column.is_null()
    column = _comparable(column, condition.field)
    if isinstance(condition, Membership):
        found = _mask_of(column, "==", condition.values[0])
        for value in condition.values[1:]:
            found = pc.or_(found, _mask_of(column, "==", value))
        return pc.and_(column.is_valid(), pc.invert(found)) if condition.negated else found
    return _mask_of(column, condition.operator, condition.value)


def _comparable(column: Any, field: str) -> Any:
    """Return the column in a type that `_mask_of` knows."""
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if pa.types.is_string_view(kind) or pa.types.is_string(kind):
        return column.cast(pa.large_string())
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return column.cast(pa.float64())
    known = (pa.types.is_large_string, pa.types.is_boolean, pa.types.is_integer, pa.types.is_null, pa.types.is_nested)
    if not any(is_kind(kind) for is_kind in known):
        raise ValueError(
            f"where compares {field!r}, which holds {kind}: only strings, numbers and true or false can be compared"
        )
    return column


def _mask_of(column: Any, operator: Operator, literal: Value) -> Any:
    """Return whether each value is not null and compares so; `column` is one of `_comparable`."""
    if operator == "!=":
        return pc.and_(column.is_valid(), pc.invert(_mask_of(column, "==", literal)))
    kind, of_literal = column.type, _kind(literal)
    if pa.types.is_integer(kind) and of_literal == "number":
        return _mask_of_integers(column, operator, literal)  # type: ignore[arg-type]
    if pa.types.is_floating(kind) and of_literal == "number":
        return _mask_of_floats(column, operator, literal)  # type: ignore[arg-type]
    same = (pa.types.is_boolean(kind) and of_literal == "truth") or (
        pa.types.is_large_string(kind) and of_literal == "string"
    )
    if not same:
        return _constant(column, False)
    return _filled(_COMPARE_ARRAYS[operator](column, pa.scalar(literal, kind)))


def _mask_of_integers(column: Any, operator: Operator, literal: int | float) -> Any:
    """Compare with the nearest integer that gives the same result, since Arrow would round both to float64."""
    bits, signed = column.type.bit_width, pa.types.is_signed_integer(column.type)
    least, most = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    if operator == "==" and math.floor(literal) != literal:
        return _constant(column, False)
    bound = math.ceil(literal) if operator in ("<", ">=") else math.floor(literal)
    if not least <= bound <= most:
        smaller = bound > most  # than the bound are all values
        return _constant(column, operator != "==" and smaller == (operator in ("<", "<=")))
    return _filled(_COMPARE_ARRAYS[operator](column, pa.scalar(bound, column.type)))


def _mask_of_floats(column: Any, operator: Operator, literal: int | float) -> Any:
    """Compare with the nearest float; an integer that is no float lies between two of them."""
    try:
        nearest = float(literal)
    except OverflowError:
        nearest = math.copysign(math.inf, literal)
    if nearest != literal:
        if operator == "==":
            return _constant(column, False)
        if operator in ("<", "<="):
            operator = "<" if nearest > literal else "<="
        else:
            operator = ">=" if nearest > literal else ">"
    return _filled(_COMPARE_ARRAYS[operator](column, pa.scalar(nearest, pa.float64())))


def _filled(found: Any) -> Any:
    return pc.fill_null(found, False)


def _constant(column: Any, value: bool) -> Any:
    """Return `value` for every value that is not null, and false for null."""
    return column.is_valid() if value else pa.repeat(pa.scalar(False), len(column))
