"""The learning-rate factor as a function of the tokens seen.

The schedule has no state: the checkpoint's token counter determines the factor, so a resumed run can neither repeat the
warm-up nor take a step with learning rate 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pretrain.config import Config
from pretrain.config.schedule import ScheduleConfig


def lr_factor(config: ScheduleConfig, tokens: int, batch_tokens: int, total_tokens: int) -> float:
    """Return the factor for the base learning rates in the step that starts after `tokens` tokens.

    The warm-up counts the step's own tokens and the decay does not, so that neither the first nor the last step has
    learning rate 0 (unless `final_fraction` is 0 and the factor rounds to it).
    """
    warmup = config.warmup_tokens
    rise = min(1.0, (tokens + batch_tokens) / warmup) if warmup else 1.0
    if config.kind == "constant":
        return rise
    start = config.decay_start(total_tokens) if config.kind == "wsd" else warmup
    length = total_tokens - start
    progress = min(1.0, max(0.0, (tokens - start) / length)) if length > 0 else 0.0
    shape = (1 + math.cos(math.pi * progress)) / 2 if config.kind == "cosine" else 1 - progress
    return rise * (config.final_fraction + (1 - config.final_fraction) * shape)


def set_learning_rates(groups: Sequence[dict[str, Any]], config: Config, tokens: int) -> dict[str, float]:
    """Set every group's learning rate for the step that starts after `tokens` tokens; return the rates to be logged."""
    train = config.train
    factor = lr_factor(config.schedule, tokens, train.global_batch_tokens, train.total_tokens)
    for group in groups:
        group["lr"] = group["base_lr"] * factor
    rates = {"lr": next((group for group in groups if group["role"] == "hidden"), groups[0])["lr"]}
    own = config.optimizer.adamw.lrs()
    for group in groups:
        if group["kind"] == "adamw":
            rates[f"{group['role']}_lr" if group["role"] in own else "adamw_lr"] = group["lr"]
    return rates
