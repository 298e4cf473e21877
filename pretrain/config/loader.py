"""YAML and command-line overrides into plain data.

PyYAML follows YAML 1.1: it reads ``3e-4`` as a string, ``1:30`` as 90, ``010`` as 8, ``no`` as false, and
silently keeps the last of two equal keys. This loader reads numbers and booleans as YAML 1.2 does (with ``_``
allowed between digits) and reports duplicates.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from pretrain.processes.errors import UserError
from pretrain.shipped import locate


class ConfigError(UserError):
    """Bad input in a config: every problem found, one message each.

    Attributes:
        problems: messages of the form ``section.key: what is wrong``.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars that collects duplicate keys instead of dropping them."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.duplicates: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen and key != "<<":
                self.duplicates.append(f"{key}: given twice, in lines {seen[key]} and {line}; keep one")
            seen[key] = line
        return super().construct_mapping(node, deep)


def _use_yaml_1_2_scalars() -> None:
    replaced = {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"}
    replaced |= {"tag:yaml.org,2002:timestamp"}
    _Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in replaced]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    add = _Loader.add_implicit_resolver
    add("tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
    add("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
    number = r"^[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?$"
    special = r"^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"
    add("tag:yaml.org,2002:float", re.compile(f"{number}|{special}"), list("-+.0123456789"))
    # Leading zeros are decimal in YAML 1.2; PyYAML's own constructors would read octal and base 60.
    _Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value.replace("_", "")))


_use_yaml_1_2_scalars()


def _parse(text: str) -> tuple[Any, list[str]]:
    loader = _Loader(text)
    try:
        return loader.get_single_data(), loader.duplicates
    finally:
        loader.dispose()


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, unreadable, not UTF-8, not YAML, no mapping, or gives a key twice.
    """
    try:
        text = Path(locate(str(path))).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such config file"]) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from None
    try:
        data, duplicates = _parse(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError([f"{path}: not valid YAML: {' '.join(str(error).split())}"]) from None
    problems = [f"{path}: {duplicate}" for duplicate in duplicates]
    if not isinstance(data, dict):
        problems.append(f"{path}: expected sections (model:, data:, ...), got {type(data).__name__}")
    if problems:
        raise ConfigError(problems)
    return data


def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Set ``section.key=value`` overrides in `data`, values read as YAML; returns the problems."""
    problems = []
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not all(path.split(".")):
            problems.append(f"{override}: expected an override of the form section.key=value")
            continue
        try:
            value, duplicates = _parse(text)
        except (yaml.YAMLError, RecursionError, ValueError):
            problems.append(f"{path}: the value {text!r} is not valid YAML")
            continue
        problems += [f"{path}: {duplicate}" for duplicate in duplicates]
        if problem := assign(data, path, value):
            problems.append(f"{path}: {problem}")
    return problems


def assign(data: Any, path: str, value: Any) -> str | None:
    """Put `value` at a dotted path, creating sections on the way; a number addresses a list's item.

    Returns what is wrong with the path, or None.
    """
    *parents, last = keys = path.split(".")
    if not all(keys):
        return "expected a key of the form section.key"
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
