"""How runs are doing: progress, rate, time left, last checkpoint, restarts, health."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pretrain.run.folder import CONFIG_FILE, RunError
from pretrain.run.reader import Run, age_of, is_number, read_run
from pretrain.text_tables import aligned
from pretrain.watching.heartbeat import FOLDER as HEARTBEATS
from pretrain.watching.heartbeat import Heartbeat, heartbeat_file
from pretrain.watching.stragglers import stragglers

RECENT = 50
"""Steps whose median gives the rate."""
SILENT_SECONDS = 30.0
"""A rank whose heartbeat is older than this, and than four of its intervals, is silent."""
DEPTH = 3
"""How far below a root run folders are looked for: those of sweeps lie in the sweep's folder."""


@dataclass(frozen=True)
class Status:
    """The state of a run, as ``aurora status --json`` prints it; None where something is not known."""

    run: str
    """The run's name."""
    path: str
    state: str
    """See `pretrain.run.reader.State`, or ``unreadable``."""
    step: int = 0
    total_steps: int | None = None
    tokens: int = 0
    loss: float | None = None
    """Training loss of the last step."""
    validation_loss: float | None = None
    tokens_per_second: float | None = None
    """Median of the last steps, of the time spent in steps."""
    seconds_left: float | None = None
    """At that rate, without validation and saves; None for a run that is not running."""
    checkpoint_step: int | None = None
    """Step of the newest checkpoint."""
    checkpoint_seconds: float | None = None
    """Age of the newest checkpoint."""
    restarts: int = 0
    """Launches after the first."""
    skipped_steps: int = 0
    ranks: int | None = None
    """Of the last launch."""
    phase: str | None = None
    """What rank 0 is doing; only for a run that is running."""
    health: tuple[str, ...] = ()
    """What is wrong; empty if nothing is."""


def find_runs(root: Path) -> list[Path]:
    """Return the run folders at or below `root`, by path; a run folder is not searched for others."""
    found: list[Path] = []

    def search(folder: Path, depth: int) -> None:
        if _is_run(folder):
            found.append(folder)
        elif depth < DEPTH:
            try:
                below = sorted(path for path in folder.iterdir() if path.is_dir())
            except OSError:
                return
            for path in below:
                # A link may lead to a run on another disk; one that leads elsewhere could lead in a circle.
                search(path, DEPTH if path.is_symlink() else depth + 1)

    search(root, 0)
    return found


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("manifest.json", CONFIG_FILE, "metrics.jsonl"))


def read_status(path: Path) -> Status:
    """Return the status of a run folder; what cannot be read is its health."""
    try:
        return _status(read_run(path))
    except RunError as error:
        return Status(path.name, str(path), "unreadable", health=(str(error),))


def _status(run: Run) -> Status:
    last = run.records[-1] if run.records else {}
    beats = run.heartbeats
    tokens, rate = int(_number(last.get("tokens")) or 0), _rate(run)
    total, left = run.total_steps, None
    if run.state == "running" and rate and total and run.last_step:
        left = _number((total - run.last_step) * (tokens / run.last_step) / rate)
    newest = max(run.checkpoints, default=None)
    age = age_of(run.checkpoints[newest]) if newest is not None else None
    launch = run.launches[-1] if run.launches else {}
    return Status(
        run=run.name,
        path=str(run.path),
        state=run.state,
        step=run.last_step,
        total_steps=total,
        tokens=tokens,
        loss=_number(last.get("loss")),
        validation_loss=run.read("validation_loss").value,
        tokens_per_second=rate,
        seconds_left=left,
        checkpoint_step=newest,
        checkpoint_seconds=None if age is None else max(0.0, age),
        restarts=max(0, len(run.launches) - 1),
        skipped_steps=run.skipped_steps,
        ranks=ranks if isinstance(ranks := launch.get("world_size"), int) else None,
        phase=beats[0].phase if run.state == "running" and 0 in beats else None,
        health=tuple(_health(run, beats)),
    )


def _rate(run: Run) -> float | None:
    found = sorted(
        record["tokens_per_second"] for record in run.records[-RECENT:] if is_number(record.get("tokens_per_second"))
    )
    return found[len(found) // 2] if found else None


def _number(value: Any) -> float | None:
    return float(value) if is_number(value) else None


def _health(run: Run, beats: dict[int, Heartbeat]) -> list[str]:
    """What is wrong with a run."""
    found = []
    verdicts = {beat.verdict.splitlines()[0] for beat in beats.values() if beat.verdict}
    if verdicts and run.state != "done":
        found.append(sorted(verdicts)[0])
    elif run.state == "running":
        found += _of_ranks(run, beats)
    elif run.state in ("stopped", "failed") and beats:
        last = max(beats.values(), key=lambda beat: beat.time)
        found.append(f"ended without a word: {last.name} was in phase {last.phase} of step {last.step}")
    if run.records:
        last_record = run.records[-1]
        if "loss" in last_record and not is_number(last_record["loss"]):
            found.append(f"the loss of step {run.last_step} is not finite")
        if last_record.get("skipped"):
            found.append(f"step {run.last_step} was skipped")
    return found


def _of_ranks(run: Run, beats: dict[int, Heartbeat]) -> list[str]:
    """Ranks of a running run that are silent, stand still or are slow."""
    found = []
    for rank, beat in sorted(beats.items()):
        age = age_of(heartbeat_file(run.path / HEARTBEATS, rank)) or 0.0
        if age > max(SILENT_SECONDS, 4 * beat.every_seconds):
            found.append(f"{beat.name} has been silent for {age:.0f} s, last in phase {beat.phase} of step {beat.step}")
        elif beat.stalled > max(SILENT_SECONDS, beat.limit / 2):
            found.append(f"{beat.name}: no progress for {beat.stalled:.0f} s in phase {beat.phase} of step {beat.step}")
    factor = _number(run.section("watch").get("straggler_factor"))
    if factor is not None:
        found += stragglers(beats, factor).values()
    return found


def format_statuses(statuses: Sequence[Status]) -> list[str]:
    """Return a table with a line per run, and below it what is wrong."""
    rows: list[tuple[str, ...]] = [
        ("run", "state", "step", "tokens", "loss", "tok/s", "left", "checkpoint", "restarts", "health"),
    ]
    rows += [_row(status) for status in statuses]
    return aligned(rows) + [f"{status.run}: {problem}" for status in statuses for problem in status.health]


def _row(status: Status) -> tuple[str, ...]:
    of = f"/{status.total_steps}" if status.total_steps is not None else ""
    checkpoint = ""
    if status.checkpoint_step is not None:
        checkpoint = f"{status.checkpoint_step}, {duration(status.checkpoint_seconds or 0)} ago"
    problems = len(status.health)
    return (
        status.run,
        status.state + (f" ({status.phase})" if status.phase else ""),
        f"{status.step}{of}",
        f"{status.tokens:,}",
        "" if status.loss is None else f"{status.loss:.4f}",
        "" if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f}",
        "" if status.seconds_left is None else duration(status.seconds_left),
        checkpoint,
        str(status.restarts),
        "ok" if not problems else f"{problems} problem{'s' * (problems > 1)}",
    )


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: ``3 d 4 h``, ``4 h 10 min``, ``2 min``, ``9 s``."""
    minutes, whole = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min" if minutes else f"{whole} s"


def as_json(statuses: Sequence[Status]) -> list[dict[str, Any]]:
    """Return plain data."""
    return [asdict(status) for status in statuses]
