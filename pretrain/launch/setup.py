"""What a launch knows before it builds anything."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from pretrain.config import Config
from pretrain.config.tokenizer import TokenizerConfig
from pretrain.data import hub_tokenizer, load_tokenizer, separator_id
from pretrain.engine.base import Engine
from pretrain.launch.ancestor import AncestorRecord, ancestry_of
from pretrain.run.data_lock import lock_of_run
from pretrain.run.display import Display
from pretrain.run.folder import RunFolder
from pretrain.run.identity import Identity
from pretrain.run.inputs import Inputs, check_inputs
from pretrain.training.validation_store import ValidationSet, validation_set


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
    ancestry: list[AncestorRecord]
    """What the run was started from, nearest first; empty if from initial weights."""
    profile: tuple[int, int] | None = None
    """The first and the last step of a trace by torch's profiler."""

    @property
    def eos_id(self) -> int:
        """The id of the token that separates documents."""
        return separator_id(self.tokenizer, self.config.tokenizer)


def set_up(config: Config, engine: Engine, scratch: Path) -> Setup:
    """Look at everything that the run reads, once, on rank 0; `scratch` is for files of this process."""
    display = Display(engine.rank, config.logging.every_steps)
    engine.say = display.say
    config.accumulation(engine.world_size)
    folder = RunFolder(config.run_folder)
    kept = folder.tokenizer_of(config.tokenizer.path)
    fetched = engine.ranks.on_rank_0(lambda: hub_tokenizer.read(config.tokenizer, config.data, kept), long=True)
    found = hub_tokenizer.stored(config.tokenizer, fetched, scratch)
    tokenizer = engine.ranks.everywhere(lambda: load_tokenizer(found))
    inputs = engine.ranks.on_rank_0(
        lambda: check_inputs(config, tokenizer, lock_of_run(config.data, folder, display.say), found),
        long=True,  # it may list a large source
    )
    for warning in inputs.warnings:
        display.warn(warning)
    ancestor, ancestry = engine.ranks.on_rank_0(lambda: ancestry_of(config, folder), long=True)
    sha256 = ancestor["sha256"] if ancestor else None
    identity = Identity.of(config, inputs.data, inputs.tokenizer_sha256, sha256)
    validation = validation_set(config, inputs, tokenizer, folder.validation, identity.result, engine)
    if validation is not None:
        identity = replace(identity, validation=validation.sample.sha256)
    return Setup(config, engine, folder, display, tokenizer, found, inputs, identity, validation, ancestry)
