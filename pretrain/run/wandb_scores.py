"""Evaluation results on their way to the Weights & Biases run of the training run.

Two processes must not write to the same wandb run. So a result is appended to a file in the run folder, and whoever has
the wandb run open sends it: the training process while it trains, and otherwise the process that evaluates.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pretrain.files import replace_text
from pretrain.locks import locked

AXIS = "eval/step"
"""The step of the checkpoint, by which wandb draws results. wandb's own counter only ever rises, and the training may
be far ahead of the checkpoint."""


MODES = ("online", "offline")
"""The modes of wandb in which results are sent."""


def score_mode(configured: str) -> str:
    """Return how results are sent: by WANDB_MODE, or else as the run's `wandb.mode` says."""
    return os.environ.get("WANDB_MODE") or configured


class ScoreQueue:
    """The results that are logged, and how many of them have been sent.

    Args:
        folder: wandb's folder in the run folder; need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self._file, self._note, self._lock = (
            folder / f"aurora-scores{suffix}" for suffix in (".jsonl", "-sent.json", ".lock")
        )

    def add(self, step: int, values: dict[str, float]) -> None:
        """Append a result.

        Args:
            step: of the checkpoint.
            values: by name, which should begin with ``eval/``.

        Raises:
            OSError: it cannot be written.
        """
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with locked(self._lock):
            cut_off = self._file.exists() and not self._file.read_bytes().endswith(b"\n")  # by a crash
            with self._file.open("a", encoding="utf-8") as file:
                file.write("\n" * cut_off + json.dumps({AXIS: step, **values}) + "\n")

    def send(self, log: Callable[[dict[str, Any]], None]) -> int:
        """Call `log` for each result that has not been sent; return how many there were.

        Raises:
            OSError: the files cannot be read or written.
        """
        if not self._file.exists():
            return 0
        with locked(self._lock):
            lines = self._file.read_text(encoding="utf-8").splitlines()
            sent = self._sent()
            for place, line in enumerate(lines[sent:], start=sent + 1):
                with contextlib.suppress(ValueError):  # a line that a crash cut off
                    log(json.loads(line))
                replace_text(self._note, json.dumps({"lines": place}))
            return len(lines[sent:])

    def _sent(self) -> int:
        try:
            return int(json.loads(self._note.read_text(encoding="utf-8"))["lines"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0
