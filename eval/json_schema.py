"""JSON Schemas of our files, made from the TypedDicts that document them.

The comment above a key becomes its description. Keys that are not declared are allowed, since later versions add some.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
import types
from typing import Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from eval.compare_schema import SCHEMA_VERSION as COMPARISON_VERSION
from eval.compare_schema import Comparison
from eval.schema import SCHEMA_VERSION, EvalResult

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}


def result_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of results.json."""
    return _schema(EvalResult, "Result of aurora eval", SCHEMA_VERSION)


def comparison_schema() -> dict[str, Any]:
    """Return the JSON Schema (draft 2020-12) of `aurora compare --format json`."""
    return _schema(Comparison, "Comparison of aurora compare", COMPARISON_VERSION)


def _schema(root: Any, title: str, version: int) -> dict[str, Any]:
    definitions: dict[str, Any] = {}
    whole = _mapping(root, definitions)
    whole["properties"]["schema_version"]["const"] = version
    return {"$schema": DIALECT, "title": title, **whole, "$defs": dict(sorted(definitions.items()))}


def _mapping(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    comments = _comments(kind)
    properties = {}
    for key, hint in hints.items():
        properties[key] = _of(hint, definitions)
        if key in comments:
            properties[key]["description"] = comments[key]
    return {
        "description": inspect.getdoc(kind) or "",
        "type": "object",
        "properties": properties,
        "required": [key for key in hints if key in kind.__required_keys__],
    }


def _of(hint: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is NotRequired:
        return _of(parts[0], definitions)
    if is_typeddict(hint):
        if hint.__name__ not in definitions:
            definitions[hint.__name__] = {}  # a type may contain itself
            definitions[hint.__name__] = _mapping(hint, definitions)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    if origin is Literal:
        return {"enum": list(parts)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of(part, definitions) for part in parts]}
    if origin is list:
        return {"type": "array", "items": _of(parts[0], definitions)}
    if origin is tuple:
        items = [_of(part, definitions) for part in parts]
        return {"type": "array", "prefixItems": items, "minItems": len(items), "maxItems": len(items)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(parts[1], definitions)}
    return {"type": _PLAIN[hint]}


def _comments(kind: Any) -> dict[str, str]:
    """The comment above each key of a TypedDict. A comment above several keys belongs to the first of them."""
    source = textwrap.dedent(inspect.getsource(kind))
    found: dict[str, str] = {}
    lines: list[str] = []
    for line in map(str.strip, source.splitlines()):
        name, colon, _ = line.partition(":")
        if line.startswith("#"):
            lines.append(line.removeprefix("#").strip())
            continue
        if colon and name.isidentifier() and lines:
            found[name] = " ".join(lines)
        lines = []
    # A TypedDict does not know which ones it extends; its source does.
    (declaration,) = ast.parse(source).body
    names = [base.id for base in getattr(declaration, "bases", []) if isinstance(base, ast.Name)]
    for base in (vars(sys.modules[kind.__module__]).get(name) for name in names):
        if is_typeddict(base):
            found = {**_comments(base), **found}
    return found
