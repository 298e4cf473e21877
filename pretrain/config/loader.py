"""YAML files into plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pretrain.config.errors import ConfigError
from pretrain.config.yaml_text import parse_yaml
from pretrain.files import read_limited
from pretrain.shipped import locate

_MOST_BYTES = 16 << 20
INCLUDE = "include"
"""The key of a config file that names another one, relative to its own folder."""


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, with the sections of the file that its key `include` names.

    Where both files have a section, its keys are joined, and those of the file that includes take precedence.

    Raises:
        ConfigError: a file is missing, unreadable, not UTF-8, not YAML, not a mapping, or gives a key twice; or the
            included file includes another one.
    """
    found = Path(locate(str(path)))
    data = _read_one(found, path)
    if INCLUDE not in data:
        return data
    name = data.pop(INCLUDE)
    if not isinstance(name, str) or not name:
        raise ConfigError([f"{path}: {INCLUDE}: expected the path of a YAML file, got {name!r}"])
    included = _read_one(found.parent / name, found.parent / name)
    if INCLUDE in included:
        raise ConfigError([f"{found.parent / name}: {INCLUDE}: an included file cannot include another one"])
    for section, keys in included.items():
        own = data.get(section, {})
        both = isinstance(own, dict) and isinstance(keys, dict)
        data[section] = {**keys, **own} if both else data.get(section, keys)
    return data


def _read_one(found: Path, path: Path) -> dict[str, Any]:
    """The mapping in the file `found`, which messages call `path`."""
    try:
        text = read_limited(found, _MOST_BYTES).decode()
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such config file"]) from None
    except (OSError, ValueError) as error:
        raise ConfigError([f"{path}: cannot be read: {error}"]) from None
    try:
        data, duplicates = parse_yaml(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError([f"{path}: not valid YAML: {' '.join(str(error).split())}"]) from None
    problems = [f"{path}: {duplicate}" for duplicate in duplicates]
    if not isinstance(data, dict):
        problems.append(f"{path}: expected sections (model:, data:, ...), got {type(data).__name__}")
    if problems:
        raise ConfigError(problems)
    return data
