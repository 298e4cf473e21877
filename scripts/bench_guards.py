"""What guards and telemetry cost: throughput with all of them on, compared with all of them off.

Two trainers in one process, built as `aurora train` does, take turns of a few steps in an order that changes. On: loss
spikes are skipped, weights are hashed every `--compare-every` steps (one process compares with nobody, but reads all
weights as each of many does), garbage is collected on time, and neurons are measured as the config says. A round has
as many steps as lie between two measurements, unless `--steps` says otherwise. Prints one JSON line with the medians
over the rounds of the ratio on / off (higher is better), in wall-clock time and in CPU time of the process: the latter
is the better measure on a machine that does other work as well; and the time that a measurement took, as the trainer
itself reports it, over that of a round without.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from bench_trainer import make_trainer

from pretrain.config import Config, load_config
from pretrain.engine.base import Engine
from pretrain.engine.plain import PlainEngine
from pretrain.processes.errors import UserError
from pretrain.run.manifest import environment
from pretrain.training.trainer import Trainer


def configs(path: str, overrides: list[str], compare_every: int) -> dict[str, Config]:
    """Return the config with everything on, and with everything off."""
    on = ["guards.on_loss_spike=skip", f"guards.compare_weights_every_steps={compare_every}"]
    off = ["guards.on_loss_spike=ignore", "guards.gc_every_steps=null", "telemetry={}"]
    off += ["guards.compare_weights_every_steps=null"]
    return {"on": load_config(path, [*overrides, *on]), "off": load_config(path, [*overrides, *off])}


def hash_weights(trainer: Trainer, every: int) -> None:
    """Compute the hashes of the weights, which are what a comparison costs: on one rank nothing is compared."""

    def compare(engine: Engine, step: int, *, before_save: bool = False) -> None:
        if before_save or step % every == 0:
            engine.weight_hashes()

    trainer.guards.compare_weights = compare  # type: ignore[method-assign]


TURN_STEPS = 5
"""Both sides take turns of so many steps, so that a machine whose speed drifts slows both alike."""


def measured_round(trainers: dict[str, Trainer], steps: int, index: int) -> dict[str, dict[str, float]]:
    """Return the seconds that `steps` steps of each side take, on the clock on the wall and of the CPU."""
    took = {name: {"wall": 0.0, "cpu": 0.0} for name in trainers}
    for turn, start in enumerate(range(0, steps, TURN_STEPS), start=index):
        for name in list(trainers) if turn % 2 else list(trainers)[::-1]:
            trainer = trainers[name]
            wall, cpu = time.perf_counter(), time.process_time()
            trainer.fit(stop_at=trainer.state.step + min(TURN_STEPS, steps - start))
            took[name]["wall"] += time.perf_counter() - wall
            took[name]["cpu"] += time.process_time() - cpu
    return took


def measurement_seconds(metrics: Path) -> list[float]:
    """Return how long each measurement of the neurons took."""
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return [record["telemetry/seconds"] for record in records if "telemetry/seconds" in record]


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="steps of each side per round (default: telemetry.every_steps)")
    parser.add_argument("--compare-every", type=int, default=100, help="steps between hashes (default: %(default)s)")
    options = parser.parse_intermixed_args()
    try:
        sides = configs(options.config, options.overrides, options.compare_every)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    steps = options.steps or sides["on"].telemetry.every_steps or 10
    engines = {name: PlainEngine(config) for name, config in sides.items()}
    ratios, off_seconds = defaultdict(list), []
    with tempfile.TemporaryDirectory() as folder:
        trainers = {
            name: make_trainer(config, engines[name], Path(folder) / name / "metrics.jsonl", telemetry=True)
            for name, config in sides.items()
        }
        hash_weights(trainers["on"], options.compare_every)
        for index in range(options.rounds + 1):
            took = measured_round(trainers, steps, index)
            if index:  # the first round warms up
                for clock in ("wall", "cpu"):
                    ratios[clock].append(took["off"][clock] / took["on"][clock])
                off_seconds.append(took["off"]["wall"])
                shown = ", ".join(f"{clock} {found[-1]:.4f}" for clock, found in ratios.items())
                print(f"round {index} of {options.rounds}: {shown}", file=sys.stderr, flush=True)
        for trainer in trainers.values():
            trainer.batches.close()
        measurements = measurement_seconds(Path(folder) / "on" / "metrics.jsonl")
    result = {
        "benchmark": "guards and telemetry on / off, tokens per second",
        "config": options.config,
        "overrides": options.overrides,
        "telemetry_every_steps": sides["on"].telemetry.every_steps,
        "compare_weights_every_steps": options.compare_every,
        **{f"{clock}_ratio_median": round(statistics.median(found), 4) for clock, found in ratios.items()},
        **{f"{clock}_ratio_lowest": round(min(found), 4) for clock, found in ratios.items()},
        "measurement_seconds_median": round(statistics.median(measurements), 4) if measurements else None,
        "round_seconds_median": round(statistics.median(off_seconds), 4),
        "rounds": options.rounds,
        "steps": steps,
        "precision": str(engines["on"].precision),
        **{key: environment()[key] for key in ("git_commit", "hardware")},
    }
    print(json.dumps(result))
    for engine in engines.values():
        engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
