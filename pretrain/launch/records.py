"""What a run writes into its folder besides metrics: config, manifest and checkpoints."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pretrain.checkpoint.generators import random_generators
from pretrain.checkpoint.host_copy import share_of
from pretrain.checkpoint.mirror import Mirror
from pretrain.checkpoint.saver import Saver
from pretrain.checkpoint.state import fragments, group_settings
from pretrain.checkpoint.store import CheckpointReader, prune, step_folders
from pretrain.checkpoint.writer import Snapshot
from pretrain.data import hub_tokenizer
from pretrain.files import replacing
from pretrain.launch.ancestor import as_facts
from pretrain.launch.setup import Setup
from pretrain.run.data_lock import keep_lock
from pretrain.run.folder import TOKENIZER_FILE, RunError
from pretrain.run.manifest import git_commit, write_manifest
from pretrain.run.provenance import source_records
from pretrain.run.resume import rewind
from pretrain.training.hooks import Hook
from pretrain.training.trainer import Trainer


def open_run_folder(
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
    before = (earlier := folder.manifest() or {}).get("identity", {})
    run_id = earlier.get("id") or uuid.uuid4().hex[:16]
    facts = {
        "id": run_id,
        "identity": setup.identity.record(),
        "data": setup.inputs.data,
        "provenance": {"step": step, "sources": sources},
        "routing": routing,
        "tokenizer": hub_tokenizer.record(setup.config.tokenizer, setup.config.data, earlier.get("tokenizer")),
        **({"validation": setup.validation.record()} if setup.validation else {}),
        **as_facts(setup.ancestry),
    }
    launch = {
        "from_step": step,
        "changed_data": {
            key: [before[key], value]
            for key, value in setup.identity.result.items()
            if key in setup.identity.files and before.get(key, value) != value
        },
        "changed_budget": {
            key: [before[key], value] for key, value in setup.identity.length.items() if before.get(key, value) != value
        },
        "world_size": engine.world_size,
        "device": str(engine.device),
        "precision": str(engine.precision),
    }
    write_manifest(folder, setup.config, facts, launch)
    return run_id


def open_mirror(setup: Setup) -> Mirror | None:
    """Return the place of the run's copies, if the config names one; on rank 0.

    Raises:
        CheckpointError: it cannot be opened.
    """
    keep = setup.config.checkpoint
    if keep.mirror is None:
        return None
    return Mirror(f"{keep.mirror.rstrip('/')}/{setup.config.run.name}", keep.keep_last, setup.display.warn)


def fetch_copy(setup: Setup, resume: str) -> None:
    """Download the newest copy of a checkpoint if the run's own folder has no checkpoint; on rank 0.

    Raises:
        CheckpointError: there are copies, but none can be used.
        RunError: there are copies, though the run must be new.
    """
    mirror, root = open_mirror(setup), setup.folder.checkpoints
    if mirror is None or step_folders(root):
        return
    if resume == "auto":
        found = mirror.fetch_newest(root)
        if found is not None:
            setup.display.say(f"{root}: no checkpoint; downloaded {found.name} from {mirror.url}")
    elif resume == "never" and mirror.steps():
        raise RunError(
            f"{mirror.url}: holds copies of a run of this name; continue it with --resume auto, or choose another "
            "run.name"
        )


def make_saver(setup: Setup, reader: CheckpointReader | None, opened: contextlib.ExitStack) -> Saver:
    """Return what saves the run's checkpoints and deletes those that are no longer kept; a collective.

    What has to be waited for at the end goes to `opened`.
    """
    engine, folder, keep = setup.engine, setup.folder, setup.config.checkpoint
    mirror = open_mirror(setup) if engine.rank == 0 else None
    if mirror is not None:
        opened.callback(mirror.settle)

    def prepare() -> None:
        if not folder.manifest_path.exists():
            raise OSError(f"{folder.path} is not there any more; was its disk unmounted?")
        folder.check_lock()
        # A resume from this checkpoint needs the lines up to its step.
        folder.metrics.flush()
        folder.samples.flush()

    def finish(path: Path, snapshot: Snapshot) -> None:
        folder.check_lock()  # writing may have taken minutes
        try:
            prune(folder.checkpoints, keep.keep_last, keep.keep_every_steps, intact=path)
        finally:  # on NFS, a folder of which somebody reads a file cannot be deleted
            if mirror is not None:
                mirror.push(folder.checkpoints)
        try:
            folder.record_sources(snapshot.step, snapshot.provenance["sources"])
        except RunError as error:
            raise OSError(str(error)) from None  # a warning: the manifest holds nothing that training needs

    return Saver(
        folder.checkpoints,
        keep,
        engine.new_ranks() if keep.asynchronous else engine.ranks,
        newest=reader.folder if reader else None,
        prepare=prepare,
        finish=finish,
        say=setup.display.say,
        warn=setup.display.warn,
    )


def save_run(setup: Setup, trainer: Trainer, saver: Saver) -> None:
    """Save a checkpoint of the trainer's present state; see `Saver.save`."""
    engine, optimizer = setup.engine, trainer.optimizer
    data_state = dict(trainer.batches.state())
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
            "sources": source_records(setup.config.data, setup.inputs.data, data_state, setup.inputs.budgets),
            **as_facts(setup.ancestry),
        },
    )
    held = fragments(engine.module.model, optimizer, engine.held)
    # Where every rank holds everything, each writes an equal share.
    own = share_of(held, engine.rank, engine.world_size) if engine.held is None else held
    if engine.held is not None and engine.held.replica:
        own = iter(())  # the first replica writes
    of_hooks = (hook.fragments() for hook in trainer.hooks)
    saver.save(snapshot, itertools.chain(own, *of_hooks), random_generators(), engine.ranks)
