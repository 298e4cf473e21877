"""From a config to a finished run: look at the inputs, choose a checkpoint, build everything, train."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from optimizers import Aurora
from pretrain.checkpoint.format import CheckpointError, Fragment
from pretrain.checkpoint.generators import random_generators, restore_generators, seed_everything
from pretrain.checkpoint.state import fragments, group_settings, load_state, load_weights
from pretrain.checkpoint.store import CheckpointReader, prune
from pretrain.checkpoint.writer import Snapshot, save_checkpoint
from pretrain.config import Config
from pretrain.config.tokenizer import TokenizerConfig
from pretrain.data import (
    BadRowsError,
    TokenStream,
    hub_tokenizer,
    load_tokenizer,
    separator_id,
    without_bytes,
)
from pretrain.data.budget import describe_data
from pretrain.data.prefetch import Prefetcher
from pretrain.data.sources.retries import stopping
from pretrain.engine import make_engine
from pretrain.engine.base import Engine
from pretrain.files import replacing
from pretrain.model.build import build_model
from pretrain.neurons.telemetry import Telemetry
from pretrain.neurons.watched import WatchedMatrices
from pretrain.planning.summary import describe, routing_table
from pretrain.processes.environment import settled
from pretrain.processes.exit_codes import DONE, STOPPED
from pretrain.processes.failures import report
from pretrain.processes.signals import StopRequests, stop_requests
from pretrain.processes.torchrun import is_orphaned
from pretrain.run.data_lock import keep_lock, lock_of_run
from pretrain.run.display import Display
from pretrain.run.folder import TOKENIZER_FILE, RunFolder
from pretrain.run.identity import Identity
from pretrain.run.inputs import Inputs, check_inputs
from pretrain.run.manifest import git_commit, write_manifest
from pretrain.run.provenance import source_records
from pretrain.run.resume import choose_checkpoint, rewind
from pretrain.run.wandb import make_tracker
from pretrain.training.epochs import EpochNotices
from pretrain.training.hooks import Hook
from pretrain.training.sampling import Sampler
from pretrain.training.trainer import Trainer, TrainState
from pretrain.training.validation import Validator
from pretrain.training.validation_store import ValidationSet, validation_set


def train(config: Config, resume: str = "auto", stop_at: int | None = None) -> int:
    """Train the run that `config` describes, from its newest checkpoint on if there is one.

    Args:
        config: validated.
        resume: ``auto``, ``never``, or a checkpoint's folder.
        stop_at: save and stop after this step.

    Returns:
        The exit code: 0 done, 75 stopped with a checkpoint saved.

    Raises:
        UserError: bad input (`ConfigError`, `RunError`, `CheckpointError`, `DataError`), before any training.
        PeerError: another rank failed, and has raised its own error.
        TrainingError, OSError: training failed; saved checkpoints are untouched.
    """
    with settled(config.engine.kind, on_gpu=torch.cuda.is_available()):
        engine = make_engine(config)
        scratch = tempfile.TemporaryDirectory(prefix="aurora-")
        try:
            code = _train(_set_up(config, engine, Path(scratch.name)), resume, stop_at)
            engine.ranks.gather(None)  # together: a launcher stops the other processes when the first one ends
            return code
        except BaseException as error:
            if engine.world_size > 1:
                report(error)  # before this rank leaves the group: what fails because of that fails later
            raise
        finally:
            scratch.cleanup()
            engine.close()


@dataclass(frozen=True)
class Setup:
    """What every later stage of a launch needs."""

    config: Config
    engine: Engine
    folder: RunFolder
    display: Display
    tokenizer: Tokenizer
    tokenizer_config: TokenizerConfig
    """As in the config, but the path is that of a local file."""
    inputs: Inputs
    identity: Identity
    """What must match on resume."""
    validation: ValidationSet | None
    """That of remote and prepared sources."""

    @property
    def eos_id(self) -> int:
        """The id of the token that separates documents."""
        return separator_id(self.tokenizer, self.config.tokenizer)


def _set_up(config: Config, engine: Engine, scratch: Path) -> Setup:
    """Look at everything that the run reads, once, on rank 0; `scratch` is for files of this process."""
    display = Display(engine.rank, config.logging.every_steps)
    engine.say = display.say
    config.accumulation(engine.world_size)
    folder = RunFolder(config.run_folder)
    kept = folder.tokenizer_of(config.tokenizer.path)
    fetched = engine.ranks.on_rank_0(lambda: hub_tokenizer.read(config.tokenizer, kept), long=True)
    found = hub_tokenizer.stored(config.tokenizer, fetched, scratch)
    tokenizer = engine.ranks.everywhere(lambda: load_tokenizer(found))
    inputs = engine.ranks.on_rank_0(
        lambda: check_inputs(config, tokenizer, lock_of_run(config.data, folder, display.say), found),
        long=True,  # it may list a large source
    )
    for warning in inputs.warnings:
        display.warn(warning)
    identity = Identity.of(config, inputs.data, inputs.tokenizer_sha256)
    validation = validation_set(config, inputs, tokenizer, folder.validation, identity.result, engine)
    if validation is not None:
        identity = replace(identity, validation=validation.sample.sha256)
    return Setup(config, engine, folder, display, tokenizer, found, inputs, identity, validation)


def _train(setup: Setup, resume: str, stop_at: int | None) -> int:
    """Choose a checkpoint, and train from it in the locked run folder."""
    folder, display, ranks = setup.folder, setup.display, setup.engine.ranks
    ranks.on_rank_0(folder.lock)
    try:
        source, notes = ranks.on_rank_0(lambda: choose_checkpoint(folder, resume, setup.identity))
        for note in notes:
            display.warn(note)
        reader = setup.engine.ranks.everywhere(lambda: CheckpointReader(source)) if source else None
        step = reader.index["step"] if reader else 0
        if step >= setup.config.total_steps:
            display.say(f"{folder.path}: already complete at step {step}")
            return DONE
        if stop_at is not None and step >= stop_at:
            display.say(f"{folder.path}: already at step {step}, asked to stop at {stop_at}")
            return STOPPED
        return _fit(setup, reader, stop_at)
    finally:
        folder.unlock()


def _fit(setup: Setup, reader: CheckpointReader | None, stop_at: int | None) -> int:
    """Build everything, restore it from `reader`, and train."""
    config, display = setup.config, setup.display
    notice = "stopping after this step" if setup.engine.rank == 0 else None
    requests = StopRequests()
    with contextlib.ExitStack() as opened:
        trainer = _build(setup, reader, requests, opened)
        state = trainer.state
        if reader:
            display.say(f"resuming from {reader.folder} (step {state.step})")
        display.start(state.step, config.total_steps)
        opened.callback(display.close)
        opened.enter_context(stopping(trainer.stop_requested))
        with stop_requests(requests, notice, first_only=True, warn=display.warn):
            try:
                outcome = trainer.fit(stop_at)
            except BadRowsError as error:
                setup.folder.allow_repair(error.path)
                raise
    if outcome == "stopped":
        display.say(f"stopped after step {state.step}; start the same command again to continue")
        return STOPPED
    setup.engine.ranks.on_rank_0(lambda: setup.folder.mark_finished(state.step))
    display.say(
        f"done: {state.step} steps, {state.tokens:,} tokens, {state.train_seconds:,.0f} seconds of training; "
        f"everything is in {setup.folder.path}"
    )
    return DONE


def _build(
    setup: Setup, reader: CheckpointReader | None, requests: StopRequests, opened: contextlib.ExitStack
) -> Trainer:
    """The trainer with all that it owns, in the state of `reader`; what has to be closed goes to `opened`."""
    config, engine, display = setup.config, setup.engine, setup.display
    seed_everything(config.run.seed + engine.rank, config.run.deterministic)
    outline = build_model(config.model, config.run.seed, device="meta")
    routing, summary = routing_table(config, outline), describe(config, outline, engine.world_size)
    optimizer = engine.build(_loader(setup, reader) if reader else None)
    position: Any = reader.index["data_state"] if reader else None
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
    notices = EpochNotices(stream.position)
    hooks = _make_hooks(setup, optimizer)
    state = _restore(setup, reader, optimizer, hooks) if reader else TrainState()
    steps = config.total_steps - state.step
    batches = Prefetcher(stream, config.global_batch_sequences, steps, stream_ranks, engine.ranks)
    opened.callback(batches.close)
    run_id = engine.ranks.on_rank_0(lambda: _open_run_folder(setup, hooks, reader, routing))
    tracker = engine.ranks.everywhere(
        lambda: make_tracker(config, setup.folder.path, run_id, engine.rank, display.warn)
    )
    opened.callback(tracker.close)
    for line in [*summary, *describe_data(setup.inputs.budgets), *engine.describe()]:
        display.say(line)

    def log(record: dict[str, Any]) -> None:
        if engine.rank == 0:
            setup.folder.metrics.append(record)
        tracker.log(record)
        display.step(record)
        for line in notices.lines(record["step"], batches.position):
            display.say(line)

    return Trainer(
        config,
        engine,
        optimizer,
        batches,
        eos_id=setup.eos_id,
        state=state,
        hooks=hooks,
        log=log,
        save=lambda trainer: _save(setup, trainer),
        stop_requested=lambda: bool(requests) or is_orphaned(),
    )


def _make_hooks(setup: Setup, optimizer: Aurora) -> list[Hook]:
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
        Validator(config, open_validation, engine.ranks, setup.validation)
        if config.data.validation_fraction > 0
        else None
    )
    if validator:
        hooks.append(validator)
    if config.telemetry.every_steps is not None:
        batches = validator.batches if validator else list
        model = engine.module.model
        matrices = WatchedMatrices(model, optimizer, engine)
        hooks.append(Telemetry(config.telemetry, model, matrices, folder.telemetry, batches, show))
    if config.samples.every_steps is not None:
        seed = config.run.seed
        hooks.append(Sampler(config.samples, setup.tokenizer, setup.eos_id, seed, folder.samples, show))
    return hooks


def _loader(setup: Setup, reader: CheckpointReader) -> Callable[[torch.nn.Module], None]:
    """Fills a model from a checkpoint; a file that one rank cannot read is an error on all."""

    def load(model: torch.nn.Module) -> None:
        setup.engine.ranks.together(lambda: load_weights(reader, model))

    return load


def _restore(setup: Setup, reader: CheckpointReader, optimizer: Aurora, hooks: Iterable[Hook]) -> TrainState:
    """Restore optimizer, random generators and hooks from a checkpoint; return its counters."""
    engine = setup.engine

    def restore() -> None:
        load_state(reader, engine.module.model, optimizer, engine.held)
        _restore_generators(setup, reader)
        for hook in hooks:
            hook.restore(reader)

    engine.ranks.together(restore)
    try:
        return TrainState(**reader.index["counters"])
    except TypeError as error:  # an edited index of format 1, which has no digest
        raise CheckpointError(f"{reader.folder}: its counters are not those of a run: {error}") from None


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


def _open_run_folder(
    setup: Setup, hooks: Iterable[Hook], reader: CheckpointReader | None, routing: list[dict[str, Any]]
) -> str:
    """Move what was written after the checkpoint aside, write config and manifest; return the run's wandb id."""
    folder, engine = setup.folder, setup.engine
    step, data_state = (reader.index["step"], reader.index["data_state"]) if reader else (0, None)
    sources = source_records(setup.config.data, setup.inputs.data, data_state, setup.inputs.budgets)
    discarded = rewind(folder, step)
    for hook in hooks:
        hook.rewind(step)
    if discarded:
        setup.display.say(f"{discarded} metric lines past step {step} moved to metrics.discarded.jsonl")
    keep_lock(setup.inputs.catalog, folder)
    if setup.validation is not None:
        setup.validation.keep()
    with replacing(folder.path / TOKENIZER_FILE) as partial:
        shutil.copyfile(setup.tokenizer_config.path, partial)
    run_id = (folder.manifest() or {}).get("id") or uuid.uuid4().hex[:16]
    facts = {
        "id": run_id,
        "identity": setup.identity.record(),
        "data": setup.inputs.data,
        "provenance": {"step": step, "sources": sources},
        "routing": routing,
        **({"validation": setup.validation.record()} if setup.validation else {}),
    }
    before = (folder.manifest() or {}).get("identity", {})
    launch = {
        "from_step": step,
        "changed_data": {
            key: [before[key], value]
            for key, value in setup.identity.result.items()
            if key in setup.identity.files and before.get(key, value) != value
        },
        "world_size": engine.world_size,
        "device": str(engine.device),
        "precision": str(engine.precision),
    }
    write_manifest(folder, setup.config, facts, launch)
    return run_id


