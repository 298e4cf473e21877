"""Config section `watch`: heartbeats, the watchdog, stragglers, alerts, and the check of memory before step 1."""

import re
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from pretrain.config.base import EXECUTION, Section


def valid_webhook(value: str) -> str:
    """Return `value` if it says where the URL of the webhook is kept; ValueError otherwise."""
    if not re.fullmatch(r"env:[A-Za-z_][A-Za-z0-9_]*|file:[^\x00]+", value):
        raise ValueError("expected env:NAME (an environment variable) or file:PATH; the URL itself is a secret")
    return value


class WatchConfig(Section):
    """Heartbeats and the watchdog, stragglers, alerts, and the check of memory before step 1.

    Every rank writes a small file, its heartbeat, into `heartbeats/` of the run folder. None of this changes the
    training.
    """

    key_class = EXECUTION

    hang_seconds: Annotated[float, Field(ge=1)] | None = 300.0
    """End a run that makes no progress for so long, with exit code 1, after naming the rank and the phase that hang
    and writing the stacks of all ranks into `heartbeats/`. It applies from the second step on. A rank whose sources
    are remote may also wait `data.retry_minutes` for data, one that is computing while it prepares data has no limit,
    and any phase may take five times as long as it ever took.
    null: never, for example in a debugger."""

    slow_seconds: Annotated[float, Field(ge=1)] = 1500.0
    """The same for what takes long: everything before the second step (with `train.compile`, before the fourth),
    validation, samples, telemetry and saves. NCCL and gloo give up after 30 minutes, without a name."""

    straggler_factor: Annotated[float, Field(gt=1)] | None = 1.5
    """Warn of a rank whose forward passes take more than this many times as long as those of the median rank; null:
    never."""

    webhook: Annotated[str, AfterValidator(valid_webhook)] | None = None
    """Where alerts are sent: `env:NAME` or `file:PATH`, an environment variable or a file that holds an http(s) URL.
    Failures, hangs, warnings, stragglers, stops and the end of a run are posted as JSON whose `text` a chat channel
    can show. An alert that cannot be delivered is dropped after three tries; it never ends or delays a step."""

    dry_run: bool | None = None
    """Before the first step of a launch, run the largest micro-batch forward and backward, and the validation batch
    forward, without changing anything, so that a lack of memory shows in the first minute. null: on GPUs. Skipped with
    `engine.zero_stage` 3, whose forward pass records the order of the layers, and with `engine.kind` fsdp2."""

    @model_validator(mode="after")
    def _slow_is_slower(self) -> "WatchConfig":
        if self.hang_seconds is not None and self.slow_seconds < self.hang_seconds:
            raise ValueError(
                f"slow_seconds: expected at least watch.hang_seconds ({self.hang_seconds:g}), got {self.slow_seconds:g}"
            )
        return self

    def ineffective(self) -> dict[str, str]:
        """Return `slow_seconds` if nothing is ended."""
        return {"slow_seconds": "watch.hang_seconds is null"} if self.hang_seconds is None else {}
