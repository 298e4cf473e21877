"""Config section `schedule`: the learning rate over the run, counted in tokens."""

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

    final_fraction: Fraction = 0.0
    """The factor at the end of the decay; not for `constant`."""

    def ineffective(self) -> dict[str, str]:
        """Return the options that the kind does not use."""
        if self.kind == "constant":
            without = {"decay_fraction": "constant has no decay", "final_fraction": "a constant rate does not decay"}
        elif self.kind != "wsd":
            without = {"decay_fraction": f"{self.kind} decays from the end of the warm-up on"}
        elif self.decay_fraction == 0:
            without = {"final_fraction": "with schedule.decay_fraction 0 the rate does not decay"}
        elif self.final_fraction == 1:
            without = {"decay_fraction": "with schedule.final_fraction 1 the rate does not decay"}
        else:
            without = {}
        return without
