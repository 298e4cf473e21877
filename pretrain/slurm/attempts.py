"""The starts of a job, and whether it may be requeued: as long as it gets further, or failed only a few times in a row.

The record is kept next to the job's logs and read by its next start, so that it also counts starts that Slurm repeated
by itself after a node died.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict, cast

from pretrain.files import now, replace_text
from pretrain.processes.exit_codes import BAD_INPUT, DONE, STOPPED, UNAVAILABLE
from pretrain.processes.signals import ASKING


class Attempt(TypedDict):
    """One start of a job."""

    restart: int
    """SLURM_RESTART_COUNT."""
    began: str
    nodes: str
    """As Slurm writes them."""
    step: int
    """Step of the newest checkpoint at the start; for a sweep, the sum over its runs."""
    ended: NotRequired[str]
    """Absent if the nodes were lost."""
    exit_code: NotRequired[int]
    last_step: NotRequired[int]
    """Step of the newest checkpoint at the end."""
    outcome: NotRequired[str]
    """What happened next, in words."""
    told: NotRequired[str]
    """When SIGTERM came, or another signal that is not the notice of the time limit: Slurm sends it when it takes the
    nodes away."""
    outside: NotRequired[bool]
    """Whether it ended because the job was preempted or requeued, which says nothing about the work."""
    gave_up: NotRequired[bool]
    """Whether it was the last one that was allowed; a later start, which someone asked for, counts from zero."""


class Attempts:
    """The record of a job's starts.

    Args:
        path: its file; need not exist.

    Attributes:
        problem: why it could not be written, if so; that does not end a job.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: OSError | None = None
        self._found: list[Attempt] = _read(path)

    def begin(self, restart: int, nodes: str, step: int) -> None:
        """Record a start."""
        self._found.append(Attempt(restart=restart, began=now(), nodes=nodes, step=step))
        self._write()

    def note_told(self) -> None:
        """Record, once, that the last start was told to end: it may be killed before it can say anything else."""
        if not {"told", "ended"} & self._found[-1].keys():
            self._found[-1]["told"] = now()
            self._write()

    def end(self, exit_code: int, step: int, verdict: Verdict) -> None:
        """Record how the last start ended."""
        ended = Attempt(**self._found[-1])
        ended |= {"ended": now(), "exit_code": exit_code, "last_step": step, "outcome": verdict.why}
        if verdict.outside:
            ended["outside"] = True
        if verdict.gave_up:
            ended["gave_up"] = True
        self._found[-1] = ended
        self._write()

    def stalled(self, step: int) -> int:
        """Return how many starts in a row have not got further than the checkpoint at `step`, the last one included.

        Starts that were preempted or requeued from outside are not counted.
        """
        count = 0
        for attempt in reversed(self._found):
            if attempt.get("gave_up") or attempt["step"] < step:
                break
            count += not attempt.get("outside") and (attempt is self._found[-1] or not _was_killed(attempt))
        return count

    def _write(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self.path, json.dumps(self._found, indent=1) + "\n")
        except OSError as error:  # a full quota, for example
            self.problem = error
        else:
            self.problem = None


class Verdict(NamedTuple):
    """Whether a job is requeued."""

    requeue: bool
    why: str
    gave_up: bool = False
    """Whether it would have been requeued, had it not failed too often."""
    outside: bool = False
    """Whether the start ended because the job was preempted or requeued."""


def judge(code: int, *, by_slurm: bool, stalled: int, limit: int) -> Verdict:
    """Decide whether a job whose work has ended is requeued.

    Args:
        code: the exit code of the work.
        by_slurm: whether the work was asked to stop because Slurm needs the nodes or the time limit is near.
        stalled: starts in a row, including this one unless it was preempted, that saved no newer checkpoint.
        limit: how many restarts in a row may save no newer checkpoint; 0: the job is never requeued.
    """
    if code == DONE:
        return Verdict(False, "done")
    if code == BAD_INPUT:
        return Verdict(False, "bad input")
    if code == STOPPED and not by_slurm:
        return Verdict(False, "stopped on request; submit the same command again to continue")
    if code - 128 in ASKING and not by_slurm:  # someone has asked a second time
        name = signal.Signals(code - 128).name
        return Verdict(False, f"ended by {name}; submit the same command again to continue from the newest checkpoint")
    reason = {
        STOPPED: "stopped for Slurm, with a checkpoint saved",
        UNAVAILABLE: "a data server did not answer",
    }.get(code, f"failed with exit code {code}")
    return may_restart(reason, stalled, limit)


def may_restart(reason: str, stalled: int, limit: int) -> Verdict:
    """Allow a restart for `reason`, unless the job has not got further for too many starts in a row."""
    if limit == 0:
        return Verdict(False, f"{reason}; not requeued, since AURORA_REQUEUES is 0")
    if stalled > limit:
        return Verdict(
            False,
            f"{reason}; {stalled} starts in a row have saved no newer checkpoint, which is more than AURORA_REQUEUES "
            f"({limit}) restarts allow: not requeued",
            gave_up=True,
        )
    return Verdict(True, reason)


def stopped(code: int) -> bool:
    """Whether an exit code of the work is that of a stop on request, with or without a checkpoint."""
    return code == STOPPED or code - 128 in ASKING


def _was_killed(attempt: Attempt) -> bool:
    """Whether Slurm told a start to end, and killed it before it could record its end."""
    return "told" in attempt and "ended" not in attempt


def _read(path: Path) -> list[Attempt]:
    """The attempts of a record; none if it is absent or damaged, which costs the count and nothing else."""
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return []
    if not isinstance(found, list):
        return []
    attempts = [attempt for attempt in found if isinstance(attempt, dict) and isinstance(attempt.get("step"), int)]
    return cast(list[Attempt], attempts)
