"""Config section `schedule`: the learning rate over the run, counted in tokens."""

from typing import Literal

from pretrain.config.base import Section
from pretrain.config.fields import Fraction, NonNegativeInt


class ScheduleConfig(Section):
    """One factor for the learning rates of all parameter groups: warm-up, then the kind's shape."""

    kind: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """`wsd`: flat, then linear decay over the last part; `cosine` and `linear`: decay from the end
    of the warm-up on; `constant`: no decay."""

    warmup_tokens: NonNegativeInt = 0
    """Tokens over which the factor rises linearly to 1."""

    decay_fraction: Fraction = 0.3
    """`wsd` only: share of `train.total_tokens` over which the rate decays at the end."""

    final_fraction: Fraction = 0.0
    """The factor that the decay ends at; not for `constant`."""

    def ineffective(self) -> dict[str, str]:
        """The options that the kind does not use."""
        without = {} if self.kind == "wsd" else {"decay_fraction": f"{self.kind} has no separate decay"}
        return without | ({"final_fraction": "a constant rate does not decay"} if self.kind == "constant" else {})
