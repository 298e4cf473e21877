"""What carries out a training step: placement, precision, the backward pass and its reduction over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pretrain.config import Config
    from pretrain.engine.base import Engine


def make_engine(config: Config) -> Engine:
    """The engine that the config names, over all processes that were started."""
    # Each engine loads its libraries when it is chosen: DeepSpeed takes seconds, and readers of checkpoints, which
    # need `pretrain.engine.ranks` alone, need neither.
    if config.engine.kind == "deepspeed":
        from pretrain.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(config)
    from pretrain.engine.plain import PlainEngine

    return PlainEngine(config)
