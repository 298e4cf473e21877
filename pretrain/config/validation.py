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
    """Tokens of the validation split that are used: enough for a standard error far below any difference of interest,
    and few enough to be kept in memory (40 MB). Of local text, those from the beginning of the split. Of remote and
    prepared sources, a sample over all files, in which each source has its share of the run's tokens; it is drawn when
    the run begins, and kept in the run folder."""

    max_read_mib: PositiveInt = 512
    """How much of remote and prepared sources is read at most to find the documents of the validation split, in MiB.
    That bounds the split as well: at the default `data.validation_fraction`, 512 MiB of text hold about 10 MiB of it,
    or 2.5 million tokens. Prepared data is found without reading the rest. No effect on local text."""
