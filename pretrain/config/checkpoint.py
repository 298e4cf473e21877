"""Config section `checkpoint`: when checkpoints are saved and which are kept."""

import re

from pydantic import Field, field_validator

from pretrain.config.base import EXECUTION, Section
from pretrain.config.fields import PositiveInt

_MIRROR = re.compile(r"(s3://|gs://)[A-Za-z0-9._-]+(/[A-Za-z0-9._=+-]+)*/?|file:///[^?#*@\x00-\x1f]+")


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

    mirror: str | None = Field(default=None, min_length=1)
    """Copy every checkpoint to ``<mirror>/<run.name>`` behind the training: a folder of an object store
    (``s3://bucket/folder`` or ``gs://bucket/folder``) or of another disk (``file:///folder``). A run whose own folder
    has no checkpoint resumes from the newest intact copy. Credentials come from the environment. An upload that fails
    is a warning."""

    max_failed_saves: PositiveInt | None = None
    """End the run when n saves in a row have failed, for example because the disk is full. None: warn each time and
    continue. If the last state of a run cannot be saved, the run fails in any case."""

    @field_validator("mirror")
    @classmethod
    def _is_plain_url(cls, mirror: str | None) -> str | None:
        # The message must not show the URL, which may hold a secret.
        if mirror is not None and not _MIRROR.fullmatch(mirror):
            raise ValueError(
                "expected s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or file:///FOLDER, without a user name, a password, a "
                "query or a pattern; credentials belong in the environment"
            )
        return mirror
