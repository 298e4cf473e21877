"""Throughput of the trainer compared with a bare loop: same model, batches, optimizer, precision and threads.

The trainer reads and tokenizes text, checks, clips, measures and logs as in a real run; the bare loop gets finished
tensors. Both alternate in one process, a few steps each per round, in an order that changes every round. Prints one
JSON line with the median over the rounds of the ratio trainer / bare (higher is better).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn import functional as F

from optimizers import Aurora, param_groups
from pretrain.config import Config, load_config
from pretrain.data import TokenBatch, TokenStream, load_tokenizer
from pretrain.data.prefetch import Prefetcher
from pretrain.engine.plain import PlainEngine
from pretrain.model.build import build_model
from pretrain.neurons.telemetry import Telemetry
from pretrain.neurons.watched import WatchedMatrices
from pretrain.processes.errors import UserError
from pretrain.run.json_lines import JsonLines
from pretrain.run.manifest import environment
from pretrain.training.trainer import Trainer


def make_trainer(config: Config, engine: PlainEngine, log: Path, *, telemetry: bool = False) -> Trainer:
    """Build a trainer as `aurora train` does, without checkpoints and periodic work but, if asked for, telemetry."""
    optimizer = engine.build()
    stream = TokenStream(config.data, config.tokenizer, config.sequence_length)
    batches = Prefetcher(stream, config.global_batch_sequences, config.total_steps, engine.ranks, engine.ranks)
    eos_id = load_tokenizer(config.tokenizer).token_to_id(config.tokenizer.eos_token)
    assert eos_id is not None
    hooks = []
    if telemetry and config.telemetry.every_steps is not None:
        model = engine.module.model
        matrices = WatchedMatrices(model, optimizer, engine)
        hooks.append(Telemetry(config.telemetry, model, matrices, log.parent / "telemetry", list, lambda line: None))
    log.parent.mkdir(parents=True, exist_ok=True)
    lines = JsonLines(log)
    return Trainer(
        config,
        engine,
        optimizer,
        batches,
        eos_id=eos_id,
        hooks=hooks,
        log=lambda record, position: lines.append(record),
    )


class BareLoop:
    """The loop that one would write in a notebook."""

    def __init__(self, config: Config, engine: PlainEngine) -> None:
        self.config, self.engine = config, engine
        self.model = build_model(config.model, config.run.seed).to(engine.device)
        self.optimizer = Aurora(param_groups(self.model, config.optimizer.settings()))

    def steps(self, batches: list[TokenBatch]) -> None:
        """Take one optimizer step per batch."""
        size = self.config.train.micro_batch_sequences
        for batch in batches:
            tokens = batch.tokens.to(self.engine.device, torch.int64)
            parts = tokens.split(size)
            for part in parts:
                with self.engine.autocast():
                    logits = self.model(input_ids=part[:, :-1], use_cache=False).logits
                    loss = F.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten())
                (loss / len(parts)).backward()
            if self.config.train.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.grad_clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def seconds(work: object, engine: PlainEngine, *arguments: object) -> float:
    """Return the wall-clock time of a call, including the work of the device."""
    assert callable(work)
    started = time.perf_counter()
    work(*arguments)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/quickstart.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="steps of each side per round (default: %(default)s)")
    options = parser.parse_intermixed_args()
    try:
        config = load_config(options.config, options.overrides)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    engine = PlainEngine(config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(config, engine, Path(folder) / "metrics.jsonl")
        bare = BareLoop(config, engine)
        twin = TokenStream(config.data, config.tokenizer, config.sequence_length)
        ratios, rates = [], []
        for index in range(options.rounds + 1):
            batches = [twin.next_batch(config.global_batch_sequences) for _ in range(options.steps)]
            sides = {
                "trainer": lambda: trainer.fit(stop_at=trainer.state.step + options.steps),
                "bare": lambda ready=batches: bare.steps(ready),
            }
            order = ("trainer", "bare") if index % 2 else ("bare", "trainer")
            took = {name: seconds(sides[name], engine) for name in order}
            if index:  # the first round warms up
                ratios.append(took["bare"] / took["trainer"])
                rates.append(options.steps * config.train.global_batch_tokens / took["trainer"])
        trainer.batches.close()
        twin.close()
    result = {
        "benchmark": "trainer / bare loop, tokens per second",
        "config": options.config,
        "ratio_median": round(statistics.median(ratios), 4),
        "ratio_lowest": round(min(ratios), 4),
        "rounds": options.rounds,
        "tokens_per_second_median": round(statistics.median(rates)),
        "precision": str(engine.precision),
        **{key: environment()[key] for key in ("git_commit", "hardware")},
    }
    print(json.dumps(result))
    engine.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
