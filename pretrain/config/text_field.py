"""The value of `text_field`: the name of a field, or a template of several such as `"{title}\n\n{text}"`."""

import re
from dataclasses import dataclass
from functools import lru_cache

_PIECE = re.compile(r"\{\{|\}\}|\{[^{}]*\}|[{}]")


@dataclass(frozen=True, slots=True)
class TextField:
    """What a text is made of: a literal, a field, a literal, and so on, beginning and ending with a literal."""

    literals: tuple[str, ...]
    fields: tuple[str, ...]
    """Names of fields; one fewer than the literals. A dot leads into a nested field."""

    @property
    def is_template(self) -> bool:
        """Whether there is more to the text than one field."""
        return self.literals != ("", "")


@lru_cache(maxsize=64)
def parse_text_field(value: str) -> TextField:
    """Parse a `text_field`; a value without braces is the name of a field.

    Raises:
        ValueError: a brace is not closed, or a field is missing or holds more than a name.

    """
    if "{" not in value and "}" not in value:
        return TextField(("", ""), (value,))
    literals, fields, place = [""], [], 0
    for match in _PIECE.finditer(value):
        literals[-1] += value[place : match.start()]
        place = match.end()
        piece = match[0]
        if piece in ("{{", "}}"):
            literals[-1] += piece[0]
        elif len(piece) == 1:
            raise ValueError(
                f"has a single {piece!r} at character {match.start() + 1}; write {piece * 2!r} for a brace"
            )
        else:
            fields.append(_field(piece[1:-1]))
            literals.append("")
    literals[-1] += value[place:]
    if not fields:
        raise ValueError(f"{value!r} is a template without a field; name one, as in '{{text}}'")
    return TextField(tuple(literals), tuple(fields))


def _field(name: str) -> str:
    if not name or name != name.strip() or any(character in name for character in "[]!:"):
        raise ValueError(f"{{{name}}}: expected the name of a field and nothing else between the braces")
    return name
