"""Config section `wandb`: Weights & Biases, optional."""

from typing import Annotated, Literal

from pretrain.config.base import EXECUTION, NOTE, Section


class WandbConfig(Section):
    """Weights & Biases, optional."""

    mode: Annotated[Literal["disabled", "offline", "online"], EXECUTION] = "disabled"
    """`offline` writes into the run folder, to be synchronised later; `online` falls back to `offline` with a warning
    if the server cannot be reached."""

    project: Annotated[str, NOTE] = "aurora-pretrain"
    """The project under which the run appears."""

    def ineffective(self) -> dict[str, str]:
        """Return the project if nothing is sent."""
        return {"project": "wandb.mode is disabled"} if self.mode == "disabled" else {}
