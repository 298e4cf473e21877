"""What a run writes into its folder besides metrics: config, manifest and checkpoints."""

from __future__ import annotations

import itertools
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from pretrain.checkpoint.format import Fragment
from pretrain.checkpoint.generators import random_generators
from pretrain.checkpoint.state import fragments, group_settings
from pretrain.checkpoint.store import CheckpointReader, prune
from pretrain.checkpoint.writer import Snapshot, save_checkpoint
from pretrain.data import hub_tokenizer
from pretrain.files import replacing
from pretrain.launch.ancestor import as_facts
from pretrain.launch.setup import Setup
from pretrain.run.data_lock import keep_lock
from pretrain.run.folder import TOKENIZER_FILE
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


def save_run(setup: Setup, trainer: Trainer) -> None:
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
            **as_facts(setup.ancestry),
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
