"""The learning-rate factor as a function of the tokens seen.

Nothing is saved for it: the counters of the checkpoint (step, tokens) determine the factor, so a resume can
neither replay the warm-up nor take a step at rate 0.
"""

from __future__ import annotations

import math

from pretrain.config.schedule import ScheduleConfig


def lr_factor(config: ScheduleConfig, tokens: int, batch_tokens: int, total_tokens: int) -> float:
    """What the base learning rates are multiplied with in the step that starts after `tokens` tokens.

    The warm-up counts the step's own tokens, the decay does not, so that neither the first nor the last step has
    rate 0 (unless `final_fraction` and the arithmetic say so).
    """
    warmup = config.warmup_tokens
    rise = min(1.0, (tokens + batch_tokens) / warmup) if warmup else 1.0
    if config.kind == "constant":
        return rise
    start = (1 - config.decay_fraction) * total_tokens if config.kind == "wsd" else warmup
    length = total_tokens - start
    progress = min(1.0, max(0.0, (tokens - start) / length)) if length > 0 else 0.0
    shape = (1 + math.cos(math.pi * progress)) / 2 if config.kind == "cosine" else 1 - progress
    return rise * (config.final_fraction + (1 - config.final_fraction) * shape)
