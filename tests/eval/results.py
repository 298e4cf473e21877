"""Made-up result files for tests of comparisons."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def a_result(
    outcomes: Mapping[str, Sequence[int]],
    name: str = "model",
    sources: Mapping[str, Sequence[str]] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """A result with the given outcomes by task; WinoGrande and MMLU have no acc_norm; elsewhere acc is 0."""
    tasks = {task: a_task(task, values, (sources or {}).get(task)) for task, values in outcomes.items()}
    return {
        "schema_version": 1,
        "model": {"source": "folder", "name": f"/models/{name}", "parameters": 10, "context_length": 128},
        "tasks": tasks,
        "items_source": {"kind": "packaged", "package": "made-up-1", "sha256": "0"},
        "num_fewshot": 0,
        "limit": None,
        "selection": "first",
        "batch_size": 32,
        "dtype": "float32",
        "device": "cpu",
        "seconds": 1.5,
        "date": "2026-11-26T00:00:00+00:00",
        "versions": {"lm_eval": "0.4.13"},
        **changes,
    }


def a_task(task: str, values: Sequence[int], sources: Sequence[str] | None) -> dict[str, Any]:
    has_norm = not task.startswith(("winogrande", "mmlu"))
    items: list[dict[str, Any]] = []
    for place, value in enumerate(values):
        item = {"doc_id": place, "doc_hash": f"{task}-{place}", "acc": 0 if has_norm else value}
        item |= {"acc_norm": value} if has_norm else {}
        item |= {"source": sources[place]} if sources else {}
        items.append(item)
    mean = sum(values) / len(values)
    return {
        "version": 1.0,
        "split": "validation",
        "num_items": len(items),
        "num_items_in_split": len(items),
        "acc": 0.0 if has_norm else mean,
        "acc_stderr": 0.01,
        **({"acc_norm": mean, "acc_norm_stderr": 0.01} if has_norm else {}),
        "num_truncated_requests": 0,
        "items": items,
    }


def a_group(result: Mapping[str, Any], tasks: Sequence[str]) -> dict[str, Any]:
    """The group of some tasks of a result, all of whose items count alike."""
    items = [item["acc"] for task in tasks for item in result["tasks"][task]["items"]]
    return {"tasks": [*tasks], "num_items": len(items), "acc": sum(items) / len(items), "acc_stderr": 0.03}


def write(folder: Path, result: Any) -> Path:
    """Write results.json; return its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(result if isinstance(result, str) else json.dumps(result), encoding="utf-8")
    return folder
