"""The whole config: its sections, and the keys of a class."""

from __future__ import annotations

import hashlib
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from pretrain.config.base import KeyKind, Section, leaves, section_in
from pretrain.config.checkpoint import CheckpointConfig
from pretrain.config.data import DataConfig
from pretrain.config.effect import without_effect
from pretrain.config.engine import EngineConfig
from pretrain.config.errors import ConfigError
from pretrain.config.evaluation import EvaluationConfig
from pretrain.config.guards import GuardsConfig
from pretrain.config.init import InitConfig
from pretrain.config.logging import LoggingConfig
from pretrain.config.model import ModelConfig
from pretrain.config.optimizer import OptimizerConfig
from pretrain.config.run import RunConfig
from pretrain.config.samples import SamplesConfig
from pretrain.config.schedule import ScheduleConfig
from pretrain.config.telemetry import TelemetryConfig
from pretrain.config.tokenizer import TokenizerConfig
from pretrain.config.train import TrainConfig
from pretrain.config.validation import ValidationConfig
from pretrain.config.wandb import WandbConfig
from pretrain.config.watch import WatchConfig
from pretrain.config.yaml_text import dump_yaml


class Config(Section):
    """A run's whole configuration. Build it with `load_config` or `parse_config`."""

    run: RunConfig
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    init: InitConfig = Field(default_factory=InitConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    samples: SamplesConfig = Field(default_factory=SamplesConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig)
    guards: GuardsConfig = Field(default_factory=GuardsConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    wandb: WandbConfig = Field(default_factory=WandbConfig)
    watch: WatchConfig = Field(default_factory=WatchConfig)

    @property
    def sequence_length(self) -> int:
        """Tokens of a training sequence."""
        return self.train.sequence_length or self.model.context_length

    @property
    def padded_length(self) -> int | None:
        """Tokens of a training sequence if the packing pads sequences, else None."""
        return self.sequence_length if self.data.packing == "best_fit" else None

    @property
    def global_batch_sequences(self) -> int:
        """Sequences of one optimizer step over all ranks."""
        return self.train.global_batch_tokens // self.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.train.total_tokens // self.train.global_batch_tokens

    def accumulation(self, world_size: int) -> int:
        """Return the micro-batches of each rank in one step.

        Raises:
            ConfigError: the global batch does not divide over the ranks.
        """
        size, sequences = self.train.micro_batch_sequences, self.global_batch_sequences
        if sequences % (size * world_size):
            raise ConfigError(
                [
                    f"train.micro_batch_sequences: the {sequences} sequences of a global batch cannot be divided over "
                    f"{world_size} ranks in micro-batches of {size}; ranks x micro-batch must divide the global batch"
                ]
            )
        return sequences // (size * world_size)

    @property
    def run_folder(self) -> Path:
        """`<root>/<name>`."""
        return Path(self.run.root) / self.run.name

    def keys_of(self, *kinds: KeyKind) -> dict[str, Any]:
        """Return the keys of these classes that have an effect: dotted path to value, as in `resolved`."""
        return {path: value for path, value, of in leaves(type(self), self.resolved()) if of.kind in kinds}

    def resolved(self) -> dict[str, Any]:
        """Return plain data with every default that has an effect written out; it parses back to an equal config."""
        data = self.model_dump(mode="json")
        for path in without_effect(self.sections()):
            *parents, last = path.split(".")
            section = data
            for key in parents:
                section = section.get(key, {})
            section.pop(last, None)
        for name in ("init", "evaluation"):  # which older versions did not have
            if not data[name]:
                del data[name]
        return data

    def sections(self) -> dict[str, Section]:
        """Return the sections by name."""
        return {name: getattr(self, name) for name in type(self).model_fields}

    def to_yaml(self) -> str:
        """Return `resolved` as YAML."""
        return dump_yaml(self.resolved())


def identity_hash(identity: Mapping[str, Any]) -> str:
    """Return the sha256 of a mapping of plain data, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def is_section(path: str) -> bool:
    """Return whether a dotted path names a section rather than a single key, or a list of sections that may be null."""
    section: type[Section] | None = Config
    for part in path.split("."):
        if section is None or (not part.isdecimal() and part not in section.model_fields):
            return False
        if not part.isdecimal():
            annotation = section.model_fields[part].annotation
            section = None if type(None) in typing.get_args(annotation) else section_in(annotation)
    return section is not None
