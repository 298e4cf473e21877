"""Loss curves of three short runs, committed as JSON.

    python tests/golden/curves.py            print how far this machine's curves are from the committed ones
    python tests/golden/curves.py --write    replace the committed ones

Each run is a shipped config at a width that a CPU trains in seconds, in fp32 with fp32 polar factors. Regenerate the
curves only for a change that is meant to change results, and name that change in the commit.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))

from tests.counting.where import load_config, merged, metrics, parse_config, run_ranks, train  # noqa: E402

FILE = Path(__file__).with_name("curves.json")
STEPS, BATCH = 10, 2048

SMALL: dict[str, Any] = {
    "model.vocab_size": 2048,
    "model.hidden_size": 64,
    "model.intermediate_size": 256,
    "model.num_layers": 2,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.context_length": 64,
    "tokenizer.path": str(REPOSITORY / "assets/tokenizer/tokenizer-2048.json"),
    "data.sources": [{"path": str(REPOSITORY / "assets/corpus/moby_dick.parquet")}],
    "data.lanes": 4,
    "optimizer.polar": "polar_express",
    "optimizer.polar_dtype": "fp32",
    "schedule.warmup_tokens": 0,
    "train.global_batch_tokens": BATCH,
    "train.total_tokens": STEPS * BATCH,
    "train.micro_batch_sequences": 8,
    "train.precision": "fp32",
    "train.compile": False,
    "validation": {"max_tokens": 4096},
    "samples": {},
    "telemetry": {},
}
ZERO = {"engine": {"kind": "deepspeed", "zero_stage": 1, "wire_dtype": "fp32"}}
# Name: (shipped config, changes besides SMALL, processes)
RUNS: dict[str, tuple[str, dict[str, Any], int]] = {
    "quickstart": ("quickstart", {}, 1),
    "speedrun": ("speedrun-3175", {"model.embedding_dtype": "fp32", "train.loss_chunk_tokens": 128}, 1),
    "quickstart-zero1-2": ("quickstart", ZERO, 2),
}


def _train(name: str, root: str) -> list[dict[str, Any]]:
    shipped, changes, _ = RUNS[name]
    data = load_config(REPOSITORY / f"configs/{shipped}.yaml").resolved()
    config = parse_config(merged(data, {"run.root": root, **SMALL, **changes}))
    train(config)
    return metrics(config)


def curve(name: str) -> dict[str, Any]:
    """The losses of a run, step by step, and its validation loss at the end."""
    with tempfile.TemporaryDirectory(prefix="golden-") as root:
        ranks = RUNS[name][2]
        lines = _train(name, root) if ranks == 1 else run_ranks(ranks, _train, name, root)[0]
    return {"loss": [line["loss"] for line in lines], "validation_loss": lines[-1]["validation_loss"]}


def distance(found: dict[str, Any], wanted: dict[str, Any]) -> float:
    """The largest relative difference of any loss."""
    pairs = zip([*found["loss"], found["validation_loss"]], [*wanted["loss"], wanted["validation_loss"]], strict=True)
    return max(abs(a - b) / b for a, b in pairs)


def main() -> int:
    """Compare, or write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the committed curves")
    write = parser.parse_args().write
    found = {name: curve(name) for name in RUNS}
    committed = json.loads(FILE.read_text()) if FILE.exists() else {}
    for name, lines in found.items():
        change = f"{distance(lines, committed[name]):.2e} from the committed curve" if name in committed else "new"
        print(f"golden {name}: {lines['loss'][0]:.4f} to {lines['loss'][-1]:.4f}, {change}", file=sys.stderr)
    if write:
        FILE.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
