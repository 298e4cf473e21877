"""Logging of step records to Weights & Biases.

A step is sent once a checkpoint holds it. So a restart, or a roll-back to the last checkpoint, never repeats a step
that was sent, and each step appears once, with the values that count. What was not sent before a process died is read
from metrics.jsonl at the next launch.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from pretrain.config import Config
from pretrain.files import replace_text
from pretrain.processes.redaction import redact
from pretrain.run.folder import RunFolder
from pretrain.run.reader import Run
from pretrain.run.wandb_scores import AXIS, ScoreQueue

QUIET: dict[str, Any] = {
    **{"x_disable_meta": True, "x_disable_machine_info": True, "x_save_requirements": False},
    **{"disable_git": True, "disable_code": True, "save_code": False, "console": "off"},
}
"""What wandb does not collect by itself: the command line, the address of the repository and its changes, and what is
printed, all of which may hold secrets. The manifest has what matters of it."""
TIMEOUT_SECONDS = 60
"""How long an online run waits for the server before it continues offline."""
LOOK_SECONDS = 10.0
"""How often the tracker looks for a new checkpoint."""
NOTE = "aurora-sent.json"
"""The last step that was sent, in wandb's folder of the run."""


class Tracker(Protocol):
    """A destination for step records in addition to metrics.jsonl."""

    def log(self, record: dict[str, Any]) -> None: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class ScoreTracker(Tracker, Protocol):
    """A destination for evaluations as well."""

    def log_scores(self, scores: dict[str, Any]) -> None: ...  # noqa: D102


class NoTracker:
    """A tracker that does nothing, for wandb.mode disabled and every rank but 0."""

    def log(self, record: dict[str, Any]) -> None:
        """Do nothing."""

    def log_scores(self, scores: dict[str, Any]) -> None:
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
        mode: ``online`` or ``offline``; None: that of the config.
    """

    def __init__(self, config: Config, folder: Path, run_id: str, warn: Any, mode: str | None = None) -> None:
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
            self.run = init(mode or config.wandb.mode)
        except (wandb.Error, OSError) as error:
            warn(f"wandb cannot be reached, continuing offline: {str(error).splitlines()[0]}")
            wandb.teardown()  # the failed start still holds the run id
            self.run = init("offline")
        self.run.define_metric("*", step_metric="step")
        self._of_scores: set[str] = set()

    def log(self, record: dict[str, Any]) -> None:
        """Log the record of one step."""
        self.run.log({key: value for key, value in record.items() if value is not None and not isinstance(value, str)})

    def log_scores(self, scores: dict[str, Any]) -> None:
        """Log the evaluation of a checkpoint, on an axis of its own: see `AXIS`."""
        for name in sorted(scores.keys() - self._of_scores):
            # Otherwise they would fall under "*" above, and wandb would add a step to them, at which nothing happened.
            self.run.define_metric(name, step_metric=None if name == AXIS else AXIS, step_sync=False)
            self._of_scores.add(name)
        self.run.log(scores)

    def close(self) -> None:
        """Flush and finish."""
        self.run.finish()


class SavedSteps:
    """Hands records on to a tracker once a checkpoint holds their steps.

    Args:
        tracker: gets each step once.
        note: the file that holds the last step that was sent.
        saved: returns the step of the newest checkpoint.
        start: the step after which this launch trains.
        earlier: the records up to `start`, read from metrics.jsonl only if some of them were not sent.
        scores: evaluations that are sent as well.
        warn: prints a warning. Training does not depend on wandb, whose own process may die: after an error nothing
            more is sent by this launch, and the next one sends what is missing.
    """

    def __init__(
        self,
        tracker: ScoreTracker,
        note: Path,
        saved: Callable[[], int],
        start: int,
        earlier: Callable[[], Iterable[dict[str, Any]]],
        scores: ScoreQueue | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.tracker, self._note, self._saved, self._scores, self._warn = tracker, note, saved, scores, warn
        self._failed = False
        self._held: deque[dict[str, Any]] = deque()
        self._sent = self._noted = self._read_note()
        self._looked = time.monotonic()
        if self._sent < start:
            self._held.extend(record for record in earlier() if record.get("step", 0) <= start)
            self._try(lambda: self._send(start))

    def log(self, record: dict[str, Any]) -> None:
        """Hold the record of one step; send those that a checkpoint holds by now."""
        if self._failed:
            return
        while self._held and self._held[-1]["step"] >= record["step"]:
            self._held.pop()  # rolled back
        self._held.append(record)
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._try(self._send_all)
            self._looked = time.monotonic()

    def close(self) -> None:
        """Send what a checkpoint holds, and finish."""
        self._try(self._send_all)
        self._try(self.tracker.close)

    def _try(self, work: Callable[[], None]) -> None:
        """Do what may fail for reasons of wandb's own, once."""
        if self._failed:
            return
        try:
            work()
        except Exception as error:  # of whatever wandb is made of
            self._failed = True
            self._held.clear()
            first = redact((str(error).splitlines() or [""])[0])
            self._warn(
                f"wandb: {type(error).__name__}: {first}; this launch sends nothing more to wandb, and the next one "
                "sends what is missing"
            )

    def _send_all(self) -> None:
        self._send(self._saved())
        self._send_scores()

    def _send_scores(self) -> None:
        if self._scores is not None:
            with contextlib.suppress(OSError):  # the next look, or the next launch, sends them
                self._scores.send(self.tracker.log_scores)

    def _send(self, step: int) -> None:
        try:
            while self._held and self._held[0]["step"] <= step:
                record = self._held.popleft()
                if record["step"] > self._sent:
                    self.tracker.log(record)
                    self._sent = record["step"]
        finally:
            if self._sent > self._noted:
                with contextlib.suppress(OSError):  # a full disk; the next look tries again
                    replace_text(self._note, json.dumps({"step": self._sent}))
                    self._noted = self._sent

    def _read_note(self) -> int:
        try:
            return int(json.loads(self._note.read_text(encoding="utf-8"))["step"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0


def make_tracker(config: Config, folder: RunFolder, run_id: str, rank: int, start: int, warn: Any) -> Tracker:
    """Return the tracker that `wandb.mode` asks for.

    Args:
        config: the run's.
        folder: the run folder, where offline data goes.
        run_id: the same for every launch of the run.
        rank: of this process; only rank 0 logs.
        start: the step after which this launch trains.
        warn: prints a warning.
    """
    if config.wandb.mode == "disabled" or rank != 0:
        return NoTracker()
    note = folder.path / "wandb" / NOTE
    sent_by_older_version = not note.exists() and any(folder.path.glob("wandb/*run-*"))
    tracker = WandbTracker(config, folder.path, run_id, warn)
    note.parent.mkdir(exist_ok=True)
    if sent_by_older_version:  # which sent each step immediately
        replace_text(note, json.dumps({"step": start}))
    return SavedSteps(
        tracker,
        note,
        saved=lambda: max(Run(folder, {}, {}).checkpoints, default=0),
        start=start,
        earlier=lambda: Run(folder, {}, {}).records,
        scores=ScoreQueue(folder.path / "wandb"),
        warn=warn,
    )
