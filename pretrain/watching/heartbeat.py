"""The heartbeat of a rank: a small file in the run folder, which ranks on other machines and people can read."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

FOLDER = "heartbeats"
"""In the run folder."""


@dataclass(frozen=True)
class Heartbeat:
    """What a rank says of itself every few seconds."""

    launch: str
    """The same on all ranks of a launch, and on no others."""
    rank: int
    world_size: int
    host: str
    boot: str
    """Identifies the machine until it is started again; empty if unknown."""
    pid: int
    started: int
    """When the process was started, in the kernel's ticks since the machine was; with `pid` it names one process."""
    time: float
    """Seconds since the epoch, by this machine's clock."""
    every_seconds: float
    """How often the heartbeat is written."""
    beats: int
    """How often it has been written."""
    phase: str
    step: int
    marks: int
    """Phases entered so far; see `pretrain.watching.progress.Moment`."""
    stalled: float
    """Seconds without progress, without the time for which the process itself was stopped."""
    limit: float
    """Seconds after which this phase counts as hung; infinite if nothing is ended."""
    stopped_limit: float
    """The same for a rank whose heartbeat is not written any more, most likely because its process does not run."""
    where: str
    """The place in our code where the main thread is; only while the rank makes no progress."""
    waiting: bool
    """Whether it waits there for other ranks."""
    forward_seconds: float | None
    """Median time of the forward passes of a step; see `pretrain.watching.forward_clock`."""
    verdict: str = ""
    """What this rank has found to hang, when it is about to end."""

    @property
    def name(self) -> str:
        """The rank and where it runs."""
        return f"rank {self.rank} on {self.host} (process {self.pid})"


def heartbeat_file(folder: Path, rank: int) -> Path:
    """The heartbeat of a rank in the folder of heartbeats."""
    return folder / f"rank-{rank:05d}.json"


def write_heartbeat(folder: Path, beat: Heartbeat) -> None:
    """Replace a rank's heartbeat in one rename.

    It is not synced to the disk: after a crash of the machine no heartbeat is of interest.
    """
    path = heartbeat_file(folder, beat.rank)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(asdict(beat)), encoding="utf-8")
    partial.replace(path)


def read_heartbeats(folder: Path, launch: str | None = None) -> dict[int, Heartbeat]:
    """Read the heartbeats of a run by rank, or only those of one launch; files that cannot be read are left out."""
    known, found = get_type_hints(Heartbeat), {}
    for path in sorted(folder.glob("rank-*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            content = json.loads(path.read_text(encoding="utf-8"))
            beat = Heartbeat(**{key: value for key, value in content.items() if key in known})
            fits = all(_fits(getattr(beat, name), kind) for name, kind in known.items())
            if fits and launch in (None, beat.launch) and heartbeat_file(folder, beat.rank) == path:
                found[beat.rank] = beat
    return found


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of JSON is one of a field of this type; a float may be written as a whole number."""
    if isinstance(value, int) and not isinstance(value, bool):
        return kind is not str and kind is not bool and abs(value) < 1 << 63
    return isinstance(value, kind)


def remove_heartbeats(folder: Path, ranks: Iterable[int]) -> None:
    """Remove the heartbeats of these ranks, and the folder if nothing is left in it."""
    for rank in ranks:
        with contextlib.suppress(OSError):
            heartbeat_file(folder, rank).unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def boot_id() -> str:
    """Identify this machine until it is started again; empty if that is not known."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return ""


def start_ticks(pid: int) -> int:
    """Return when a process of this machine was started, in ticks; -1 if it does not exist."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(_stat(pid)[19])
    return -1


def process_state(pid: int) -> str:
    """Return the kernel's letter for the state of a process: T stopped, D waiting for a device; empty if unknown."""
    with contextlib.suppress(OSError, IndexError):
        return _stat(pid)[0]
    return ""


def cpu_seconds() -> float:
    """Return the CPU time of this process and of the processes that it has started and that live."""
    total, tick = time.process_time(), os.sysconf("SC_CLK_TCK")
    for children in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in children.read_text().split():
                with contextlib.suppress(OSError, ValueError, IndexError):
                    total += sum(map(int, _stat(int(child))[11:13])) / tick
    return total


def is_here(beat: Heartbeat) -> bool:
    """Whether a heartbeat is that of a process that lives on this machine."""
    return bool(beat.boot) and beat.boot == boot_id() and beat.started == start_ticks(beat.pid) != -1


def _stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` after the name, which may itself hold spaces."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rsplit(")", 1)[1].split()


def own_process() -> tuple[int, int, str]:
    """This process's id and start, and its machine."""
    return os.getpid(), start_ticks(os.getpid()), boot_id()
