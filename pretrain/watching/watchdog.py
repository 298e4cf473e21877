"""The watchdog: shows that this rank lives, and ends it with a reason when the run hangs.

Two threads per rank. One touches the run folder: it writes the heartbeat, and reads those of the others once this rank
has made no progress for half of `hang_seconds`; while all goes well no rank reads anything. The other one judges and
touches nothing but memory, so that a file system that does not answer cannot silence it.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from pretrain.config.watch import WatchConfig
from pretrain.files import now
from pretrain.processes.errors import HangError
from pretrain.processes.exit_codes import FAILED
from pretrain.processes.failures import note_exit, report
from pretrain.watching.heartbeat import (
    Heartbeat,
    cpu_seconds,
    is_here,
    own_process,
    read_heartbeats,
    remove_heartbeats,
    write_heartbeat,
)
from pretrain.watching.progress import QUICK, READS_DATA, Progress
from pretrain.watching.stacks import DUMP_SIGNAL, dump, dumping, place, stacks_file, to_main_thread
from pretrain.watching.verdict import suspects, verdict

LONGEST_INTERVAL = 10.0
PATIENCE = 5.0
"""A phase may take this many times as long as it ever took."""
WORKING_SHARE = 0.2
"""A rank that uses this share of a core while it waits for data is preparing it."""
DUMP_SECONDS = 5.0
"""How long stacks may take to be written when the run ends."""


@dataclass(frozen=True)
class Place:
    """Which rank of which launch this is, and where its heartbeat goes."""

    folder: Path
    launch: str
    rank: int
    world_size: int


class Watchdog:
    """Writes this rank's heartbeat, and ends the process when the run hangs.

    Args:
        at: this rank, and the folder of the heartbeats.
        settings: the `watch` section.
        progress: what the training loop reports.
        data_seconds: how long the data may wait for a server.
        forward_seconds: the median time of this rank's forward passes, if known.
        alert: sends what hangs to people; called on one rank.
        leave: ends the process.
    """

    def __init__(
        self,
        at: Place,
        settings: WatchConfig,
        progress: Progress,
        *,
        data_seconds: float = 0.0,
        forward_seconds: Callable[[], float | None] = lambda: None,
        alert: Callable[[str], None] = lambda text: None,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.at, self.settings, self.progress = at, settings, progress
        self.data_seconds, self.forward_seconds, self.alert, self.leave = data_seconds, forward_seconds, alert, leave
        hang = settings.hang_seconds
        self.interval = min(LONGEST_INTERVAL, hang / 10 if hang is not None else LONGEST_INTERVAL)
        self._trains = threading.get_ident()
        self._pid, self._started, self._boot = own_process()
        self._beats, self._verdict = 0, ""
        self._stalled, self._last_seen = 0.0, (-1, -1)
        self._others: dict[int, Heartbeat] = {}
        self._fresh: dict[int, tuple[int, float]] = {}
        """Rank -> its count of beats, and this rank's clock when the count was first seen."""
        self._clock, self._looked, self._wrote = 0.0, -math.inf, False
        """Seconds that this process has run; when it had last done with the folder; whether it could write there."""
        self._cpu = math.inf
        self._ended = threading.Event()
        self._file: IO[str] | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch until the block ends; then the heartbeat is removed."""
        with contextlib.ExitStack() as opened:
            with contextlib.suppress(OSError):  # a full disk: the heartbeats are missed, the run goes on
                self.at.folder.mkdir(exist_ok=True)
                self._file = opened.enter_context(dumping(self.at.folder, self.at.rank))
            self._write()
            works = [self._keep_beating] + ([self._keep_judging] if self.settings.hang_seconds is not None else [])
            threads = [threading.Thread(target=work, name=work.__name__.strip("_"), daemon=True) for work in works]
            for thread in threads:
                thread.start()
            try:
                yield
            finally:
                self._ended.set()
                for thread in threads:
                    thread.join(DUMP_SECONDS)
                opened.close()
                remove_heartbeats(self.at.folder, [self.at.rank])

    # The thread that touches the run folder.

    def _keep_beating(self) -> None:
        while not self._ended.wait(self.interval):
            self._write()
            if self._looks():
                self._read()
            self._looked = self._clock

    def _looks(self) -> bool:
        """Whether this rank has stood still for long enough to look at the others."""
        hang = self.settings.hang_seconds
        return hang is not None and self._stalled >= hang / 2 - self.interval

    def _write(self) -> None:
        self._beats += 1
        try:
            write_heartbeat(self.at.folder, self.heartbeat())
            self._wrote = True
        except OSError:
            self._wrote = False

    def _read(self) -> None:
        found = read_heartbeats(self.at.folder, self.at.launch)
        found.pop(self.at.rank, None)
        for rank, beat in found.items():
            known = self._fresh.get(rank)
            if known is None or known[0] != beat.beats:
                self._fresh[rank] = (beat.beats, self._clock)
        self._others = found

    # The thread that judges.

    def _keep_judging(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(self.interval):
            present = time.monotonic()
            # While the process is stopped (Ctrl-Z, a suspended machine) this thread does not run: that is no hang.
            passed, last = min(present - last, 2 * self.interval), present
            self._clock += passed
            moment = self.progress.now
            seen = (moment.marks, moment.ticks)
            alive = seen != self._last_seen or (moment.phase == "data" and self._works(passed))
            self._stalled = 0.0 if alive else self._stalled + passed
            self._last_seen = seen
            reason = self.judge()
            if reason is not None and not self._ended.is_set():
                self.end(reason)
                return

    def _works(self, passed: float) -> bool:
        """Whether this rank prepares data: it may scan a large file for a batch, for which nobody sets a limit."""
        before, self._cpu = self._cpu, cpu_seconds()
        return self._cpu - before >= WORKING_SHARE * passed

    def judge(self) -> str | None:
        """Return what hangs; None if nothing does as far as this rank knows."""
        own = self.heartbeat()
        if self._clock - self._looked > 3 * self.interval + DUMP_SECONDS and self._stalled >= own.limit:
            return (
                f"{own.name} hangs in phase {own.phase} of step {own.step}, and the run folder does not answer: no "
                f"progress for {own.limit:g} seconds\n  at {own.where}"
            )
        if self._stalled < (self.settings.hang_seconds or math.inf) or not self._wrote:
            return None  # a rank that cannot write its heartbeat knows as little of the others
        others, silent = dict(self._others), self.silent()
        missing = set(range(self.at.world_size)) - {self.at.rank, *others}
        if missing and not others and self.at.world_size > 1 and not self._fresh:
            return None  # nothing has been read yet
        beats = {**others, **{rank: _unheard(own, rank) for rank in missing}}
        return verdict(own, beats, silent | missing)

    def silent(self) -> set[int]:
        """The ranks whose heartbeats have not been written for a while, by this rank's own clock."""
        patience = max(4 * self.interval, 3.0)
        return {
            rank
            for rank in self._others
            if self._clock - self._fresh[rank][1] > max(patience, 4 * self._others[rank].every_seconds)
        }

    def limit(self) -> float:
        """Return the seconds after which this rank, where it is, counts as hung."""
        hang, slow = self.settings.hang_seconds, self.settings.slow_seconds
        if hang is None:
            return math.inf
        phase = self.progress.now.phase
        limit = hang if phase in QUICK and self.progress.settled else slow
        if phase in READS_DATA:
            limit += self.data_seconds
        return max(limit, PATIENCE * self.progress.longest.get(phase, 0.0))

    def heartbeat(self) -> Heartbeat:
        """This rank's heartbeat as it is now."""
        moment, hang = self.progress.now, self.settings.hang_seconds
        where, waiting = place(self._trains) if self._stalled > 2 * self.interval else ("", False)
        # A disk that is busy with a save may also keep heartbeats waiting: there, silence means nothing.
        silence_counts = hang is not None and self.progress.settled and moment.phase != "save"
        return Heartbeat(
            launch=self.at.launch,
            rank=self.at.rank,
            world_size=self.at.world_size,
            host=socket.gethostname(),
            boot=self._boot,
            pid=self._pid,
            started=self._started,
            time=time.time(),
            every_seconds=self.interval,
            beats=self._beats,
            phase=moment.phase,
            step=moment.step,
            marks=moment.marks,
            stalled=round(self._stalled, 3),
            limit=self.limit(),
            stopped_limit=hang if hang is not None and silence_counts else self.limit(),
            where=where,
            waiting=waiting,
            forward_seconds=self.forward_seconds(),
            verdict=self._verdict,
        )

    # The end.

    def end(self, reason: str) -> None:
        """Write the stacks, say what hangs, end the ranks of this machine that do not run, and end this process."""
        self._verdict = reason
        others, silent = self._others, self.silent()
        named = min(suspects({**others, self.at.rank: self.heartbeat()}, silent), key=lambda beat: beat.rank)
        error = HangError(reason, rank=named.rank, host=named.host, launch=self.at.launch)
        _in_time(lambda: report(error))
        if self.at.rank == min({self.at.rank, *others} - silent):
            _in_time(lambda: self.alert(reason.splitlines()[0]))
        file = self._file
        if file is None or not _in_time(lambda: dump(file, self._title())):
            _in_time(lambda: dump(sys.stderr, self._title()))
        frozen = [beat for rank, beat in others.items() if rank in silent and is_here(beat)]
        _in_time(lambda: _dump_frozen(self.at.folder, frozen, self._title()))
        self._await_others(silent)
        for beat in frozen:
            _send(beat, signal.SIGKILL)
        note_exit(FAILED)
        self.leave(FAILED)

    def _await_others(self, silent: set[int]) -> None:
        """Give the other ranks the time to write their stacks: when this rank is gone, their collectives fail."""
        until = time.monotonic() + 4 * self.interval + 1.0
        while time.monotonic() < until:
            others = [beat for rank, beat in self._others.items() if rank not in silent]
            if all(beat.verdict for beat in others):
                time.sleep(self.interval)  # they write this before their stacks
                return
            time.sleep(self.interval / 4)

    def _title(self) -> str:
        moment = self.progress.now
        return (
            f"{now()}: rank {self.at.rank}, step {moment.step}, phase {moment.phase}: {self._verdict.splitlines()[0]}"
        )


