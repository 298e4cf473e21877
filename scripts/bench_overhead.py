"""The cost of optimizers in training, compared with Muon: time of whole steps and of their optimizer part.

There is one trainer per optimizer, built as `aurora train` does, all in one process. They alternate, a few steps each
per round, in an order that changes every round. The table also has the operations of an optimizer step, from torch's
counter, and those of the whole step. With --json the figures are written to a file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench_trainer import make_trainer, seconds

from optimizers import param_groups
from optimizers.blocks import blocks, row_blocks
from optimizers.flops import step_flops
from pretrain.config import Config, load_config
from pretrain.engine.plain import PlainEngine
from pretrain.model.build import build_model
from pretrain.model.cost import flops_per_token
from pretrain.processes.errors import UserError
from pretrain.run.json_lines import JsonLines
from pretrain.run.manifest import environment

BASELINE = "muon"


def operations(config: Config) -> tuple[float, float]:
    """Return the operations of one optimizer step, and of the model in one training step."""
    model = build_model(config.model, config.run.seed, device="meta")
    (matrix,) = (g for g in param_groups(model, config.optimizer.settings()) if g["kind"] == "matrix")
    parts = zip(matrix["params"], row_blocks(matrix), strict=True)
    shapes = [block.shape for weight, split in parts for block in blocks(weight, split)]
    model_flops = flops_per_token(config.model, config.sequence_length) * config.train.global_batch_tokens
    return float(step_flops(shapes, matrix)), model_flops


def measure(configs: dict[str, Config], rounds: int, steps: int) -> dict[str, dict[str, list[float]]]:
    """Measure the seconds per step of each optimizer in every round: of the `step`, and of its `optimizer` part."""
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in configs}
    with tempfile.TemporaryDirectory() as folder:
        logs = {name: Path(folder) / f"{name}.jsonl" for name in configs}
        engines = {name: PlainEngine(config) for name, config in configs.items()}
        trainers = {name: make_trainer(config, engines[name], logs[name]) for name, config in configs.items()}
        for index in range(rounds + 1):
            order = list(configs) if index % 2 else list(configs)[::-1]
            for name in order:
                trainer = trainers[name]
                took = seconds(lambda t=trainer: t.fit(stop_at=t.state.step + steps), engines[name])
                if index:  # the first round warms up
                    records = JsonLines(logs[name]).read()[-steps:]
                    found[name]["step"].append(took / steps)
                    found[name]["optimizer"].append(sum(r["optimizer_seconds"] for r in records) / steps)
        for trainer in trainers.values():
            trainer.batches.close()
    return found


def figures(configs: dict[str, Config], measured: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Return one row per optimizer: medians over the rounds, with ratios taken within a round."""
    base_flops, _ = operations(configs[BASELINE])
    rows = []
    for name, config in configs.items():
        flops, model_flops = operations(config)
        ratios = {
            part: [a / b for a, b in zip(measured[name][part], measured[BASELINE][part], strict=True)]
            for part in ("step", "optimizer")
        }
        rows.append(
            {
                "optimizer": name,
                "step_seconds": statistics.median(measured[name]["step"]),
                "optimizer_seconds": statistics.median(measured[name]["optimizer"]),
                "step_time_ratio": statistics.median(ratios["step"]),
                "step_time_ratio_range": [min(ratios["step"]), max(ratios["step"])],
                "optimizer_time_ratio": statistics.median(ratios["optimizer"]),
                "optimizer_flops_ratio": flops / base_flops,
                "step_flops_ratio": (model_flops + flops) / (model_flops + base_flops),
                "optimizer_share_of_flops": flops / (model_flops + flops),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Format the rows in Markdown."""
    columns = [
        "optimizer",
        "step, s",
        "step / Muon's (lowest, highest round)",
        "optimizer / Muon's",
        "its operations / Muon's",
        "whole step's operations / Muon's",
        "optimizer's share of operations",
    ]
    lines = [columns, ["---"] * len(columns)]
    for row in rows:
        low, high = row["step_time_ratio_range"]
        lines.append(
            [
                row["optimizer"],
                f"{row['step_seconds']:.3f}",
                f"{row['step_time_ratio']:.3f} ({low:.3f}, {high:.3f})",
                f"{row['optimizer_time_ratio']:.2f}",
                f"{row['optimizer_flops_ratio']:.3f}",
                f"{row['step_flops_ratio']:.4f}",
                f"{row['optimizer_share_of_flops']:.2%}",
            ]
        )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--optimizers", default="aurora,u_normuon", help="in addition to muon (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="steps of each per round (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    options = parser.parse_intermixed_args(arguments)
    names = [BASELINE, *(name.strip() for name in options.optimizers.split(","))]
    try:
        configs = {name: load_config(options.config, [*options.overrides, f"optimizer.name={name}"]) for name in names}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = figures(configs, measure(configs, options.rounds, options.steps))
    result = {
        "benchmark": "training steps by optimizer, interleaved",
        "config": options.config,
        "overrides": options.overrides,
        "rounds": options.rounds,
        "rows": rows,
        **{key: environment()[key] for key in ("time", "git_commit", "hardware")},
    }
    print(table(rows))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
