"""Shared fixtures: small configs on the vendored text."""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from pretrain.config import Config, parse_config

# The same examples in every run: a failure is one of the change under test.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

# Started in the background or by `nohup`, the tests and all that they start would ignore these signals.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)

REPOSITORY = Path(__file__).parents[1]


# Tests that start processes or share a costly fixture.
FIRST = (
    *("tests/distributed/", "tests/processes/", "tests/test_sweep.py", "tests/docs/", "tests/packaging/"),
    *("tests/test_cli.py", "tests/test_shipped_run.py", "tests/golden/", "tests/checkpoint/", "tests/slurm/"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first: at the end, a worker without tests waits for a short one of the others."""
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    """A test that draws from torch's global generator draws the same numbers in every run."""
    torch.manual_seed(0)


TINY: dict[str, Any] = {
    "run": {"name": "tiny", "seed": 3},
    "model": {
        "vocab_size": 8192,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "context_length": 32,
        "tie_embeddings": True,
    },
    "tokenizer": {"path": str(REPOSITORY / "assets/tokenizer/tokenizer.json")},
    "data": {"sources": [{"path": str(REPOSITORY / "assets/corpus/moby_dick.parquet")}], "lanes": 4},
    "optimizer": {"name": "aurora", "polar": "svd", "lr": 0.02, "adamw": {"lr": 3e-3}},
    "train": {
        "total_tokens": 40 * 768,
        "global_batch_tokens": 768,  # 24 sequences: divides by 1, 2, 3 and 4 ranks
        "micro_batch_sequences": 6,
        "precision": "fp32",
    },
    "schedule": {"kind": "wsd", "warmup_tokens": 3 * 768},
    "checkpoint": {"save_every_steps": 1000},
}

# Makes a step of TINY take a third of its time, where nothing depends on how many tokens there are.
SMALL_VOCABULARY: dict[str, Any] = {
    "model.vocab_size": 2048,
    "tokenizer.path": str(REPOSITORY / "assets/tokenizer/tokenizer-2048.json"),
}

# The `model` section of a small speedrun model, in place of TINY's.
SPEEDRUN: dict[str, Any] = {
    "architecture": "speedrun",
    "vocab_size": 8192,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_layers": 3,
    "num_heads": 2,
    "num_kv_heads": 2,
    "context_length": 32,
    "rope_theta": 1024,
    "norm_eps": 1e-6,
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with dotted keys replaced."""
    data = copy.deepcopy(base)
    for path, value in copy.deepcopy(changes).items():
        *parents, last = path.split(".")
        section = data
        for key in parents:
            section = section.setdefault(key, {})
        section[last] = value
    return data


@pytest.fixture
def tiny_config(tmp_path: Path) -> Callable[..., Config]:
    """Builds a config whose run folder lies in tmp_path; dotted keys as ``{"train.compile": True}``."""

    def make(changes: dict[str, Any] | None = None) -> Config:
        return parse_config(merged(TINY, {"run.root": str(tmp_path / "runs"), **(changes or {})}))

    return make
