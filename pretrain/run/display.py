"""The progress display on rank 0."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

_UNUSUAL = {"validation_loss", "skipped", "loss_spike"}
"""Keys of a record that is shown although its step is not due."""


class Display:
    """A progress bar on a terminal, plain lines otherwise; silent on every rank but 0.

    Args:
        rank: rank of this process.
        every_steps: number of steps between lines.
    """

    def __init__(self, rank: int, every_steps: int) -> None:
        self.silent = rank != 0
        self.every_steps = every_steps
        self.bar: tqdm[Any] | None = None
        self.on_warning: Callable[[str], None] = lambda text: None
        """Called with each warning of rank 0."""
        self._rank = rank

    def say(self, text: str) -> None:
        """Print a line."""
        if self.silent:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.say(f"warning: {text}")
        if self._rank == 0:
            self.on_warning(text)

    def start(self, step: int, total_steps: int) -> None:
        """Start the display of a training that continues after `step`."""
        self.total_steps = total_steps
        if not self.silent and sys.stdout.isatty():
            self.bar = tqdm(total=total_steps, initial=step, unit="step", dynamic_ncols=True, file=sys.stdout)

    def step(self, record: dict[str, Any]) -> None:
        """Show a step's record."""
        if self.bar is not None:
            self.bar.update()
        due = record["step"] % self.every_steps == 0 or record["step"] in (1, self.total_steps)
        if self.silent or not (due or _UNUSUAL & record.keys()):
            return
        self.say(step_line(record, self.total_steps))

    def close(self) -> None:
        """Close the display at the end of training."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def step_line(record: dict[str, Any], total_steps: int) -> str:
    """One line with the main numbers of a step."""
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
        parts.append(f"SKIPPED: {record.get('skipped_because', 'gradients not finite')}")
    elif "loss_spike" in record:
        parts.append("LOSS SPIKE")
    if "validation_loss" in record:
        parts.append(
            f"validation loss {record['validation_loss']:.4f}, {record['validation_bits_per_byte']:.4f} bits per byte"
        )
    return " | ".join(parts)
