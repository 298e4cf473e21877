"""What Slurm knows of a job, and what it is asked to do with it, all through `scontrol`."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

TRIES = 10
RETRY_SECONDS = 15.0
"""Slurm's controller may be away for a minute or two while it is restarted."""
ANSWER_SECONDS = 60.0


class SlurmError(RuntimeError):
    """Slurm did not do what it was asked; the message has its answer."""


@dataclass(frozen=True)
class JobStatus:
    """A job as Slurm's controller sees it.

    Attributes:
        state: for example RUNNING; COMPLETING or PENDING if Slurm itself is ending or has requeued the job.
        timed_out: whether Slurm is ending the job because its time is over.
        preempted: whether Slurm is taking the nodes away for another job.
        ends: the time limit, in seconds since the epoch; None without one.
        excluded: the nodes that the job does not want, as Slurm writes them; empty if there are none.
    """

    state: str
    timed_out: bool
    preempted: bool
    ends: float | None
    excluded: str


def job_status(job: str) -> JobStatus:
    """Ask for the status of a job.

    Raises:
        SlurmError: Slurm does not answer, or does not know the job.
    """
    shown = _scontrol("--oneliner", "show", "job", job)
    state = re.search(r"\sJobState=([A-Z_]+)\s", shown)
    if state is None:
        raise SlurmError(f"scontrol show job {job}: expected a job with JobState=, got {shown.strip()!r}")
    excluded = _field(shown, "ExcNodeList")
    return JobStatus(
        state=state[1],
        timed_out=_field(shown, "Reason") == "TimeLimit",
        preempted=_seconds(_field(shown, "PreemptTime")) is not None,
        ends=_seconds(_field(shown, "EndTime")),
        excluded="" if excluded == "(null)" else excluded,
    )


def node_names(node_list: str) -> list[str]:
    """Return the names in one of Slurm's node lists, such as ``gpu[07-09]``.

    Raises:
        SlurmError: it is not a node list.
    """
    return _scontrol("show", "hostnames", node_list).split()


def rename(job: str, name: str) -> None:
    """Give a job the name that squeue shows."""
    _scontrol("update", f"JobId={job}", f"JobName={name}")


def requeue(job: str) -> None:
    """Put a running job back into the queue. Slurm then ends its processes, the caller's among them, with SIGTERM."""
    _scontrol("requeue", job)


def exclude(job: str, already: str, nodes: Iterable[str]) -> None:
    """Keep a job that waits in the queue off some nodes, besides those that it avoids already."""
    _scontrol("update", f"JobId={job}", f"ExcNodeList={','.join([*filter(None, [already]), *nodes])}")


def _scontrol(*arguments: str) -> str:
    """Output of scontrol; repeated if its controller does not answer."""
    command = ["scontrol", *arguments]
    for attempt in range(1, TRIES + 1):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            problem = f"no answer within {ANSWER_SECONDS:.0f} s"
        except OSError as error:
            raise SlurmError(f"scontrol cannot be started: {error.strerror}") from None
        else:
            if done.returncode == 0:
                return done.stdout
            problem = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
            if not re.search(r"contact|connect|timed out|communication", problem, re.IGNORECASE):
                break
        if attempt < TRIES:
            time.sleep(RETRY_SECONDS)
    raise SlurmError(f"{' '.join(command)}: {problem}")


def _field(shown: str, name: str) -> str:
    found = re.search(rf"\s{name}=(\S*)", shown)
    return found[1] if found else ""


def _seconds(text: str) -> float | None:
    """A time as scontrol prints it, in this machine's time zone; None for ``None``, ``Unknown`` and the like."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None
