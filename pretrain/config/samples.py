"""Config section `samples`: text written by the model during training."""

from typing import Annotated

from pydantic import Field

from pretrain.config.base import EXECUTION, Section
from pretrain.config.fields import PositiveInt


class SamplesConfig(Section):
    """Text written by the model during training."""

    key_class = EXECUTION

    every_steps: PositiveInt | None = None
    """Write samples every n steps and at the end; null: none."""

    prompts: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = ("",)
    """What the samples continue; an empty prompt starts a document."""

    max_new_tokens: PositiveInt = 64
    """Tokens per sample."""

    temperature: float = Field(default=0.8, ge=0.01, le=100)
    """Sampling temperature. Near 0, the likeliest token always follows."""

    def ineffective(self) -> dict[str, str]:
        """Return every option but `every_steps` if no samples are written."""
        fields = ("prompts", "max_new_tokens", "temperature") if self.every_steps is None else ()
        return dict.fromkeys(fields, "samples.every_steps is null, so no samples are written")
