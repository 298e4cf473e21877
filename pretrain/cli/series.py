"""Evaluate the checkpoints of a run one after another, also while it trains: ``aurora eval RUN --every-checkpoint``.

A result belongs to the checkpoint whose digest it records, so a checkpoint that was trained again after a roll back is
evaluated again. Several processes may be started for the same run: all but one of them wait.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from eval.errors import EvalError
from eval.results import RESULT_FILE, read_result
from eval.schema import EvalResult
from eval.scores import shots_of
from pretrain.checkpoint.format import INDEX, CheckpointError, digest_of
from pretrain.checkpoint.store import CheckpointReader, list_checkpoints, step_of
from pretrain.cli.log_scores import ScoreLog
from pretrain.locks import locked
from pretrain.processes.errors import UserError
from pretrain.processes.parent import is_orphaned
from pretrain.run.folder import RunFolder
from pretrain.run.reader import read_run

POLL_SECONDS = 5.0
"""How often a process that follows a run looks for new checkpoints."""
LOCK = ".series.lock"
Activity = Literal["done", "training", "idle"]
"""done: trained to its end. training: a process trains it. idle: neither, for example before it is requeued."""


Need = Literal["new", "more", "another"]
"""There is no result; there is one with fewer tasks or other items; there is one of another checkpoint."""


@dataclass(frozen=True)
class Request:
    """What a checkpoint's result must hold."""

    shots: Mapping[str, int]
    """Task, or group of tasks -> number of solved examples in its prompts."""
    limit: int | None
    """Items of each task; None: all. A result of all items has those of every limit."""
    selection: str
    items: str
    """``packaged`` or ``hub``."""
    dtype: str = "auto"
    """Of the weights; ``auto``: any."""
    texts: Sequence[str] = ()
    """Names of the texts with bits per byte."""

    def is_met(self, result: EvalResult, digest: str) -> bool:
        """Return whether a result is of the checkpoint with this digest, and has all that is asked for."""
        return (
            is_of(result, digest)
            and set(self.texts) <= result.get("bits_per_byte", {}).keys()
            and all(shots_of(result, name) == shots for name, shots in self.shots.items())
            and self._has_items(result)
            and result["items_source"]["kind"] == self.items
            and self.dtype in ("auto", result["dtype"])
        )

    def _has_items(self, result: EvalResult) -> bool:
        """Return whether a result has the items that are asked for, or all items."""
        if result["limit"] is None:
            return True
        enough = self.limit is not None and result["limit"] >= self.limit
        # The first 1,000 items contain the first 100; items that are spread evenly do not contain fewer such.
        same = result["limit"] == self.limit or self.selection == "first"
        return enough and same and result["selection"] == self.selection


def is_of(result: EvalResult, digest: str) -> bool:
    """Return whether a result may be of the checkpoint with this digest, which older results do not record."""
    provenance = result["model"].get("provenance")
    return provenance is None or provenance.get("checkpoint_sha256", digest) == digest


def evaluate_checkpoints(
    run: Path,
    options: argparse.Namespace,
    request: Request,
    evaluate: Callable[[Path, Path, bool], EvalResult],
    prepare: Callable[[], object] = lambda: None,
) -> None:
    """Evaluate the checkpoints of a run.

    Args:
        run: the run folder.
        options: with those of `pretrain.cli.arguments.add_series`, and `out` and `overwrite`.
        request: what a result must hold.
        evaluate: see `CheckpointSeries`; returns the result.
        prepare: called before an evaluation; its errors are not those of a checkpoint.

    Raises:
        UserError: nothing can be evaluated, or some checkpoints could not be.
    """
    out = options.out or run / "eval"
    log = ScoreLog(run, say) if options.log and (run / "manifest.json").exists() else None

    def prepare_and_log() -> None:
        nonlocal log
        prepare()
        if options.log:
            log = log or ScoreLog(run, say)  # the run has appeared

    def evaluate_and_log(checkpoint: Path, target: Path, overwrite: bool) -> None:
        result = evaluate(checkpoint, target, overwrite)
        if log is not None:
            log.add(result)

    series = CheckpointSeries(
        run,
        out,
        request,
        evaluate_and_log,
        prepare=prepare_and_log,
        every_steps=options.every_steps,
        overwrite=options.overwrite,
    )
    with alone(out):
        try:
            series.work(options.follow, 60 * options.idle_minutes)
        finally:
            if log is not None:
                log.send()  # what was left to a training process that has ended since


