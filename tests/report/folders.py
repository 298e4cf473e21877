"""Made-up run and sweep folders in the formats that the trainer and the sweeps write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import save_file

from pretrain.config.model import ModelConfig
from pretrain.model.cost import parameter_count

CONFIG: dict[str, Any] = {
    "run": {"name": "made-up", "seed": 1},
    "model": {
        "vocab_size": 8192,
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_layers": 4,
        "num_heads": 4,
        "num_kv_heads": 4,
        "tie_embeddings": True,
    },
    "optimizer": {"name": "muon", "lr": 0.02},
    "train": {"total_tokens": 500 * 4096, "global_batch_tokens": 4096},
}
LAUNCH: dict[str, Any] = {
    "time": "2026-11-24T10:00:00+00:00",
    "git_commit": "0123456789abcdef0123456789abcdef01234567",
    "python": "3.11.9",
    "packages": {"torch": "2.13.0"},
    "hardware": {"processor": "AMD EPYC", "cores": 2, "threads": 1},
    "from_step": 0,
    "world_size": 1,
    "device": "cpu",
    "precision": "fp32",
}
BASELINE = {"optimizer": "muon"}


def records(
    steps: int, *, loss: float = 4.5, dead: float = 0.2, seconds: float = 1.0, seed: int = 0
) -> list[dict[str, Any]]:
    """One record a step, validated and measured every 50 steps: loss falls to `loss`, dead rows rise to `dead`."""
    rng = np.random.default_rng(seed)
    found = []
    for step in range(1, steps + 1):
        part = step / steps
        level = loss + 4 * float(np.exp(-6 * part))
        record: dict[str, Any] = {
            "step": step,
            "tokens": 4096 * step,
            "loss": level + 0.1 * float(rng.standard_normal()),
            "lr": 0.02,
            "grad_norm": 1.0,
            "tokens_per_second": 4096 / seconds,
            "step_seconds": seconds,
            "data_seconds": 0.02 * seconds,
            "forward_backward_seconds": 0.75 * seconds,
            "optimizer_seconds": 0.2 * seconds,
            "cpu_seconds": 0.99 * seconds,
            "train_seconds": seconds * step,
        }
        if step % 50 == 0 or step == steps:
            record |= {"validation_loss": level, "validation_bits_per_byte": level / 3}
            record |= {f"telemetry/{key}": value for key, value in telemetry(dead * part).items()}
        found.append(record)
    return found


def telemetry(dead: float) -> dict[str, float | None]:
    """The measured keys that the report reads, and some that it does not."""
    return {
        "leverage_dead": dead,
        "starved": dead,
        "activation_dead": dead / 3,
        "dead_forever": None,
        "down_proj/leverage_cv": 0.3 + dead,
        "down_proj/direction_cv": 0.2 + dead,
        "layers.0.gate_proj/leverage_dead": dead,
        "seconds": 0.1,
    }


def write_run(
    folder: Path,
    rows: Sequence[Mapping[str, Any]],
    *,
    config: Mapping[str, Any] | None = None,
    launches: Sequence[Mapping[str, Any]] = (LAUNCH,),
    finished: bool = True,
    arrays: Sequence[int] = (),
    layers: int = 2,
) -> Path:
    """A run folder; `arrays` are the steps with telemetry arrays of so many layers."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = {**CONFIG, **(config or {})}
    train, model = whole["train"], ModelConfig.model_validate({"context_length": 32, **whole["model"]})
    manifest: dict[str, Any] = {
        "run": folder.name,
        "parameters": parameter_count(model),
        "total_steps": train["total_tokens"] // train["global_batch_tokens"],
        "launches": list(launches),
    }
    if finished:
        manifest["finished"] = {"step": rows[-1]["step"], "time": "2026-11-24T11:00:00+00:00"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "config.yaml").write_text(yaml.safe_dump(whole))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in arrays:
        write_arrays(folder, step, step / 500, layers)
    return folder


def write_arrays(folder: Path, step: int, spread: float, layers: int, rows: int = 64) -> None:
    """Log-normal leverages whose spread grows, the same neurons always lowest."""
    (folder / "telemetry").mkdir(exist_ok=True)
    arrays = {}
    for layer in range(layers):
        rng = np.random.default_rng(layer)
        for matrix in ("gate_proj", "up_proj", "down_proj"):
            raw = np.exp(2.0 * spread * rng.standard_normal(rows))
            arrays[f"layers.{layer}.{matrix}.leverage"] = (raw / raw.mean()).astype(np.float32)
            arrays[f"layers.{layer}.{matrix}.direction"] = (raw / raw.mean()).astype(np.float32)
        arrays[f"layers.{layer}.activation"] = np.ones(rows, dtype=np.float32)
    save_file(arrays, folder / "telemetry" / f"step-{step:08d}.safetensors")


def job(
    run: str, labels: Mapping[str, str], tuned: Mapping[str, Any] | None = None, chosen: bool = True
) -> dict[str, Any]:
    """An entry of a sweep's jobs."""
    return {"run": f"../../{run}", "labels": dict(labels), "tuned": dict(tuned or {}), "chosen": chosen}


def write_sweep(
    root: Path, axes: Mapping[str, Sequence[str]], jobs: Sequence[Mapping[str, Any]], /, **changes: Any
) -> Path:
    """A sweep folder `root`/sweeps/made-up; the runs lie in `root`."""
    folder = root / "sweeps" / "made-up"
    folder.mkdir(parents=True, exist_ok=True)
    data = {
        "format": "aurora-sweep",
        "version": 1,
        "name": "made-up",
        "title": "A made-up sweep",
        "question": "Does it work?",
        "source": "configs/experiments/made-up.yaml",
        "overrides": {"train.total_tokens": 2048000},
        "axes": {axis: list(labels) for axis, labels in axes.items()},
        "seed_axis": "seed" if "seed" in axes else None,
        "baseline": BASELINE if "optimizer" in axes else None,
        "claims": [],
        "jobs": list(jobs),
    }
    (folder / "sweep.json").write_text(json.dumps({**data, **changes}))
    return folder
