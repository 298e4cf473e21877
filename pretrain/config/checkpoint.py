"""Config section `checkpoint`: when checkpoints are saved and which are kept."""

from pretrain.config.base import EXECUTION, Section
from pretrain.config.fields import PositiveInt


class CheckpointConfig(Section):
    """When and how checkpoints are saved and which are kept. The last step is always saved."""

    key_class = EXECUTION

    save_every_steps: PositiveInt = 1000
    """Save every n steps."""

    asynchronous: bool = True
    """Write checkpoints while training continues. Each process copies its share of the state into host memory, which
    stays allocated, and writes the copy behind the next steps. With false, training waits until the checkpoint is
    written, and no copy is made."""

    keep_last: PositiveInt = 2
    """Keep the newest n. With 1, a damaged newest checkpoint leaves nothing to fall back to."""

    keep_every_steps: PositiveInt | None = None
    """Also keep, for good, the checkpoints whose step is a multiple of this."""

    max_failed_saves: PositiveInt | None = None
    """End the run when n saves in a row have failed, for example because the disk is full. None: warn each time and
    continue. If the last state of a run cannot be saved, the run fails in any case."""
