"""In which dtypes a run keeps its weights and multiplies its matrices."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pretrain.config.engine import EngineConfig
from pretrain.config.train import TrainConfig


@dataclass(frozen=True)
class Precision:
    """The run's two dtypes: stored weights and matrix products."""

    weights: torch.dtype
    autocast: torch.dtype | None

    @property
    def is_bf16(self) -> bool:
        """Whether matrix products are in bf16."""
        return torch.bfloat16 in (self.weights, self.autocast)

    def __str__(self) -> str:
        # Checkpoints record this text, and a resume compares it: do not reword it.
        if self.weights != torch.float32:
            return f"{_name(self.weights)} weights beside fp32 ones"
        products = "no autocast" if self.autocast is None else f"{_name(self.autocast)} autocast"
        return f"{_name(self.weights)} weights, {products}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def resolve_precision(train: TrainConfig, engine: EngineConfig, *, fast_bf16: bool) -> Precision:
    """The dtypes that `train.precision` stands for under an engine.

    ``auto`` is bf16 where the device multiplies bf16 faster than fp32 (`fast_bf16`). The plain engine keeps fp32
    weights and uses autocast; DeepSpeed and FSDP2 compute with bf16 weights, beside fp32 ones that the optimizer steps.
    """
    bf16 = train.precision == "bf16" or (train.precision == "auto" and fast_bf16)
    if engine.kind != "plain":
        return Precision(torch.bfloat16 if bf16 else torch.float32, None)
    return Precision(torch.float32, torch.bfloat16 if bf16 else None)