def say(text: str) -> None:
    """Print a line without delay: the output is often a file that people follow."""
    print(text, flush=True)


class CheckpointSeries:
    """The checkpoints of a run and their results.

    Args:
        run: the run folder; need not exist yet.
        out: gets a folder with a result for each checkpoint, of the checkpoint's name.
        request: what a result must hold.
        evaluate: evaluates a checkpoint and writes the result to a folder; if the last argument is true, in the place
            of whatever result is there.
        prepare: called before each evaluation; its errors are not those of a checkpoint, and end the series.
        every_steps: only the checkpoints whose step is a multiple of this, and the last one of a finished run.
        overwrite: replace results that are not of this request, or cannot be read.
        say: prints a line.
    """

    def __init__(
        self,
        run: Path,
        out: Path,
        request: Request,
        evaluate: Callable[[Path, Path, bool], None],
        *,
        prepare: Callable[[], object] = lambda: None,
        every_steps: int | None = None,
        overwrite: bool = False,
        say: Callable[[str], None] = say,
    ) -> None:
        self.run, self.out, self.request, self.every_steps = run, out, request, every_steps
        self.overwrite = overwrite
        self.problems: dict[Path, str] = {}
        """The checkpoints that could not be evaluated, and why."""
        self._evaluate, self._prepare, self._say = evaluate, prepare, say
        self._settled: dict[Path, int] = {}  # checkpoint -> mtime of its index; nothing is left to do for it
        self._waiting: set[Path] = set()

    def work(self, follow: bool, idle_seconds: float) -> None:
        """Evaluate every checkpoint that has no result, oldest first.

        Args:
            follow: continue while the run trains.
            idle_seconds: how long to wait for a process that trains the run.

        Raises:
            EvalError: some checkpoints are damaged, a result would be lost, or memory did not suffice; the others have
                been evaluated.
        """
        idle_since: float | None = None
        while True:
            activity = activity_of(self.run)  # first, so that the last checkpoint is seen after the end
            if self._evaluate_next(activity):
                idle_since = None
                continue
            if not follow or activity == "done" or is_orphaned():
                break
            if activity == "training":
                idle_since = None
            elif idle_since is None:
                idle_since = time.monotonic()
            elif time.monotonic() - idle_since >= idle_seconds:
                self._say(f"{self.run}: no process has trained this run for {idle_seconds / 60:g} minutes; not waiting")
                break
            time.sleep(POLL_SECONDS)
        if self.problems:
            raise EvalError("\n".join(self.problems.values()))

    def _evaluate_next(self, activity: Activity) -> bool:
        """Evaluate the oldest checkpoint without a result; return False if there is none."""
        pending = self._pending(activity)
        for folder in sorted(self._waiting - pending.keys()):
            if not (folder / INDEX).is_file():
                self._skip(folder)
        self._waiting = set(pending)
        if not pending:
            return False
        folder, need = next(iter(pending.items()))
        self._say(f"evaluating {folder}" + (f"; {len(pending) - 1} more to do" if len(pending) > 1 else ""))
        self._waiting.discard(folder)
        modified = _modified(folder)
        self._prepare()
        try:
            self._evaluate(folder, self.out / folder.name, need == "another" or self.overwrite)
            self.problems.pop(folder, None)
        except (UserError, OSError, torch.OutOfMemoryError) as error:
            self._give_up(folder, error)
        self._settle(folder, modified)
        return True

    def _pending(self, activity: Activity) -> dict[Path, Need]:
        """The checkpoints that have to be evaluated, oldest first, and why."""
        pending: dict[Path, Need] = {}
        for folder in self._selected(activity):
            modified = _modified(folder)
            if modified is None or self._settled.get(folder) == modified:
                continue
            try:
                need = self._need(folder, self.out / folder.name)
            except (CheckpointError, EvalError) as error:
                self._give_up(folder, error)
                need = None
            if need is None:
                self._settle(folder, modified)
            else:
                pending[folder] = need
        return pending

    def _settle(self, folder: Path, modified: int | None) -> None:
        if modified is not None:
            self._settled[folder] = modified

    def _selected(self, activity: Activity) -> list[Path]:
        found = list_checkpoints(RunFolder(self.run).checkpoints)
        last = found[-1:] if activity == "done" else []
        every = self.every_steps or 1
        return [folder for folder in found if step_of(folder) % every == 0 or folder in last]

    def _need(self, folder: Path, target: Path) -> Need | None:
        """Why a checkpoint has to be evaluated; None if its result is complete.

        Raises:
            CheckpointError: the checkpoint is damaged.
            EvalError: the result cannot be read, and must not be replaced.
        """
        if not (target / RESULT_FILE).is_file():
            return "new"
        digest = digest_of(CheckpointReader(folder).index)
        try:
            result = read_result(target)
        except EvalError as error:
            if self.overwrite:
                return "another"
            raise EvalError(f"{error}\nmove it, or pass --overwrite") from error
        if self.request.is_met(result, digest):
            return None
        return "more" if is_of(result, digest) else "another"

    def _give_up(self, folder: Path, error: Exception) -> None:
        if not (folder / INDEX).is_file():
            self._skip(folder)
            return
        lines = str(error).splitlines() or [type(error).__name__]
        self.problems[folder] = f"not evaluated: {'; '.join(lines)}"
        self._say(f"warning: {self.problems[folder]}")

    def _skip(self, folder: Path) -> None:
        self._say(
            f"skipped {folder}: deleted before it was evaluated (checkpoint.keep_last and checkpoint.keep_every_steps "
            "decide what is kept)"
        )


