"""Train a fixed set of small runs and record what they leave behind, to compare two commits bit by bit.

    python tests/recorded/record.py OUT.json [--only RUN ...]    record the code of the working directory
    python tests/recorded/record.py --as-before OUT.json ...     the same, without the changes of `before.py`
    python tests/recorded/record.py --compare A.json B.json      print what differs; exit 1 if anything does

A record holds the sha256 of every tensor and random generator in each run's last checkpoint, and every field of
metrics.jsonl that is not a timing. Two commits that compute the same give equal records on the same machine.

The script does not import the code under test: it starts the command in a new process and reads checkpoints itself.
To record another commit, start it in the root of a checkout of that commit, with that checkout's environment.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

TIMINGS = ("seconds", "tokens_per_second", "mfu")
"""Endings of the metric keys that differ from run to run."""

PYTHONPATH = [str(Path.cwd())]
"""Of the processes that train."""

CORPUS, TOKENIZERS = Path("assets/corpus").resolve(), Path("assets/tokenizer").resolve()

BASE: dict[str, Any] = {
    "run": {"seed": 3},
    "model": {
        "vocab_size": 2048,
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_layers": 2,
        "num_heads": 2,
        "num_kv_heads": 1,
        "context_length": 32,
        "tie_embeddings": True,
    },
    "tokenizer": {"path": str(TOKENIZERS / "tokenizer-2048.json")},
    "data": {"sources": [{"path": str(CORPUS / "moby_dick.parquet")}], "lanes": 4},
    "optimizer": {"name": "aurora", "lr": 0.02, "adamw": {"lr": 3e-3}},
    "train": {
        "total_tokens": 8 * 384,
        "global_batch_tokens": 384,
        "micro_batch_sequences": 2,
        "precision": "fp32",
        "grad_clip": 0.5,
    },
    "schedule": {"kind": "wsd", "warmup_tokens": 2 * 384},
    "checkpoint": {"save_every_steps": 1000},
    "validation": {"every_steps": 4, "max_tokens": 4096},
    "telemetry": {"every_steps": 4, "reference_step": 4, "activation_sequences": 2},
}
SPEEDRUN = {
    "model.architecture": "speedrun",
    "model.num_kv_heads": 2,
    "model.tie_embeddings": None,
    "model.rope_theta": 1024,
    "model.norm_eps": 1e-6,
}
ZERO = {"engine.kind": "deepspeed"}

# Name: the changes to BASE, and the options of each launch.
RUNS: dict[str, tuple[dict[str, Any], list[list[str]]]] = {
    "plain-1": ({}, [[]]),
    "plain-2": ({}, [["--processes", "2"]]),
    "zero1-1": (ZERO | {"engine.zero_stage": 1}, [[]]),
    "zero1-2": (ZERO | {"engine.zero_stage": 1}, [["--processes", "2"]]),
    "zero3-2": (ZERO | {"engine.zero_stage": 3, "optimizer.name": "normuon"}, [["--processes", "2"]]),
    "zero1-2-bf16": (ZERO | {"engine.zero_stage": 1, "train.precision": "bf16"}, [["--processes", "2"]]),
    "riemannian_aurora": ({"optimizer.name": "riemannian_aurora"}, [[]]),
    "muon": ({"optimizer.name": "muon", "train.precision": "bf16"}, [[]]),
    "normuon": ({"optimizer.name": "normuon"}, [[]]),
    "u_normuon": ({"optimizer.name": "u_normuon"}, [[]]),
    "adamw": ({"optimizer.name": "adamw", "optimizer.lr": None}, [[]]),
    "released": ({"optimizer.preset": "released"}, [[]]),
    "speedrun": (
        SPEEDRUN
        | {"optimizer.contra": 0.2, "optimizer.uw_floor": 0.35, "optimizer.cautious": True}
        | {"optimizer.weight_decay": 0.1},
        [[]],
    ),
    "resumed": ({}, [["--stop-at", "3"], ["--stop-at", "5"], []]),
    "resumed-zero": (ZERO | {"engine.zero_stage": 3}, [["--stop-at", "3", "--processes", "2"], ["--processes", "2"]]),
}
SWEEP = {
    "name": "two",
    "base": "base.yaml",
    "root": "runs",
    "axes": {
        "optimizer": {"muon": {"optimizer.name": "muon"}, "aurora": {"optimizer.name": "aurora"}},
        "seed": {1: {"run.seed": 1}},
    },
}


def merged(changes: dict[str, Any]) -> dict[str, Any]:
    """BASE with the given `section.key` replaced, or removed where the value is None."""
    data = copy.deepcopy(BASE)
    for path, value in changes.items():
        section, key = path.split(".")
        if value is None:
            data[section].pop(key, None)
        else:
            data.setdefault(section, {})[key] = value
    return data


def aurora(arguments: list[str], folder: Path) -> None:
    """Run the working directory's `python -m pretrain` in `folder`.

    Raises:
        SystemExit: with its output, if it ends with another exit code than 0 (done) or 75 (stopped as asked).
    """
    own = {"PYTHONPATH": os.pathsep.join(PYTHONPATH), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "pretrain", *arguments]
    done = subprocess.run(command, cwd=folder, env=os.environ | own, capture_output=True, text=True, check=False)
    if done.returncode not in (0, 75):
        raise SystemExit(f"aurora {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")


def sha256(values: torch.Tensor) -> str:
    """The digest of a tensor's bytes."""
    return hashlib.sha256(values.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def tensors(checkpoint: Path) -> dict[str, str]:
    """The digest of every tensor of a checkpoint by parameter and slot, put together from its fragments."""
    index = json.loads((checkpoint / "index.json").read_text())
    found = {}
    for name, slots in index["parameters"].items():
        for slot, record in slots.items():
            parts = []
            for fragment in sorted(record["fragments"], key=lambda f: f["start"]):
                with safe_open(checkpoint / fragment["file"], framework="pt") as file:
                    parts.append(file.get_tensor(f"{name}:{slot}:{fragment['start']}").reshape(-1))
            found[f"{name} {slot}"] = sha256(torch.cat(parts))
    return found


def generators(checkpoint: Path) -> dict[str, str]:
    """The digest of every random generator of every rank."""
    found = {}
    for path in sorted(checkpoint.glob("rng-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                found[f"{path.stem} {key}"] = sha256(file.get_tensor(key))
    return found


def outcome(run: Path) -> dict[str, Any]:
    """What a run left behind: digests of its newest checkpoint, and its metrics without timings."""
    newest = max((run / "checkpoints").glob("step-????????"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "tensors": tensors(newest),
        "generators": generators(newest),
        "metrics": [{key: value for key, value in line.items() if not key.endswith(TIMINGS)} for line in lines],
    }


def train(name: str, folder: Path) -> dict[str, Any]:
    """Train one of RUNS in `folder`; its outcome."""
    changes, launches = RUNS[name]
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(merged({"run.name": name, **changes})))
    for options in launches:
        aurora(["train", f"{name}.yaml", *options], folder)
    return outcome(folder / "runs" / name)


def sweep(folder: Path) -> dict[str, dict[str, Any]]:
    """Run SWEEP in `folder`; the outcome of each job."""
    (folder / "base.yaml").write_text(yaml.safe_dump(merged({"run.name": "base"})))
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
    aurora(["sweep", "sweep.yaml", "--jobs", "1"], folder)
    root = folder / "runs/sweeps/two"
    jobs = json.loads((root / "sweep.json").read_text())["jobs"]
    return {f"sweep {job['labels']}": outcome(root / job["run"]) for job in jobs}


def record(names: list[str]) -> dict[str, Any]:
    """The outcomes of the named runs; of all if none is named."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="recorded-") as scratch:
        for name in names or [*RUNS, "sweep"]:
            print(name, file=sys.stderr, flush=True)
            found |= sweep(Path(scratch)) if name == "sweep" else {name: train(name, Path(scratch))}
    return found


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """What differs between two records, one line each."""
    lines = []
    for name in first.keys() | second.keys():
        if name not in first or name not in second:
            lines.append(f"{name}: only in one of them")
            continue
        for part in ("tensors", "generators"):
            lines += [f"{name}: {part} {key}" for key in _unequal(first[name][part], second[name][part])]
        one, other = first[name]["metrics"], second[name]["metrics"]
        if len(one) != len(other):
            lines.append(f"{name}: {len(one)} and {len(other)} metric lines")
        for a, b in zip(one, other, strict=False):
            lines += [f"{name}: step {a['step']} {key}: {a.get(key)} and {b.get(key)}" for key in _unequal(a, b)]
    return sorted(lines)


def _unequal(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """The keys whose values differ or that only one of them has."""
    return [key for key in first.keys() | second.keys() if first.get(key) != second.get(key)]


def main() -> int:
    """Record, or compare two records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="compare two records instead")
    parser.add_argument("--as-before", action="store_true", help="as commits before 26 November 2026 did")
    parser.add_argument("--only", nargs="*", default=[], metavar="RUN", help=f"any of {', '.join(RUNS)}, sweep")
    parser.add_argument("files", nargs="+", metavar="FILE.json")
    options = parser.parse_args()
    if options.compare:
        first, second = (json.loads(Path(file).read_text()) for file in options.files)
        lines = differences(first, second)
        print("\n".join(lines) or f"{len(first)} runs: no difference")
        return 1 if lines else 0
    if options.as_before:
        PYTHONPATH.append(str(Path(__file__).resolve().parent / "patched"))
    Path(options.files[0]).write_text(json.dumps(record(options.only), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
