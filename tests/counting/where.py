"""The names of the code under test that the counting, mutation and golden tests need, in one place."""

from __future__ import annotations

import json
from typing import Any

from pretrain.cli import main
from pretrain.config import Config, load_config, parse_config
from pretrain.files import publish_folder
from pretrain.launch import train
from pretrain.model.cost import flops_per_token
from tests.conftest import SPEEDRUN, TINY, merged
from tests.distributed.ranks import run_ranks

__all__ = [
    "SPEEDRUN",
    "TINY",
    "Config",
    "configured",
    "flops_per_token",
    "load_config",
    "main",
    "merged",
    "metrics",
    "parse_config",
    "publish_folder",
    "run_ranks",
    "train",
]


def configured(root: str, changes: dict[str, Any]) -> Config:
    """The tiny config with dotted keys replaced, its run folder in `root`."""
    return parse_config(merged(TINY, {"run.root": root, **changes}))


def metrics(config: Config) -> list[dict[str, Any]]:
    """Every line of a run's metrics.jsonl."""
    return [json.loads(line) for line in (config.run_folder / "metrics.jsonl").read_text().splitlines()]
