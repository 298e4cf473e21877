"""From a config to a finished run: choose what to resume, set everything up, train, and say how it ended."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from tokenizers import Tokenizer

from optimizers import Aurora, param_groups
from pretrain.checkpoint.state import (
    fragments,
    group_settings,
    load_state,
    load_weights,
    random_generators,
    restore_generators,
)
from pretrain.checkpoint.store import (
    CheckpointError,
    CheckpointReader,
    Fragment,
    list_checkpoints,
    newest_intact,
    prune,
    save_checkpoint,
)
from pretrain.config import Config, ConfigError
from pretrain.data import TokenStream, check_sources, fingerprint, load_tokenizer
from pretrain.engine.base import Engine, PlainEngine, accumulation
from pretrain.files import file_sha256
from pretrain.model.build import LossModel, build_model
from pretrain.neurons.telemetry import Telemetry, set_aside_after
from pretrain.neurons.watched import WatchedMatrices
from pretrain.planning.summary import describe, routing_table
from pretrain.processes.exit_codes import DONE, STOPPED
from pretrain.processes.torchrun import is_orphaned
from pretrain.run.display import Display, make_tracker
from pretrain.run.folder import TOKENIZER_FILE, RunError, RunFolder, git_commit
from pretrain.run.identity import Identity
from pretrain.training.hooks import Sampler, Validator
from pretrain.training.trainer import Hook, Trainer, TrainState, checkpoint_index

T = TypeVar("T")


def train(config: Config, resume: str = "auto", stop_at: int | None = None) -> int:
    """Train the run that `config` describes, from its newest checkpoint on if there is one.

    Args:
        config: validated.
        resume: ``auto``, ``never``, or a checkpoint's folder.
        stop_at: save and stop after this step.

    Returns:
        The exit code: 0 done, 75 stopped with a checkpoint saved.

    Raises:
        ValueError: bad input (`ConfigError`, `RunError`, `CheckpointError`, `DataError`), before any training.
        TrainingError, OSError: training failed; saved checkpoints are untouched.
    """
    engine = make_engine(config)
    try:
        code = _Launch(config, engine).run(resume, stop_at)
        engine.gather(None)  # together: a launcher stops the other processes when the first one ends
        return code
    finally:
        engine.close()


def make_engine(config: Config) -> Engine:
    """The engine that the config names, of all processes that were started."""
    if config.engine.kind == "deepspeed":
        from pretrain.engine.deepspeed import DeepSpeedEngine  # importing DeepSpeed takes seconds

        return DeepSpeedEngine(config)
    return PlainEngine(config)


class _Launch:
    """One launch of a run on one rank."""

    def __init__(self, config: Config, engine: Engine) -> None:
        self.config, self.engine = config, engine
        self.display = Display(engine.rank, config.logging.every_steps)
        self.folder = RunFolder(config.run_folder)
        self.telemetry: Telemetry | None = None
        self.stop = False
        engine.say = self.display.say

    def run(self, resume: str, stop_at: int | None) -> int:
        """Set up, train, tear down."""
        accumulation(self.config, self.engine.world_size)
        self.tokenizer = load_tokenizer(self.config.tokenizer)
        self.eos_id: int = self.tokenizer.token_to_id(self.config.tokenizer.eos_token)  # type: ignore[assignment]
        self.inputs = self.on_rank_0(lambda: check_inputs(self.config, self.tokenizer))
        self.identity = Identity.of(self.config, self.inputs["data"], self.inputs["tokenizer_sha256"])
        self.on_rank_0(self.folder.lock)
        try:
            source, notes = self.on_rank_0(lambda: choose_checkpoint(self.folder, resume, self.identity))
            for note in notes:
                self.display.warn(note)
            reader = CheckpointReader(source) if source else None
            step = reader.index["step"] if reader else 0
            if step >= self.config.total_steps:
                self.display.say(f"{self.folder.path}: already complete at step {step}")
                return DONE
            if stop_at is not None and step >= stop_at:
                self.display.say(f"{self.folder.path}: already at step {step}, asked to stop at {stop_at}")
                return STOPPED
            return self.fit(reader, stop_at)
        finally:
            self.folder.unlock()

    def fit(self, reader: CheckpointReader | None, stop_at: int | None) -> int:
        """Build everything, restore it from `reader`, and train."""
        config, engine, display = self.config, self.engine, self.display
        seed_everything(config.run.seed + engine.rank, config.run.deterministic)
        model = build_model(config.model, config.run.seed)
        if reader:
            load_weights(reader, model)
        self.routing = routing_table(config, model)
        self.summary = describe(config, model, engine.world_size)
        optimizer = Aurora(param_groups(model, config.optimizer.settings()))
        engine.prepare(LossModel(model, config.train), optimizer)
        stream = TokenStream(
            config.data,
            config.tokenizer,
            config.sequence_length,
            group=engine.cpu_group,
            state=reader.index["data_state"] if reader else None,  # type: ignore[arg-type]
        )
        hooks = self.hooks(model, optimizer)
        state = TrainState()
        if reader:
            load_state(reader, model, optimizer, engine.held)
            state = TrainState(**reader.index["counters"])
            self.restore_generators(reader)
            if self.telemetry:
                self.telemetry.matrices.restore(reader)
        launch = self.on_rank_0(lambda: self.open_run_folder(state.step))
        tracker = make_tracker(config, self.folder.path, launch, engine.rank, display.warn)
        trainer = Trainer(
            config,
            engine,
            optimizer,
            stream,
            eos_id=self.eos_id,
            state=state,
            hooks=hooks,
            log=lambda record: self.log(record, tracker.log),
            save=self.save,
            stop_requested=lambda: self.stop or is_orphaned(),
        )
        self.announce(reader)
        display.start(state.step, config.total_steps)
        try:
            with self.stop_on_signals():
                outcome = trainer.fit(stop_at)
        finally:
            display.close()
            tracker.close()
            stream.close()
        if outcome == "stopped":
            display.say(f"stopped after step {state.step}; start the same command again to continue")
            return STOPPED
        self.on_rank_0(lambda: self.folder.mark_finished(state.step))
        display.say(
            f"done: {state.step} steps, {state.tokens:,} tokens, {state.train_seconds:,.0f} seconds of training; "
            f"everything is in {self.folder.path}"
        )
        return DONE

    def on_rank_0(self, work: Callable[[], T]) -> T:
        """Rank 0's result, or its error raised, on every rank: files are looked at once, and all agree."""
        outcome: Any = None
        if self.engine.rank == 0:
            try:
                outcome = (work(), None)
            except (ValueError, OSError) as error:
                outcome = (None, error)
        value, failure = self.engine.broadcast(outcome)
        if failure is not None:
            raise failure
        return value

    def restore_generators(self, reader: CheckpointReader) -> None:
        """This rank's random generators, where the checkpoint has such a rank."""
        saved = reader.generators(self.engine.rank)
        if saved is not None:
            restore_generators(saved)
        ranks = reader.index["world_size"]
        if ranks != self.engine.world_size:
            self.display.say(f"the checkpoint was written by {ranks} ranks, now {self.engine.world_size}")
        before = reader.index["provenance"].get("precision")
        if before != str(self.engine.precision):
            self.display.warn(f"precision was {before}, now {self.engine.precision}: results will differ")

    def open_run_folder(self, step: int) -> str:
        """Put aside what lies past `step`, write config and manifest; returns the run's wandb id."""
        discarded = self.folder.metrics.discard_after(step)
        self.folder.samples.discard_after(step)
        set_aside_after(self.folder.telemetry, step)
        if discarded:
            self.display.say(f"{discarded} metric lines past step {step} moved to metrics.discarded.jsonl")
        set_aside_newer(self.folder.checkpoints, step)
        shutil.copyfile(self.config.tokenizer.path, self.folder.path / TOKENIZER_FILE)
        run_id = (self.folder.manifest() or {}).get("id") or uuid.uuid4().hex[:16]
        facts = {
            "id": run_id,
            "identity": self.identity.record(),
            "data": self.inputs["data"],
            "routing": self.routing,
        }
        launch = {
            "from_step": step,
            "world_size": self.engine.world_size,
            "device": str(self.engine.device),
            "precision": str(self.engine.precision),
        }
        self.folder.write_manifest(self.config, facts, launch)
        return run_id

    def announce(self, reader: CheckpointReader | None) -> None:
        """Print what will be trained and from where."""
        engine = self.engine
        for line in self.summary:
            self.display.say(line)
        for line in engine.describe():
            self.display.say(line)
        if reader:
            self.display.say(f"resuming from {reader.folder} (step {reader.index['step']})")

    def hooks(self, model: torch.nn.Module, optimizer: Aurora) -> list[Hook]:
        """The periodic work that the config asks for; `self.telemetry` is the one among it with a state to save."""
        config, engine = self.config, self.engine

        def open_validation() -> TokenStream:
            return TokenStream(
                config.data,
                config.tokenizer,
                config.sequence_length,
                split="validation",
                epochs=1,
                group=engine.cpu_group,
            )

        hooks: list[Hook] = []
        validator = Validator(config, open_validation) if config.data.validation_fraction > 0 else None
        if validator:
            hooks.append(validator)
        if config.telemetry.every_steps is not None:
            batches = validator.batches if validator else list
            folder = self.folder.telemetry
            matrices = WatchedMatrices(model, optimizer, engine)
            self.telemetry = Telemetry(config.telemetry, model, matrices, folder, batches, self.display.say)
            hooks.append(self.telemetry)
        if config.samples.every_steps is not None:
            samples = self.folder.samples
            hooks.append(
                Sampler(config.samples, self.tokenizer, self.eos_id, config.run.seed, samples, self.display.say)
            )
        return hooks

    def log(self, record: dict[str, Any], track: Callable[[dict[str, Any]], None]) -> None:
        """One step's record, to everywhere it goes."""
        if self.engine.rank == 0:
            self.folder.metrics.append(record)
        track(record)
        self.display.step(record)

    def save(self, trainer: Trainer) -> None:
        """Save a checkpoint, then drop those that are no longer kept."""
        engine, model = self.engine, self.engine.module.model
        index = checkpoint_index(trainer, self.identity.record(), group_settings(trainer.optimizer))
        index["provenance"] = {
            "git_commit": git_commit(),
            "precision": str(engine.precision),
            "data": self.inputs["data"],
        }
        own: Iterable[Fragment] = fragments(model, trainer.optimizer, engine.held)
        if self.telemetry:
            own = itertools.chain(own, self.telemetry.matrices.fragments())
        # Where every rank holds everything one of them writes it.
        writes = engine.held is not None or engine.rank == 0
        path = save_checkpoint(self.folder.checkpoints, index, own if writes else (), random_generators(), engine)
        if engine.rank == 0:
            keep = self.config.checkpoint
            prune(self.folder.checkpoints, keep.keep_last, keep.keep_every_steps)
        self.display.say(f"saved {path}")

    @contextlib.contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask for a stop after the current step; a second one ends at once."""

        def request(number: int, frame: FrameType | None) -> None:
            self.stop = True
            if self.engine.rank == 0:
                # Not print: the signal may have interrupted one.
                os.write(2, f"\n{signal.Signals(number).name}: stopping after this step\n".encode())
            signal.signal(number, previous[signal.Signals(number)])

        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.signal(number, request) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed every global random generator; ask for deterministic kernels if wanted."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic)


def check_inputs(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """Look at every file that the run reads; returns the data's fingerprint and the tokenizer's sha256.

    Raises:
        ConfigError: with everything that is wrong.
    """
    problems = check_sources(config.data)
    entries = tokenizer.get_vocab_size()
    if entries > config.model.vocab_size:
        problems.append(
            f"model.vocab_size: expected at least the {entries} entries of {config.tokenizer.path}, "
            f"got {config.model.vocab_size}"
        )
    if problems:
        raise ConfigError(problems)
    return {
        "data": fingerprint(config.data),
        "tokenizer_sha256": file_sha256(Path(config.tokenizer.path)),
    }


def choose_checkpoint(folder: RunFolder, resume: str, identity: Identity) -> tuple[Path | None, list[str]]:
    """The checkpoint to start from, or None for a fresh start, and warnings.

    Raises:
        RunError: the run folder holds another run, or any run under ``never``.
        CheckpointError: the wanted checkpoint, or every one, is damaged.
    """
    if resume == "never":
        if folder.manifest() or list_checkpoints(folder.checkpoints):
            raise RunError(
                f"{folder.path}: already holds a run; continue it with --resume auto, or choose another run.name"
            )
        return None, []
    launched = Identity.of_run(folder)
    notes = identity.check(launched, folder.path) if launched else []
    if resume != "auto":
        reader = CheckpointReader(Path(resume))
        reader.verify()
        return reader.folder, identity.check_checkpoint(reader)
    newest, damaged = newest_intact(folder.checkpoints)
    if newest is None and damaged:
        raise CheckpointError(
            "\n".join([*damaged, f"{folder.checkpoints}: no intact checkpoint is left to resume from"])
        )
    if newest is None:
        return None, notes
    notes = identity.check_checkpoint(newest)
    return newest.folder, notes + [f"{message}; falling back to {newest.folder.name}" for message in damaged]


def set_aside_newer(root: Path, step: int) -> None:
    """Move the checkpoints past `step` to ``discarded/``: they belong to a future that is trained anew."""
    for folder in list_checkpoints(root):
        if int(folder.name.removeprefix("step-")) > step:
            target = root / "discarded" / folder.name
            target.parent.mkdir(exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)