def activity_of(run: Path) -> Activity:
    """Return what happens in a run folder, which need not exist."""
    if not run.is_dir():
        return "idle"
    found = read_run(run)
    if found.state == "done":
        return "done"
    locked = found.folder.is_locked()
    return "training" if locked or (found.state == "running" and "stopped" not in found.manifest) else "idle"


@contextlib.contextmanager
def alone(out: Path, say: Callable[[str], None] = say) -> Iterator[None]:
    """Hold a folder of results, so that two processes never evaluate the same checkpoint.

    Raises:
        EvalError: the folder cannot be written to.
    """
    held = locked(
        out / LOCK,
        waiting=lambda: say(f"waiting for another process that writes results to {out}"),
        unsupported=lambda error: say(
            f"warning: {out} cannot be locked ({error}): start only one evaluation that writes to it"
        ),
    )
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held)
        except OSError as error:
            raise EvalError(f"cannot write results to {out}: {error}") from error
        yield


def check_run(run: Path, follow: bool) -> None:
    """Make sure that there are checkpoints to evaluate.

    Raises:
        EvalError: `run` is not a run folder, or has no checkpoint and is not followed.
    """
    if (run / INDEX).is_file():
        raise EvalError(f"{run}: --every-checkpoint expects a run folder, got a checkpoint; leave the option out")
    if run.exists() and not any((run / name).exists() for name in ("checkpoints", "manifest.json", "config.yaml")):
        if not (follow and run.is_dir() and not any(run.iterdir())):
            raise EvalError(f"{run}: --every-checkpoint expects a run folder; it has no config and no checkpoints")
    elif not follow and not list_checkpoints(RunFolder(run).checkpoints):
        what = "no checkpoint yet; --follow waits for them" if run.exists() else "no such run folder"
        raise EvalError(f"{run}: {what}")


def _modified(folder: Path) -> int | None:
    try:
        return (folder / INDEX).stat().st_mtime_ns
    except OSError:
        return None
