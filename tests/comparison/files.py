"""Made-up configs, facts and results for tests of the comparison page."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.eval.results import a_result, write

SOURCES = {
    "card": {"text": "The card", "url": "https://example.org/card", "read": "2026-11-26"},
    "plot": {"text": "The plot", "read": "2026-11-25", "how": "read off"},
}
FACTS: dict[str, Any] = {
    "title": "Small models",
    "question": "Which is better?",
    "sources": SOURCES,
    "models": {
        "ours": {
            "optimizer": "Aurora",
            "tokens": {"value": 1e11, "source": "card"},
            "parameters_without_embeddings": {"value": 1e9, "source": "card"},
            "published": [
                {"task": "hellaswag", "value": 0.676, "metric": "unknown", "shots": 0, "harness": "x", "source": "card"}
            ],
        },
        "theirs": {
            "optimizer": "AdamW",
            "tokens": {"value": 36e12, "source": "card"},
            "licence": {"name": "MIT", "source": "card"},
            "shape": {
                "vocab_size": 1000,
                "hidden_size": 64,
                "intermediate_size": 256,
                "num_layers": 2,
                "num_heads": 4,
                "num_kv_heads": 2,
                "tie_embeddings": True,
                "training_sequence": 128,
                "source": "card",
            },
            "published": [
                {"task": "hellaswag", "value": 0.646, "metric": "acc", "shots": 0, "harness": "x", "source": "card"}
            ],
        },
    },
    "claims": [{"text": "As good with less", "ratio": 100, "source": "card", "subject": "ours", "reference": "theirs"}],
    "by_data": [
        {
            "name": "ref 1B",
            "optimizer": "AdamW",
            "parameters": 1e9,
            "tokens": 3e11,
            "source": "plot",
            "task": "hellaswag",
            "metric": "acc_norm",
            "shots": 0,
            "plus_minus": 0.003,
            "scores": {"good text": 0.685, "nearly": 0.678, "bad text": 0.627},
        }
    ],
    "by_tokens": [
        {
            "name": "long 1B",
            "optimizer": "AdamW",
            "parameters": 1e9,
            "source": "card",
            "data": "one text",
            "task": "hellaswag",
            "metric": "acc_norm",
            "shots": 0,
            "points": [
                {"tokens": tokens, "value": 1 - 0.6 * (tokens / 1e11) ** -0.1, "source": "card"}
                for tokens in (1e11, 3e11, 1e12, 3e12)
            ],
        }
    ],
}
MODELS = {"ours": "runs/ours", "theirs": "org/theirs", "third": "org/third"}


def facts(**changes: Any) -> dict[str, Any]:
    """FACTS, with dotted keys set, or removed if the value is `...`."""
    data = copy.deepcopy(FACTS)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place: Any = data
        for key in parents:
            place = place[int(key) if key.isdecimal() else key]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return data


def write_files(root: Path, found: Mapping[str, Any] | None = None, models: Mapping[str, str] = MODELS) -> Path:
    """Write config and facts below `root`; return the config."""
    config = root / "page.yaml"
    entries = [{"label": label, "model": model} for label, model in models.items()]
    config.write_text(yaml.safe_dump({"models": entries, "tasks": ["hellaswag"]}, sort_keys=False))
    if found is not None:
        (root / "facts").mkdir(exist_ok=True)
        (root / "facts/page.yaml").write_text(yaml.safe_dump(dict(found), sort_keys=False, allow_unicode=True))
    return config


def outcomes(items: int, share: float, seed: int) -> list[int]:
    """Random outcomes of which about `share` are right."""
    generator = random.Random(seed)
    return [int(generator.random() < share) for _ in range(items)]


def write_result(root: Path, label: str, scores: Mapping[str, Sequence[int]], name: str, **changes: Any) -> Path:
    """Write LABEL/results.json below `root` with outcomes by task, of a model called `name`."""
    result = a_result(scores)
    result["model"]["name"] = name
    result["model"]["source"] = "folder" if name.startswith("runs/") else "hub"
    result["model"].update(changes.pop("model", {}))
    result.update(changes)
    return write(root / label, result)
