"""What a person watches: the progress display on rank 0, and wandb."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from pretrain.config import Config

WANDB_TIMEOUT_SECONDS = 60  # how long an online run waits for the server before it goes on offline


class Display:
    """A progress bar on a terminal, plain lines otherwise; silent on every rank but 0.

    Args:
        rank: of this process.
        every_steps: plain lines and bar texts are shown every so many steps.
    """

    def __init__(self, rank: int, every_steps: int) -> None:
        self.silent = rank != 0
        self.every_steps = every_steps
        self.bar: tqdm[Any] | None = None

    def say(self, text: str) -> None:
        """Print a line."""
        if self.silent:
            return
        with self._while_read():
            if self.bar is not None:
                self.bar.write(text)
            else:
                print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.say(f"warning: {text}")

    def start(self, step: int, total_steps: int) -> None:
        """Training begins after `step`."""
        self.total_steps = total_steps
        if not self.silent and sys.stdout.isatty():
            self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, file=sys.stdout)

    def step(self, record: dict[str, Any]) -> None:
        """Show a step's record."""
        if self.bar is not None:
            with self._while_read():
                self.bar.update()
        due = record["step"] % self.every_steps == 0 or record["step"] in (1, self.total_steps)
        if self.silent or not (due or "validation_loss" in record or "skipped" in record):
            return
        self.say(step_line(record, self.total_steps))

    def close(self) -> None:
        """Training ended."""
        if self.bar is not None:
            with self._while_read():
                self.bar.close()
            self.bar = None

    @contextlib.contextmanager
    def _while_read(self) -> Iterator[None]:
        """Fall silent, rather than end the run, when nobody reads standard output any more (``| head``)."""
        try:
            yield
        except OSError as error:
            self.silent, self.bar = True, None
            with contextlib.suppress(OSError, ValueError):
                # What Python still holds for it would fail again at exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(f"warning: standard output failed ({error.strerror}); training continues silently\n")


def step_line(record: dict[str, Any], total_steps: int) -> str:
    """One line with what one wants to know of a step."""
    per_second = record["tokens_per_second"]
    left = (total_steps - record["step"]) * record["tokens"] / record["step"] / per_second
    parts = [
        f"step {record['step']:>{len(str(total_steps))}}/{total_steps}",
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.2e}",
        f"grad {record['grad_norm']:.3f}",
        f"{per_second:,.0f} tok/s",
    ]
    if "mfu" in record:
        parts.append(f"mfu {record['mfu']:.1%}")
    minutes, seconds = divmod(round(left), 60)
    hours, minutes = divmod(minutes, 60)
    parts.append(f"left {hours}:{minutes:02}:{seconds:02}" if hours else f"left {minutes}:{seconds:02}")
    if "skipped" in record:
        parts.append("SKIPPED: gradients not finite")
    if "validation_loss" in record:
        parts.append(
            f"validation loss {record['validation_loss']:.4f}, {record['validation_bits_per_byte']:.4f} bits per byte"
        )
    return " | ".join(parts)


class Tracker(Protocol):
    """Where records go besides metrics.jsonl."""

    def log(self, record: dict[str, Any]) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class NoTracker:
    """wandb.mode disabled, and every rank but 0."""

    def log(self, record: dict[str, Any]) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class WandbTracker:
    """Weights & Biases with our own step axis, so that a resumed run continues its curves.

    Args:
        config: the run; its name and identity make the wandb run id.
        folder: the run folder, where offline data goes.
        run_id: the same for every launch of the run.
        warn: called when the server cannot be reached and the run goes on offline.
    """

    def __init__(self, config: Config, folder: Path, run_id: str, warn: Any) -> None:
        import wandb  # optional: only runs that ask for it pay for its import

        def init(mode: Any) -> Any:
            return wandb.init(
                project=config.wandb.project,
                name=config.run.name,
                id=run_id,
                resume="allow",
                dir=folder,
                mode=mode,
                config=config.resolved(),
                settings=wandb.Settings(init_timeout=WANDB_TIMEOUT_SECONDS, silent=True),
            )

        try:
            self.run = init(config.wandb.mode)
        except (wandb.Error, OSError) as error:
            warn(f"wandb cannot be reached, going on offline: {str(error).splitlines()[0]}")
            wandb.teardown()  # the failed start still holds the run id
            self.run = init("offline")
        self.run.define_metric("*", step_metric="step")

    def log(self, record: dict[str, Any]) -> None:
        """One step's record."""
        self.run.log({key: value for key, value in record.items() if value is not None and not isinstance(value, str)})

    def close(self) -> None:
        """Flush and finish."""
        self.run.finish()


def make_tracker(config: Config, folder: Path, run_id: str, rank: int, warn: Any) -> Tracker:
    """The tracker that `wandb.mode` asks for."""
    if config.wandb.mode == "disabled" or rank != 0:
        return NoTracker()
    return WandbTracker(config, folder, run_id, warn)
