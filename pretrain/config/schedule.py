"""Config section `schedule`: the learning rate over the run, counted in tokens."""

from collections.abc import Collection
from typing import Literal

from pretrain.config.base import RESULT, Section
from pretrain.config.fields import Fraction, NonNegativeInt


class ScheduleConfig(Section):
    """One factor for the learning rates of all parameter groups: a warm-up, then a shape."""

    key_class = RESULT

    kind: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """`wsd`: constant, then a linear decay at the end; `cosine` and `linear`: decay from the end of the warm-up on;
    `constant`: no decay."""

    warmup_tokens: NonNegativeInt = 0
    """Tokens over which the factor rises linearly to 1."""

    decay_fraction: Fraction = 0.3
    """`wsd` only: share of `train.total_tokens` over which the rate decays at the end."""

    decay_start_tokens: NonNegativeInt | None = None
    """`wsd` only: where the decay starts, in tokens since the beginning of the run, instead of `decay_fraction`. It
    ends with the run. Unlike a share, it does not move when `train.total_tokens` changes, so the learning rates before
    it are those of every other run with the same warm-up that has not begun to decay; see `init.take`."""

    final_fraction: Fraction = 0.0
    """The factor at the end of the decay; not for `constant`."""

    def ineffective(self) -> dict[str, str]:
        """Return the options that the kind does not use."""
        starts = ("decay_fraction", "decay_start_tokens")
        if self.kind == "constant":
            return {
                **dict.fromkeys(starts, "constant has no decay"),
                "final_fraction": "a constant rate does not decay",
            }
        if self.kind != "wsd":
            return dict.fromkeys(starts, f"{self.kind} decays from the end of the warm-up on")
        if self.decay_start_tokens is None and self.decay_fraction == 0:
            return {"final_fraction": "with schedule.decay_fraction 0 the rate does not decay"}
        if self.final_fraction == 1:
            return dict.fromkeys(starts, "with schedule.final_fraction 1 the rate does not decay")
        if self.decay_start_tokens is not None:
            return {"decay_fraction": "schedule.decay_start_tokens says where the decay starts"}
        return {}

    def implied(self) -> Collection[str]:
        """Return the start of the decay if it is not given: at first there was only the fraction."""
        return () if self.decay_start_tokens is not None else ("decay_start_tokens",)

    def decay_start(self, total_tokens: int) -> float:
        """Return the tokens after which the rate of a run of `total_tokens` decays, for `wsd`."""
        if self.decay_start_tokens is not None:
            return self.decay_start_tokens
        return (1 - self.decay_fraction) * total_tokens
