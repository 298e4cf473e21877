"""Plain data before it is validated: what may be nested in it, and which texts and numbers no key can have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pretrain.processes.redaction import holds_secret

_MOST_LEVELS = 32
_MOST_VALUES = 100_000
"""More than any config has; a few lines of YAML aliases can stand for more than any memory holds."""
_WHOLE_NUMBERS = 1 << 63
_SCALARS = (str, bool, int, float, type(None))


def walk(data: Any) -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of everything in plain data that is not a mapping or a list; keys as well.

    Raises:
        ValueError: it is nested too deeply, perhaps within itself, or too large, or is not plain.
    """
    todo: list[tuple[str, Any, int]] = [("", data, 0)]
    seen = 0
    while todo:
        path, value, level = todo.pop()
        seen += 1
        if level > _MOST_LEVELS:
            raise ValueError(f"{shown(path)}: nested in more than {_MOST_LEVELS} levels")
        if seen + len(todo) > _MOST_VALUES:
            raise ValueError(f"more than {_MOST_VALUES:,} values, counting each alias with all that it stands for")
        if isinstance(value, dict):
            for key, inner in reversed(value.items()):
                if not isinstance(key, _SCALARS):
                    raise ValueError(f"{shown(path)}: expected text as a key, got a {type(key).__name__}")
                below = f"{path}.{key}" if path else str(key)
                todo.append((below, inner, level + 1))
                if isinstance(key, str):
                    yield path, key
        elif isinstance(value, list | tuple):
            todo += [(f"{path}.{index}" if path else str(index), one, level + 1) for index, one in enumerate(value)]
        elif isinstance(value, _SCALARS):
            yield path, value
        else:
            raise ValueError(f"{shown(path)}: expected text, a number, a boolean or null, got a {type(value).__name__}")


def text_problems(data: Any) -> list[str]:
    """Return a message for each text that cannot be stored, printed or passed to a library.

    Raises:
        ValueError: see `walk`.
    """
    found = ((path, _text_problem(value)) for path, value in walk(data) if isinstance(value, str))
    return [f"{shown(path)}: {problem}" for path, problem in found if problem]


def value_problems(data: Any) -> Iterator[tuple[str, str]]:
    """Yield the path of each value that no key can have, or that must not be stored, and what is wrong."""
    for path, value in walk(data):
        if isinstance(value, str) and holds_secret(value):
            yield path, "holds a password, a token or a signature, which would be stored with the run; remove it"
        elif isinstance(value, int) and not -_WHOLE_NUMBERS <= value < _WHOLE_NUMBERS:
            yield path, "expected a whole number below 2^63, got a larger one"


def _text_problem(text: str) -> str | None:
    if "\0" in text:
        return "holds the character NUL, which no path and no prompt can have"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"is not text: character {error.start + 1} is a lone surrogate, or was not UTF-8"
    return None


def shown(path: str) -> str:
    """Return a path for a message, in which every character can be printed."""
    return path.encode(errors="backslashreplace").decode()[:200] or "the whole"
