"""Train a fixed set of small runs and print the hashes of everything that they leave behind.

    python tests/recorded/record.py OUT.json             the code of the working directory
    python tests/recorded/record.py --compare A.json B.json

Two commits that train alike give equal files on one machine: hashes of every tensor of the last checkpoint, and every
field of metrics.jsonl that is not a timing. The script reads checkpoints without the code under test, so that it runs
with any commit: start it in the root of another checkout, with that checkout's environment.
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
    """BASE with dotted keys replaced, or removed where the value is None."""
    data = copy.deepcopy(BASE)
    for path, value in changes.items():
        section, key = path.split(".")
        data.setdefault(section, {})[key] = value
        if value is None:
            del data[section][key]
    return data


def aurora(arguments: list[str], folder: Path) -> None:
    """Run the command of the working directory's code in `folder`; exit codes 0 and 75 are good."""
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", "pretrain", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode not in (0, 75):
        raise SystemExit(f"aurora {' '.join(arguments)}: exit {done.returncode}\n{done.stdout}\n{done.stderr}")


def tensors(checkpoint: Path) -> dict[str, str]:
    """sha256 of every tensor of a checkpoint, assembled from its fragments, by parameter and slot."""
    index = json.loads((checkpoint / "index.json").read_text())
    found = {}
    for name, slots in index["parameters"].items():
        for slot, record in slots.items():
            parts = []
            for fragment in sorted(record["fragments"], key=lambda f: f["start"]):
                with safe_open(checkpoint / fragment["file"], framework="pt") as file:
                    parts.append(file.get_tensor(f"{name}:{slot}:{fragment['start']}").reshape(-1))
            values = torch.cat(parts).contiguous()
            found[f"{name} {slot}"] = hashlib.sha256(values.view(torch.uint8).numpy().tobytes()).hexdigest()
    return found


def outcome(run: Path) -> dict[str, Any]:
    """What a run left: hashes of its newest checkpoint and of its random generators, metrics without timings."""
    newest = sorted((run / "checkpoints").glob("step-????????"))[-1]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    generators = {}
    for file in sorted(newest.glob("rng-*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                values = opened.get_tensor(key).contiguous().view(torch.uint8).numpy().tobytes()
                generators[f"{file.stem} {key}"] = hashlib.sha256(values).hexdigest()
    return {
        "tensors": tensors(newest),
        "generators": generators,
        "metrics": [{key: value for key, value in line.items() if not key.endswith(TIMINGS)} for line in lines],
    }


def record(names: list[str]) -> dict[str, Any]:
    """The outcome of every run."""
    found = {}
    with tempfile.TemporaryDirectory(prefix="recorded-") as scratch:
        folder = Path(scratch)
        for name in names or [*RUNS, "sweep"]:
            print(name, file=sys.stderr, flush=True)
            if name == "sweep":
                (folder / "base.yaml").write_text(yaml.safe_dump(merged({"run.name": "base"})))
                (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP))
                aurora(["sweep", "sweep.yaml", "--jobs", "1"], folder)
                plan = json.loads((folder / "runs/sweeps/two/sweep.json").read_text())
                for job in plan["jobs"]:
                    found[f"sweep {job['labels']}"] = outcome(folder / "runs/sweeps/two" / job["run"])
                continue
            changes, launches = RUNS[name]
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(merged({"run.name": name, **changes})))
            for options in launches:
                aurora(["train", f"{name}.yaml", *options], folder)
            found[name] = outcome(folder / "runs" / name)
    return found


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """What differs, a line each."""
    lines = []
    for name in first.keys() | second.keys():
        if name not in first or name not in second:
            lines.append(f"{name}: only in one of them")
            continue
        for part in ("tensors", "generators"):
            one, other = first[name][part], second[name][part]
            lines += [f"{name}: {part} {key}" for key in one.keys() | other.keys() if one.get(key) != other.get(key)]
        one, other = first[name]["metrics"], second[name]["metrics"]
        if len(one) != len(other):
            lines.append(f"{name}: {len(one)} and {len(other)} metric lines")
        for a, b in zip(one, other, strict=False):
            lines += [
                f"{name}: step {a['step']} {key}: {a.get(key)} and {b.get(key)}"
                for key in a.keys() | b.keys()
                if a.get(key) != b.get(key)
            ]
    return sorted(lines)


def main() -> int:
    """Record, or compare two records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compare", action="store_true", help="compare two records instead")
    parser.add_argument("--only", nargs="*", default=[], metavar="RUN", help=f"some of {', '.join(RUNS)}, sweep")
    parser.add_argument("files", nargs="+", metavar="FILE.json")
    options = parser.parse_args()
    if options.compare:
        first, second = (json.loads(Path(file).read_text()) for file in options.files)
        lines = differences(first, second)
        print("\n".join(lines) or f"{len(first)} runs: no difference")
        return 1 if lines else 0
    Path(options.files[0]).write_text(json.dumps(record(options.only), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
