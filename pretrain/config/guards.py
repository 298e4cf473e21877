"""Config section `guards`: what happens when a loss jumps, a rank computes something else, or garbage piles up."""

from typing import Annotated, Literal

from pydantic import Field

from pretrain.config.base import EXECUTION, Section
from pretrain.config.fields import PositiveFloat, PositiveInt


class GuardsConfig(Section):
    """Guards of the training against bad numbers. A step whose loss or gradient is NaN or infinite on any rank is
    always skipped on all of them; see `train.max_skipped_steps` for how often."""

    key_class = EXECUTION

    on_loss_spike: Literal["ignore", "warn", "skip", "roll_back"] = "warn"
    """What to do when the loss of a step is far above the losses before it. `warn`: train on, and mark the step in the
    metrics and on the display. `skip`: leave weights and optimizer as they are, as for a gradient that is not finite.
    `roll_back`: return to the last checkpoint and continue with the batch after the spike, so that no batch since
    that checkpoint is trained on; as long as there is no checkpoint, for example because saves have failed, warn. A
    change takes effect from the next launch on, also in a run that has begun."""

    spike_window: Annotated[int, Field(ge=8, le=100_000)] = 128
    """Number of recent losses that a loss is compared with. They are saved in checkpoints. Until there are 16 of them,
    or a whole smaller window, no loss is a spike."""

    spike_threshold: PositiveFloat = 10.0
    """A loss is a spike if it is above the median of the window by this many standard deviations. The deviation is
    estimated from the median absolute deviation, which a few outliers do not move, and is at least 0.5 % of the
    median."""

    max_rollbacks: PositiveInt = 3
    """Stop with an error at the first spike after the run has been rolled back this often."""

    keep_bad_batches: Annotated[int, Field(ge=0)] = 20
    """Keep the token ids of the batches of so many steps that were skipped or had a loss spike, the newest ones, in
    the run folder's `bad_batches/`, with the places of their documents in the data. 0: keep none."""

    compare_weights_every_steps: PositiveInt | None = 1000
    """Compare a hash of the weights over all ranks every n steps and before every save; null: only once, after the
    first step of each launch. Ranks that hold the same weights must keep them bit for bit: a difference means broken
    hardware. It names the ranks and ends the run before anything is saved. One comparison reads all weights once; a
    single rank has nothing to compare."""

    gc_every_steps: PositiveInt | None = 50
    """Collect Python's garbage every n steps, at the same time on all ranks, instead of whenever Python decides, when
    all other ranks would have to wait for the one that collects. null: whenever Python decides."""

    def ineffective(self) -> dict[str, str]:
        """Return the options of spikes if those are ignored, and of rolling back if there is none."""
        found: dict[str, str] = {}
        if self.on_loss_spike == "ignore":
            found |= dict.fromkeys(("spike_window", "spike_threshold"), "guards.on_loss_spike is ignore")
        if self.on_loss_spike != "roll_back":
            found["max_rollbacks"] = "guards.on_loss_spike is not roll_back"
        return found
