"""`where`: its grammar, and one meaning for rows of JSON and for columns of parquet."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from pretrain.config.data import DataConfig, SourceConfig
from pretrain.config.row_filter import (
    Comparison,
    Condition,
    IsNull,
    Junction,
    Membership,
    Not,
    condition_fields,
    parse_condition,
)
from pretrain.data import check_sources
from pretrain.data.json_fields import JsonRecipe
from pretrain.data.row_filter import mask, meets
from pretrain.data.units import TextRecipe

EDGES = [0, 1, -1, 2**53, 2**53 + 1, -(2**53) - 1, 2**63 - 1, -(2**63), 2**64, 10**400, 0.5, -0.0, 1e300, 2.0**63]
NUMBERS = st.sampled_from(EDGES) | st.integers(-3, 3) | st.sampled_from([0.5, 1.0, 2.5])
STRINGS = st.sampled_from(["", "a", "b", "é", "𝄞", "\uffff"])
LITERALS = NUMBERS | STRINGS | st.booleans()
FIELDS = st.sampled_from(
    ["whole", "small", "real", "single", "word", "flag", "empty", "list", "deep.x", "deep.y.z", "none"]
)
TESTS = (
    st.builds(Comparison, FIELDS, st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), NUMBERS | STRINGS)
    | st.builds(Comparison, FIELDS, st.sampled_from(["==", "!="]), st.booleans())
    | st.builds(Membership, FIELDS, st.lists(LITERALS, min_size=1, max_size=3).map(tuple), st.booleans())
    | st.builds(IsNull, FIELDS, st.booleans())
)
CONDITIONS: st.SearchStrategy[Condition] = st.recursive(
    TESTS,
    lambda inner: (
        st.builds(Not, inner)
        | st.builds(Junction, st.sampled_from(["and", "or"]), st.lists(inner, min_size=2, max_size=3).map(tuple))
    ),
    max_leaves=6,
)
SCHEMA = pa.schema(
    [
        ("whole", pa.int64()),
        ("small", pa.uint8()),
        ("real", pa.float64()),
        ("single", pa.float32()),
        ("word", pa.dictionary(pa.int32(), pa.string())),
        ("flag", pa.bool_()),
        ("empty", pa.null()),
        ("list", pa.list_(pa.int64())),
        ("deep", pa.struct([("x", pa.string_view()), ("y", pa.struct([("z", pa.int8())]))])),
    ]
)
WORDS = st.none() | st.sampled_from(["", "a", "b", "é", "𝄞", "\uffff"])
REALS = st.sampled_from([0.0, 0.5, 1.0, 2.0**53, 2.0**63, 1e300, float("inf"), float("nan")])
ROWS = st.fixed_dictionaries(
    {
        "whole": st.none()
        | st.sampled_from([edge for edge in EDGES if edge == int(edge) and abs(edge) < 2**63]).map(int),
        "small": st.none() | st.integers(0, 255),
        "real": st.none() | REALS,
        "single": st.none() | st.sampled_from([0.0, 0.5, 1.0, 2.5]),
        "word": WORDS,
        "flag": st.none() | st.booleans(),
        "empty": st.none(),
        "list": st.none() | st.lists(st.integers(0, 3), max_size=2),
        "deep": st.none()
        | st.fixed_dictionaries(
            {"x": WORDS, "y": st.none() | st.fixed_dictionaries({"z": st.none() | st.integers(-2, 2)})}
        ),
    }
)


def value_of(row: dict[str, Any], field: str) -> Any:
    for name in field.split("."):
        row = (row or {}).get(name)  # type: ignore[assignment]
    return row


@given(CONDITIONS, st.lists(ROWS, min_size=1, max_size=8))
def test_rows_and_columns_agree(condition: Condition, rows: list[dict[str, Any]]) -> None:
    batch = pa.RecordBatch.from_pylist(rows, SCHEMA)

    def column_of(field: str) -> Any:
        name, *inner = field.split(".")
        if name not in SCHEMA.names:
            return None
        return pa.compute.struct_field(batch.column(name), inner) if inner else batch.column(name)

    expected = [meets(condition, lambda field, row=row: value_of(row, field)) for row in rows]
    found = mask(condition, column_of, len(rows))
    assert found.null_count == 0
    assert found.to_pylist() == expected


@given(CONDITIONS)
def test_not_is_the_opposite(condition: Condition) -> None:
    row = {"whole": 1, "word": "a", "deep": {"x": None}}
    result = meets(condition, lambda field: value_of(row, field))
    assert meets(Not(condition), lambda field: value_of(row, field)) != result


ROW = {
    "language": "en",
    "score": 3.5,
    "n": None,
    "ok": True,
    "meta": {"a-b": 1},
    "odd name": "x",
    "tags": ["t"],
    "3": "3",
}
HOLDS = {
    'language == "en" and score >= 3': True,
    "language == 'en' and not (score < 3 or score is null)": True,
    "LANGUAGE == 'en'": False,
    "language == 'en' AND score > 3.4": True,
    "language == 'de' or score > 3 and ok == true": True,
    "(language == 'de' or score > 3) and ok == false": False,
    "language in ('de', 'en')": True,
    "language not in ('de')": True,
    "not language in ('de', \"en\")": False,
    "n == 1": False,
    "n != 1": False,
    "n not in (1)": False,
    "not n == 1": True,
    "n is null and gone is null": True,
    "n is not null": False,
    "score is not null": True,
    "score == '3.5'": False,
    "score != '3.5'": True,
    "language > 1": False,
    "ok == 1": False,
    "ok != 1": True,
    "tags == 't'": False,
    "tags != 't'": True,
    "tags is not null": True,
    "meta.a-b == 1": True,
    "meta.gone is null": True,
    "`odd name` == 'x'": True,
    "`3` == '3'": True,
    "score>=3.5and language=='en'": None,
    "score>=3.5 and language=='en'": True,
    "score == 35e-1": True,
    "score > -1": True,
    r"language == 'e\'n'": False,
}


@pytest.mark.parametrize(("text", "expected"), HOLDS.items())
def test_conditions_mean_what_they_say(text: str, expected: bool | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match="at character"):
            parse_condition(text)
        return
    row = {**ROW, "text": "yes"}
    assert (JsonRecipe(TextRecipe("text", text)).text(row) == "yes") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the name of a field, but it ends"),
        ("a", "expected a comparison, `in` or `is null`, but it ends"),
        ("a = 1", "write == to compare"),
        ("a == b", "expected a number, a string in quotes, true or false, got 'b'"),
        ("a == null", "write `is null`"),
        ("1 == a", "expected the name of a field, got '1'"),
        ("a == 1 b", "expected `and`, `or` or the end, got 'b'"),
        ("(a == 1", "expected `\\)`, but it ends"),
        ("a in ()", "expected a number"),
        ("a in (1", "expected `\\)`"),
        ("a not 1", "expected `in`, got '1'"),
        ("a is 1", "expected `null`"),
        ("a == 'x", 'cannot read "\'x"'),
        (r"a == '\q'", "unknown escape"),
        ("a == 1e999", "not a finite number"),
        ("a == 1x", "cannot read '1x'"),
        ("a < true", "have no order"),
        ("__import__('os').system('x')", "cannot read"),
        ("not " * 60 + "a == 1", "nested more than 50 deep"),
        ("(" * 60, "nested more than 50 deep"),
    ],
)
def test_a_condition_that_cannot_be_read_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SourceConfig(path="a.jsonl", where=text)


def test_the_fields_of_a_condition_are_named_once() -> None:
    assert condition_fields(parse_condition("a == 1 or not (b.c in (1) and a is null)")) == ("a", "b.c")


def test_a_config_without_where_is_dumped_as_before() -> None:
    assert "where" not in SourceConfig(path="a").model_dump()
    assert SourceConfig(path="a", where="b == 1").model_dump()["where"] == "b == 1"


def test_a_date_cannot_be_compared(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "day": pa.array([0], pa.date32())}), tmp_path / "a.parquet")
    source = SourceConfig(path=str(tmp_path / "a.parquet"), where="day == 'x'")
    [problem] = check_sources(DataConfig(sources=[source], lanes=1))
    assert "a.parquet: where compares 'day', which holds date32" in problem
    source = SourceConfig(path=str(tmp_path / "a.parquet"), where="day is not null")
    assert check_sources(DataConfig(sources=[source], lanes=1, validation_fraction=0.0)) == []
