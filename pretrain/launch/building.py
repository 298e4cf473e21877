"""The trainer and all that it owns, new or in the state of a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from optimizers import Aurora
from pretrain.checkpoint.format import CheckpointError
from pretrain.checkpoint.generators import restore_generators, seed_everything
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.state import copy_weights, load_state, load_tensors, load_weights
from pretrain.checkpoint.store import CheckpointReader, newest_intact
from pretrain.data import StreamPosition, TokenStream, without_bytes
from pretrain.data.budget import describe_data
from pretrain.data.prefetch import Prefetcher
from pretrain.files import may_pass
from pretrain.launch.ancestor import Weights
from pretrain.launch.records import make_saver, open_run_folder, save_run
from pretrain.launch.setup import Setup
from pretrain.launch.start import Start, fill_stepped_weights
from pretrain.launch.stops import Stops
from pretrain.launch.watch import Watch
from pretrain.model.build import build_model
from pretrain.neurons.telemetry import Telemetry
from pretrain.neurons.watched import WatchedMatrices
from pretrain.planning.summary import describe, routing_table
from pretrain.run.folder import RunError
from pretrain.run.resume import rewind
from pretrain.run.wandb import make_tracker
from pretrain.training.epochs import EpochNotices
from pretrain.training.hooks import Hook
from pretrain.training.sampling import Sampler
from pretrain.training.start_validation import StartValidation
from pretrain.training.state import TrainState
from pretrain.training.trainer import Trainer
from pretrain.training.validation import Validator


def build_trainer(setup: Setup, start: Start, stops: Stops, opened: contextlib.ExitStack, watch: Watch) -> Trainer:
    """The trainer with all that it owns, in the state of `start`; what has to be closed goes to `opened`."""
    config, engine, display = setup.config, setup.engine, setup.display
    seed_everything(config.run.seed + engine.rank, config.run.deterministic)
    outline = build_model(config.model, config.run.seed, device="meta")
    routing, summary = routing_table(config, outline), describe(config, outline, engine.world_size)
    optimizer = engine.build(_loader(setup, start.weights) if start.weights else None)
    position: Any = start.position.index["data_state"] if start.position else None
    if position and setup.folder.repairable:  # a repair moves the rows behind it
        position = without_bytes(position)
    stream_ranks = engine.new_ranks()
    stream = TokenStream(
        config.data,
        setup.tokenizer_config,
        config.sequence_length,
        group=stream_ranks.group,
        state=position,
        catalog=setup.inputs.catalog,
    )
    opened.callback(stream.close)
    notices = EpochNotices(stream.position, config.padded_length)
    hooks = _make_hooks(setup, start, optimizer, watch)
    state = _restore(setup, start, optimizer, hooks)
    steps = config.total_steps - state.step
    batches = Prefetcher(stream, config.global_batch_sequences, steps, stream_ranks, engine.ranks)
    opened.callback(batches.close)
    run_id = engine.ranks.on_rank_0(lambda: _open_folder(setup, hooks, start, routing))
    tracker = engine.ranks.everywhere(
        lambda: make_tracker(config, setup.folder, run_id, engine.rank, state.step, display.warn)
    )
    opened.callback(tracker.close)
    for line in [*summary, *describe_data(setup.inputs.budgets), *engine.describe()]:
        display.say(line)

    def log(record: dict[str, Any], position: StreamPosition) -> None:
        record |= watch.memory()
        if engine.rank == 0:
            setup.folder.check_lock()
            _append(setup, record)
        tracker.log(record)
        display.step(record)
        for line in [*watch.lines(record), *notices.lines(record["step"], position)]:
            display.say(line)

    saver = make_saver(setup, start.position if start.is_resume else None, opened)

    def save(trainer: Trainer) -> None:
        with stops.budget.saving():
            engine.ranks.on_rank_0(setup.folder.check_lock)
            save_run(setup, trainer, saver)

    def stop_requested() -> bool:
        stops.budget.save_took(saver.seconds)
        return stops.after_step()

    return Trainer(
        config,
        engine,
        optimizer,
        batches,
        eos_id=setup.eos_id,
        state=state,
        hooks=hooks,
        log=log,
        save=save,
        settle=saver.settle,
        last_checkpoint=lambda: _last_checkpoint(setup, start, saver, optimizer, hooks),
        stop_requested=stop_requested,
        warn=display.warn,
        enter=watch.enter,
    )


def _open_folder(setup: Setup, hooks: Iterable[Hook], start: Start, routing: list[dict[str, Any]]) -> str:
    """Prepare the run folder, see `open_run_folder`; what stands in the way of a file is bad input. A full disk is not:
    it may be over at the next start."""
    try:
        return open_run_folder(setup, hooks, start.position, routing)
    except OSError as error:
        if may_pass(error):
            raise
        file = error.filename2 or error.filename or setup.folder.path
        raise RunError(f"{file}: cannot be written: {error.strerror or error}") from None


def _append(setup: Setup, record: dict[str, Any]) -> None:
    """Append a line to metrics.jsonl; warn if it has to wait in memory, for example because the disk is full."""
    metrics = setup.folder.metrics
    waited = metrics.problem is not None
    metrics.append(record)
    if metrics.problem is not None and not waited:
        setup.display.warn(f"{metrics.path}: {metrics.problem}; its lines wait in memory until it can be written")


def _make_hooks(setup: Setup, start: Start, optimizer: Aurora, watch: Watch) -> list[Hook]:
    """The periodic work that the config asks for."""
    config, engine, folder, show = setup.config, setup.engine, setup.folder, setup.display.say

    def open_validation() -> TokenStream:
        return TokenStream(
            config.data,
            setup.tokenizer_config,
            config.sequence_length,
            split="validation",
            epochs=1,
            catalog=setup.inputs.catalog,
        )

    hooks: list[Hook] = []
    validator = (
        Validator(config, open_validation, engine.ranks, setup.validation, watch.progress.tick)
        if config.data.validation_fraction > 0
        else None
    )
    if validator:
        hooks.append(validator)
        # The first forward pass under ZeRO 3 records the order of the layers: it must be one of training.
        zero_3 = config.engine.kind == "deepspeed" and config.engine.zero_stage == 3
        if start.weights and not start.position and not zero_3:
            hooks.append(StartValidation(validator, show))
    if config.telemetry.every_steps is not None:
        batches = validator.batches if validator else list
        model = engine.module.model
        matrices = WatchedMatrices(model, optimizer, engine)
        warn = setup.display.warn
        hooks.append(Telemetry(config.telemetry, model, matrices, folder.telemetry, batches, show, warn))
    if config.samples.every_steps is not None:
        seed = config.run.seed
        hooks.append(Sampler(config.samples, setup.tokenizer, setup.eos_id, seed, folder.samples, show))
    return hooks


def _loader(setup: Setup, weights: Weights) -> Callable[[torch.nn.Module], None]:
    """Fills a model with weights; a file that one rank cannot read is an error on all."""

    def load(model: torch.nn.Module) -> None:
        if isinstance(weights, CheckpointReader):
            load_weights(weights, model)
        else:
            copy_weights(weights.read, model)

    def load_together(model: torch.nn.Module) -> None:
        setup.engine.ranks.together(lambda: load(model))

    return load_together


def _restore(setup: Setup, start: Start, optimizer: Aurora, hooks: Iterable[Hook]) -> TrainState:
    """Restore what `start` holds besides the weights of the model; return the counters."""
    engine, reader = setup.engine, start.position

    def restore() -> None:
        model, held = engine.module.model, engine.held
        if start.is_resume and start.optimizer:
            load_state(start.optimizer, model, optimizer, held)
        elif start.optimizer:
            load_tensors(start.optimizer, model, optimizer, held)
        elif start.weights:
            fill_stepped_weights(start.weights, model, optimizer, held)
        if reader:
            _restore_generators(setup, reader)
            for hook in hooks:
                hook.restore(reader)

    engine.ranks.together(restore)
    if reader is None:
        return TrainState()
    try:
        return TrainState(**reader.index["counters"])
    except TypeError as error:  # an edited index of format 1, which has no digest
        raise CheckpointError(f"{reader.folder}: its counters are not those of a run: {error}") from None


def _last_checkpoint(
    setup: Setup, start: Start, saver: Saver, optimizer: Aurora, hooks: Sequence[Hook]
) -> Callable[[], TrainState] | None:
    """Find the newest intact checkpoint in the middle of training; return what restores all but the data from it.

    A branch that has saved none returns to where it began; None if the run began with the first step. A collective.
    """
    engine, folder = setup.engine, setup.folder
    saver.wait()
    engine.ranks.on_rank_0(folder.check_lock)
    newest, damaged = newest_intact(folder.checkpoints, engine.ranks)
    for problem in damaged:
        setup.display.warn(problem)
    found = newest or start.position
    if found is None:
        return None
    reader = engine.ranks.everywhere(lambda: CheckpointReader(found.folder))
    is_resume = start.is_resume or newest is not None

    def restore() -> TrainState:
        state = _restore(setup, Start(reader, reader, reader, is_resume=is_resume), optimizer, hooks)
        engine.refresh(_loader(setup, reader))

        def discard() -> None:
            rewind(folder, state.step)
            for hook in hooks:
                hook.rewind(state.step)

        engine.ranks.on_rank_0(discard)
        return state

    return restore


def _restore_generators(setup: Setup, reader: CheckpointReader) -> None:
    """Set this rank's random generators, if the checkpoint has such a rank; say what else differs."""
    engine, display = setup.engine, setup.display
    saved = reader.generators(engine.rank)
    if saved is not None:
        restore_generators(saved)
    ranks = reader.index["world_size"]
    if ranks != engine.world_size:
        display.say(f"the checkpoint was written by {ranks} ranks, now {engine.world_size}")
    before = reader.index["provenance"].get("precision")
    if before != str(engine.precision):
        display.warn(f"precision was {before}, now {engine.precision}: results will differ")
