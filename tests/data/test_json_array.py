"""Elements of a JSON array are found wherever the chunks of the file end."""

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.data import json_array
from pretrain.data.json_array import ArrayError, elements

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('ab"\\[]{},: \n鯨', max_size=9)
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('"a,]', max_size=2), inner, max_size=3)
)


def split(text: bytes, chunk: int = 1 << 18, most: int = 1 << 20) -> list[bytes | None]:
    before, json_array._CHUNK_BYTES = json_array._CHUNK_BYTES, chunk
    try:
        return list(elements(io.BytesIO(text), most))
    finally:
        json_array._CHUNK_BYTES = before


@given(st.lists(VALUES, max_size=5), st.integers(1, 12), st.sampled_from([None, 1]), st.booleans())
def test_elements_are_those_that_json_finds(
    values: list[Any], chunk: int, indent: int | None, ascii_only: bool
) -> None:
    text = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode() + b"\r\n "
    assert [json.loads(element or b"") for element in split(text, chunk)] == values
    for cut in range(1, min(len(text.rstrip()), 6)):
        with pytest.raises(ArrayError, match="ends in the middle"):
            split(text.rstrip()[:-cut], chunk)


def test_an_element_between_two_commas_may_be_empty() -> None:
    assert split(b"[1,,2,]") == [b"1", b"", b"2", b""]
    assert split(b"[ ]") == []


def test_a_long_element_is_left_out_and_the_next_one_is_found() -> None:
    text = json.dumps(["a", "x" * 100, {"b": ["y" * 100]}, "c"]).encode()
    for chunk in (1, 7, 1 << 18):
        assert split(text, chunk, most=20) == [b'"a"', None, None, b'"c"']


def test_what_follows_the_array_is_an_error() -> None:
    with pytest.raises(ArrayError, match=r"b'\[.*' follows"):
        split(b"[1]\n[2]\n", chunk=2)
