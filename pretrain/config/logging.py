"""Config section `logging`: what is printed while training."""

from pretrain.config.base import EXECUTION, Section
from pretrain.config.fields import PositiveInt


class LoggingConfig(Section):
    """What is printed while training; metrics.jsonl always gets every step."""

    key_class = EXECUTION

    every_steps: PositiveInt = 10
    """Print a line every n steps (a progress bar is updated every step)."""
