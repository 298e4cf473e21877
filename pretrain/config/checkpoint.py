"""Config section `checkpoint`: when checkpoints are saved and which are kept."""

from pretrain.config.base import EXECUTION, Section
from pretrain.config.fields import PositiveInt


class CheckpointConfig(Section):
    """When checkpoints are saved and which are kept. The last step is always saved."""

    key_class = EXECUTION

    save_every_steps: PositiveInt = 1000
    """Save every n steps."""

    keep_last: PositiveInt = 2
    """Keep the newest n. With 1, a damaged newest checkpoint leaves nothing to fall back to."""

    keep_every_steps: PositiveInt | None = None
    """Also keep, for good, the checkpoints whose step is a multiple of this."""