def _save(setup: Setup, trainer: Trainer) -> None:
    """Save a checkpoint, then delete those that are no longer kept."""
    engine, optimizer = setup.engine, trainer.optimizer
    data_state = dict(trainer.batches.state())
    sources = source_records(setup.config.data, setup.inputs.data, data_state, setup.inputs.budgets)
    snapshot = Snapshot(
        step=trainer.state.step,
        counters=asdict(trainer.state),
        config=setup.config.resolved(),
        identity=setup.identity.record(),
        data_state=data_state,
        optimizer_groups=group_settings(optimizer),
        provenance={
            "git_commit": git_commit() if engine.rank == 0 else None,  # rank 0 writes the index
            "precision": str(engine.precision),
            "data": setup.inputs.data,
            "sources": sources,
        },
    )
    own: Iterable[Fragment] = itertools.chain(
        fragments(engine.module.model, optimizer, engine.held), *(hook.fragments() for hook in trainer.hooks)
    )
    # Where every rank holds everything, rank 0 writes it.
    writes = engine.held is not None or engine.rank == 0
    path = save_checkpoint(setup.folder.checkpoints, snapshot, own if writes else (), random_generators(), engine.ranks)
    keep = setup.config.checkpoint

    def finish() -> None:
        prune(setup.folder.checkpoints, keep.keep_last, keep.keep_every_steps)
        setup.folder.record_sources(trainer.state.step, sources)

    engine.ranks.on_rank_0(finish)
    setup.display.say(f"saved {path}")
