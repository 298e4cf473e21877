"""Single keys of a config's plain data, set by their dotted path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from pretrain.config.plain import shown, text_problems
from pretrain.config.schema import is_section
from pretrain.config.yaml_text import parse_yaml
from pretrain.processes.redaction import redact

_MOST_PARTS = 16


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Set ``section.key=value`` overrides in `data`, with values read as YAML; return the problems."""
    problems = []
    for override in overrides:
        path, equals, text = override.partition("=")
        if of_text := text_problems([override]):
            problems += [f"{shown(path)}: {problem.partition(': ')[2]}" for problem in of_text]
            continue
        if not equals or not all(path.split(".")) or path.count(".") > _MOST_PARTS:
            problems.append(f"{redact(override[:200])}: expected an override of the form section.key=value")
            continue
        try:
            value, duplicates = parse_yaml(text)
        except (yaml.YAMLError, RecursionError, ValueError):
            problems.append(f"{path}: the value {redact(text[:200])!r} is not valid YAML")
            continue
        problems += [f"{path}: {duplicate}" for duplicate in duplicates]
        if problem := assign(data, path, value):
            problems.append(f"{path}: {problem}")
    return problems


def assign(data: Any, path: str, value: Any) -> str | None:
    """Put `value` at a dotted path, creating sections on the way; a number is the index of a list's item.

    Returns what is wrong with the path or the value, or None.
    """
    *parents, last = keys = path.split(".")
    if not all(keys):
        return "expected a key of the form section.key"
    if value is None and is_section(path):
        return f"an empty value would reset the whole section; set its keys ({path}.key=value), or write {path}={{}}"
    for depth, key in enumerate([*parents, last]):
        final = depth == len(parents)
        if isinstance(data, list):
            if not key.isdecimal() or int(key) >= len(data):
                return f"expected an index from 0 to {len(data) - 1}, got {key!r}"
            index: Any = int(key)
        elif isinstance(data, dict):
            index = key
            if not final and data.get(key) is None:
                data[key] = {}
        else:
            return f"{'.'.join(keys[:depth])} is a single value, not a section"
        if final:
            data[index] = value
        else:
            data = data[index]
    return None
