"""The whole config: its sections, and what makes two runs the same run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from pretrain.config.base import Section
from pretrain.config.data import DataConfig, TokenizerConfig
from pretrain.config.loader import ConfigError
from pretrain.config.model import ModelConfig
from pretrain.config.optimizer import OptimizerConfig
from pretrain.config.run import RunConfig
from pretrain.config.schedule import ScheduleConfig
from pretrain.config.telemetry import TelemetryConfig
from pretrain.config.train import (
    CheckpointConfig,
    EngineConfig,
    LoggingConfig,
    SamplesConfig,
    TrainConfig,
    ValidationConfig,
    WandbConfig,
)

# Keys that may change on resume; all others are the run's identity. A name ending in "." is a section.
EXECUTION_KEYS = (
    "run.name",
    "run.root",
    "run.deterministic",
    "data.workers",
    "optimizer.adamw.fused",
    "train.micro_batch_sequences",
    "train.precision",
    "train.activation_checkpointing",
    "train.compile",
    "train.loss_chunk_tokens",
    "train.max_skipped_steps",
    "train.peak_tflops",
    "engine.",
    "validation.",
    "samples.",
    "telemetry.",
    "checkpoint.",
    "logging.",
    "wandb.",
)


class Config(Section):
    """A run's whole configuration. Build it with `load_config` or `parse_config`."""

    run: RunConfig
    model: ModelConfig
    tokenizer: TokenizerConfig
    data: DataConfig
    optimizer: OptimizerConfig
    train: TrainConfig
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    engine: EngineConfig = Field(default_factory=EngineConfig)
    validation: ValidationConfig = Field(default_factory=ValidationConfig)
    samples: SamplesConfig = Field(default_factory=SamplesConfig)
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    wandb: WandbConfig = Field(default_factory=WandbConfig)

    @property
    def sequence_length(self) -> int:
        """Tokens of a training sequence."""
        return self.train.sequence_length or self.model.context_length

    @property
    def global_batch_sequences(self) -> int:
        """Sequences of one optimizer step over all ranks."""
        return self.train.global_batch_tokens // self.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.train.total_tokens // self.train.global_batch_tokens

    def accumulation(self, world_size: int) -> int:
        """Micro-batches of each rank in one step.

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

    def identity(self) -> dict[str, Any]:
        """The keys that decide what the run computes, flat: dotted path to value."""
        flat = dict(_flatten(self.resolved()))
        return {
            key: value
            for key, value in flat.items()
            if not any(key.startswith(k) if k.endswith(".") else key == k for k in EXECUTION_KEYS)
        }

    def resolved(self) -> dict[str, Any]:
        """Plain data with every default that has an effect written out; parses back to an equal config."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """`resolved`, as YAML."""
        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)


def identity_hash(identity: Mapping[str, Any]) -> str:
    """sha256 of an identity mapping, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flatten(item, f"{prefix}{key}.")
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for index, item in enumerate(value):
            yield from _flatten(item, f"{prefix}{index}.")
    else:
        yield prefix.rstrip("."), value
