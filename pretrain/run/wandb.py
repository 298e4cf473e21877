"""Logging of step records to Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from pretrain.config import Config

QUIET: dict[str, Any] = {
    **{"x_disable_meta": True, "x_disable_machine_info": True, "x_save_requirements": False},
    **{"disable_git": True, "disable_code": True, "save_code": False, "console": "off"},
}
"""What wandb does not collect by itself: the command line, the address of the repository and its changes, and what is
printed, all of which may hold secrets. The manifest has what matters of it."""
TIMEOUT_SECONDS = 60
"""How long an online run waits for the server before it continues offline."""


class Tracker(Protocol):
    """A destination for step records in addition to metrics.jsonl."""

    def log(self, record: dict[str, Any]) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class NoTracker:
    """A tracker that does nothing, for wandb.mode disabled and every rank but 0."""

    def log(self, record: dict[str, Any]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class WandbTracker:
    """Weights & Biases with our own step axis, so that a resumed run continues its curves.

    Args:
        config: the run's; its name is the wandb run's.
        folder: the run folder, where offline data goes.
        run_id: the same for every launch of the run.
        warn: called when the server cannot be reached and the run continues offline.
    """

    def __init__(self, config: Config, folder: Path, run_id: str, warn: Any) -> None:
        import wandb  # imported here: it is heavy, and only runs that ask for it need it

        def init(mode: Any) -> Any:
            return wandb.init(
                project=config.wandb.project,
                name=config.run.name,
                id=run_id,
                resume="allow",
                dir=folder,
                mode=mode,
                config=config.resolved(),
                settings=wandb.Settings(init_timeout=TIMEOUT_SECONDS, silent=True, **QUIET),
            )

        try:
            self.run = init(config.wandb.mode)
        except (wandb.Error, OSError) as error:
            warn(f"wandb cannot be reached, continuing offline: {str(error).splitlines()[0]}")
            wandb.teardown()  # the failed start still holds the run id
            self.run = init("offline")
        self.run.define_metric("*", step_metric="step")

    def log(self, record: dict[str, Any]) -> None:
        """Log the record of one step."""
        self.run.log({key: value for key, value in record.items() if value is not None and not isinstance(value, str)})

    def close(self) -> None:
        """Flush and finish."""
        self.run.finish()


def make_tracker(config: Config, folder: Path, run_id: str, rank: int, warn: Any) -> Tracker:
    """Return the tracker that `wandb.mode` asks for."""
    if config.wandb.mode == "disabled" or rank != 0:
        return NoTracker()
    return WandbTracker(config, folder, run_id, warn)
