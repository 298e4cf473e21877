"""YAML text to plain data and back.

PyYAML follows YAML 1.1: it reads ``3e-4`` as a string, ``1:30`` as 90, ``010`` as 8, ``no`` as false, and silently
keeps the last of two equal keys. This module reads numbers and booleans as YAML 1.2 does (with ``_`` allowed between
digits) and reports duplicates.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from pretrain.config.plain import walk


class _Loader(yaml.SafeLoader):
    """A SafeLoader for YAML 1.2 scalars that collects duplicate keys instead of dropping them."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.duplicates: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise yaml.constructor.ConstructorError(None, None, "expected a mapping", node.start_mark)
        seen: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = str(key_node.value), key_node.start_mark.line + 1
            if key in seen and key != "<<":
                self.duplicates.append(f"{key}: given twice, in lines {seen[key]} and {line}; keep one")
            seen[key] = line
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """A SafeDumper that quotes what either version of YAML would read as something other than text."""


_FIRST = {"bool": "tTfF", "int": "-+0123456789", "float": "-+.0123456789"}
_NUMBER = r"^[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9_]*)?)([eE][-+]?[0-9]+)?$"
_PATTERN = {
    "bool": re.compile(r"^(true|True|TRUE|false|False|FALSE)$"),
    "int": re.compile(r"^[-+]?[0-9][0-9_]*$"),
    "float": re.compile(rf"{_NUMBER}|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
}


def _use_yaml_1_2_scalars() -> None:
    replaced = {f"tag:yaml.org,2002:{kind}" for kind in (*_PATTERN, "timestamp")}
    _Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in replaced]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for kind, pattern in _PATTERN.items():
        for used in (_Loader, _Dumper):
            used.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", pattern, list(_FIRST[kind]))
    # Leading zeros are decimal in YAML 1.2; PyYAML's own constructors would read octal and base 60.
    _Loader.add_constructor("tag:yaml.org,2002:int", _number)
    _Loader.add_constructor("tag:yaml.org,2002:bool", _boolean)
    _Loader.add_constructor("tag:yaml.org,2002:float", _float)
    for kind in ("binary", "timestamp", "omap", "pairs", "set"):  # none of them is plain data
        _Loader.add_constructor(f"tag:yaml.org,2002:{kind}", _refuse)


def _refuse(loader: yaml.SafeLoader, node: yaml.Node) -> None:
    raise yaml.constructor.ConstructorError(None, None, f"{node.tag} is not plain data", node.start_mark)


def _number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(_matching(loader, node, "int").replace("_", ""))


def _boolean(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> bool:
    return _matching(loader, node, "bool").lower() == "true"


def _float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    _matching(loader, node, "float")
    return float(loader.construct_yaml_float(node))


def _matching(loader: yaml.SafeLoader, node: yaml.ScalarNode, kind: str) -> str:
    """The text of a scalar, which an explicit tag such as ``!!bool`` may have put on anything."""
    text = str(loader.construct_scalar(node))
    if not _PATTERN[kind].match(text):
        raise yaml.constructor.ConstructorError(None, None, f"{text!r} is not of type !!{kind}", node.start_mark)
    return text


_use_yaml_1_2_scalars()


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Escape Unicode's own line breaks, which PyYAML would write as they are and read back as a line feed."""
    style = '"' if set(text) & set("\x85\u2028\u2029") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def parse_yaml(text: str) -> tuple[Any, list[str]]:
    """Return the document in a text, and a message for each key that is given twice.

    Raises:
        yaml.YAMLError, RecursionError, ValueError: it is not YAML, or not plain data of a reasonable size.
    """
    loader = _Loader(text)
    try:
        data = loader.get_single_data()
        for _ in walk(data):
            pass
        return data, loader.duplicates
    finally:
        loader.dispose()


def dump_yaml(data: Any) -> str:
    """Return plain data as YAML that `parse_yaml` reads back to equal data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
