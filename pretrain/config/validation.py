"""Config section `validation`: loss and bits per byte on the validation split."""

from pretrain.config.base import EXECUTION, Section
from pretrain.config.fields import PositiveInt


class ValidationConfig(Section):
    """Loss and bits per byte on the validation split."""

    key_class = EXECUTION

    every_steps: PositiveInt | None = None
    """Validate every n steps and at the end; null: only at the end."""

    batch_sequences: PositiveInt | None = None
    """Sequences of one forward pass per rank; null: `train.micro_batch_sequences`."""

    max_tokens: PositiveInt = 10_000_000
    """Tokens of the validation split that are used, from its beginning: enough for a standard error far below any
    difference of interest, and few enough to be kept in memory (40 MB)."""
