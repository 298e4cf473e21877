"""YAML files into plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pretrain.config.errors import ConfigError
from pretrain.config.yaml_text import parse_yaml
from pretrain.shipped import locate


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        ConfigError: the file is missing, unreadable, not UTF-8, not YAML, not a mapping, or gives a key twice.
    """
    try:
        text = Path(locate(str(path))).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such config file"]) from None
    except (OSError, UnicodeDecodeError) as error:
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