def _unheard(own: Heartbeat, rank: int) -> Heartbeat:
    """Stands for the heartbeat of a rank that has never been read."""
    return replace(
        own, rank=rank, host="an unknown host", boot="", pid=0, started=-1, where="", waiting=False, verdict=""
    )


def _dump_frozen(folder: Path, frozen: list[Heartbeat], title: str) -> None:
    """Make processes that do not run write their stacks: a stopped one is continued for that moment."""
    for beat in frozen:
        path = stacks_file(folder, beat.rank)
        with path.open("a", encoding="utf-8") as file:
            file.write(f"\n== stopped at step {beat.step}, phase {beat.phase}; {title}\n")
        size = path.stat().st_size
        _send(beat, DUMP_SIGNAL, to_main_thread)
        _send(beat, signal.SIGCONT)
        until = time.monotonic() + DUMP_SECONDS / 2
        while path.stat().st_size == size and time.monotonic() < until:
            time.sleep(0.02)
        time.sleep(0.1)  # it has begun to write


def _send(beat: Heartbeat, number: signal.Signals, kill: Callable[[int, int], object] = os.kill) -> None:
    """Send a signal to the process of a heartbeat, if it is still the same process."""
    if is_here(beat):
        with contextlib.suppress(OSError):
            kill(beat.pid, number)


def _in_time(work: Callable[[], object]) -> bool:
    """Do something that may never return; return whether it was done in time."""
    done = threading.Event()

    def attempt() -> None:
        with contextlib.suppress(Exception):
            work()
            done.set()

    threading.Thread(target=attempt, daemon=True).start()
    return done.wait(DUMP_SECONDS)
