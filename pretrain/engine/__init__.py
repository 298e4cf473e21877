"""Engines, which carry out training steps: device placement, precision, backward pass and gradient reduction."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.config import Config
    from pretrain.engine.base import Engine


def make_engine(config: Config) -> Engine:
    """Create the engine that the config names, over all processes of the run."""
    # Each engine is imported when it is chosen: DeepSpeed takes seconds to import, and code that only reads
    # checkpoints, and so only needs `pretrain.engine.ranks`, needs neither.
    if config.engine.kind == "deepspeed":
        from pretrain.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config)
    if config.engine.kind == "fsdp2":
        from pretrain.engine.fsdp2 import Fsdp2Engine

        return Fsdp2Engine(config)
    from pretrain.engine.plain import PlainEngine

    return PlainEngine(config)
