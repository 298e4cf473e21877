"""Faults of a tokenizer that would only show in the middle of a run, or not at all."""

import json
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer

# Every byte that occurs in UTF-8: all characters of one or two bytes, and one for each first byte of three or four.
_EVERY_BYTE = [
    *map(chr, range(0x800)),
    *(chr(max(0x800, first << 12)) for first in range(16)),
    *(chr(max(0x10000, first << 18)) for first in range(5)),
]


def ids_or_none(tokenizer: Tokenizer, text: str) -> list[int] | None:
    """Return the ids of a text; None if it cannot be encoded."""
    try:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)
    except Exception:  # the library raises plain Exception
        return None


def random_part(tokenizer: Tokenizer) -> str | None:
    """Return the setting in a `tokenizer.json` that makes two encodings of a text differ; None if there is none."""
    model = tokenizer.model
    if dropout := getattr(model, "dropout", None):
        return f"model.dropout {dropout:g}"
    # Unigram draws among the best segmentations; with a size of 0 or 1 there is only one to draw from.
    alpha, best = getattr(model, "alpha", None), getattr(model, "nbest_size", None)
    if alpha is not None and best is not None and best not in (0, 1):
        return f"model.nbest_size {best}"
    return None


def gives_separator_for_unknown(tokenizer: Tokenizer, separator: int) -> bool:
    """Return whether the token of unknown characters is the separator, and some character is unknown.

    A byte-level vocabulary knows every character, whatever it declares.
    """
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    unknown = model.get("unk_id")
    if isinstance(model.get("unk_token"), str):
        unknown = tokenizer.token_to_id(model["unk_token"])
    if unknown != separator:
        return False
    # Alone and within a word: a pre-tokenizer may treat them differently.
    return any(
        separator in (ids_or_none(tokenizer, text) or ()) for letter in _EVERY_BYTE for text in (letter, f"a{letter}")
    )


def lost_characters(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """Return the characters of some texts for which the tokenizer gives no token, not even one for unknown characters.

    White space is not counted: some tokenizers leave it out on purpose.
    """
    letters = sorted({letter for text in texts for letter in text if not letter.isspace()})
    return [letter for letter in letters if ids_or_none(tokenizer, letter) == []]
