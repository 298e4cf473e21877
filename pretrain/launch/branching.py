"""What a run that continues another one at its next step must have in common with it, and what it may change."""

from __future__ import annotations

import math
from collections.abc import Iterator

from pretrain.config import Config
from pretrain.run.identity import Identity, differences
from pretrain.training.schedule import lr_factor

_BOUND = ("data.", "tokenizer", "train.global_batch_tokens", "train.sequence_length")
"""The beginnings of the keys that decide which tokens the next step reads."""
_MIXTURES = ("data.mixture", "data.stages")
_MOST_FACTORS = 1000


def continuation_problems(
    saved: Config, before: Identity, config: Config, now: Identity | None, tokens: int
) -> list[str]:
    """Return what differs although the next step of the earlier run depends on it.

    Args:
        saved: the config of the earlier run.
        before: its identity.
        config: of the new run.
        now: its identity; None: its files are not on this machine, and only its keys are compared.
        tokens: trained on so far.
    """
    problems = []
    if config.train.total_tokens <= tokens:
        problems.append(
            f"train.total_tokens: expected more than the {tokens:,} tokens of the earlier run, which count with "
            f"init.take all, got {config.train.total_tokens:,}"
        )
    was, wanted = before.result, now.result if now else config.keys_of("result")
    if now is None:
        was = {key: value for key, value in was.items() if key in wanted}
        wanted = {key: value for key, value in wanted.items() if key in was}
    problems += [
        f"{key}: {was.get(key)!r} in the earlier run, {wanted.get(key)!r} now: restore it, or set "
        "init.take=weights+optimizer to begin the data anew"
        for key in sorted(was.keys() | wanted.keys())
        if key.startswith(_BOUND) and not key.startswith(_MIXTURES) and was.get(key) != wanted.get(key)
    ]
    if _differ_before(saved, config, tokens):
        problems.append(
            f"data.mixture or data.stages: they differ from the earlier run's within the {tokens:,} tokens that it "
            "has read: keep its mixture as a first stage with until_tokens at least there, or set "
            "init.take=weights+optimizer"
        )
    return problems


def _differ_before(saved: Config, config: Config, tokens: int) -> bool:
    """Whether the mixtures of two configs differ before a number of tokens."""
    if (saved.data.mixture or saved.data.stages) is None or (config.data.mixture or config.data.stages) is None:
        return (saved.data.mixture, saved.data.stages) != (config.data.mixture, config.data.stages)
    earlier, later = list(_stages(saved)), list(_stages(config))
    for (shares, until), (new_shares, new_until) in zip(earlier, later, strict=False):
        if shares != new_shares:
            return True
        if until > tokens:
            return new_until < tokens
        if until != new_until:
            return True
    return len(earlier) > len(later)


def _stages(config: Config) -> Iterator[tuple[dict[str, float], float]]:
    """The shares of each stage, which add up to 1, and where it ends."""
    data = config.data
    found = [(stage.mixture, stage.until_tokens) for stage in data.stages or ()] or [(data.mixture or {}, None)]
    for mixture, until in found:
        total = sum(mixture.values())
        yield {name: round(share / total, 12) for name, share in mixture.items() if share}, until or math.inf


def continuation_notes(saved: Config, config: Config, tokens: int) -> list[str]:
    """Return a warning if the steps before would have had other learning rates or settings."""
    notes = []
    free = ("optimizer.", "train.grad_clip")
    before, after = (
        {key: value for key, value in one.keys_of("result").items() if key.startswith(free)} for one in (saved, config)
    )
    if changed := differences(before, after):
        notes.append(f"settings that change from the next step on: {'; '.join(changed)}")
    return notes + schedule_notes(saved, config, tokens)


def schedule_notes(saved: Config, config: Config, tokens: int) -> list[str]:
    """Return a warning if the steps before would have had other learning rates with the schedule of `config`."""
    before, after = (_factors(one, tokens) for one in (saved, config))
    if before == after:
        return []
    return [
        f"the schedule gives other learning rates for the first {tokens:,} tokens than those they were trained with: "
        f"its factor was {before[-1]:.6g} at the last step and would have been {after[-1]:.6g}, so the result is not "
        "that of a run with this schedule from its start"
    ]


def _factors(config: Config, tokens: int) -> list[float]:
    """The factors of the steps before, at most `_MOST_FACTORS` of them and the last one."""
    batch = config.train.global_batch_tokens
    steps = tokens // batch
    chosen = [*range(0, steps, max(1, steps // _MOST_FACTORS)), max(0, steps - 1)]
    return [lr_factor(config.schedule, step * batch, batch, config.train.total_tokens) for step in chosen]
