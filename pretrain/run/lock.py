"""The lock of a run folder: one launch at a time trains in it.

A lock of the operating system (`fcntl.flock`) ends with the process that holds it. It does not suffice: file systems of
clusters may keep it within one machine or lose it with the network, and somebody may delete the file. So the file also
says who holds it, under a token that no other launch has. A launch that no longer finds its own token there has been
replaced, and writes nothing more (`RunLock.check`). A thread touches the file every few seconds for as long as the
process runs, whatever training is doing, so that other machines see that the lock is held; a process that is stopped
touches nothing.

When Slurm gives up a node it requeues the job, although the earlier attempt may still train on that node. The new
attempt lays a claim next to the lock, the earlier one finds it after its next step, saves and stops, and the new one
continues from that checkpoint.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from pretrain.files import now, replace_text
from pretrain.processes.errors import UserError
from pretrain.processes.exit_codes import STOPPED
from pretrain.watching.heartbeat import boot_id

LOCK_FILE, CLAIM_FILE = ".lock", ".lock.claim"
POLL_SECONDS = 0.2
SHORT_WAIT_SECONDS = 0.5
"""Looking whether a folder is locked locks it for a moment."""
BEAT_SECONDS = 5.0
"""How often the launch that holds the lock touches it."""
RECORD_BYTES = 1024
"""Of the file, whoever holds the lock: a full disk has no room for one that grows, and `aurora checkpoint prune`, which
makes room, needs the lock as well."""
SILENCE_SECONDS = 30.0
"""How long a lock of another machine must have been left alone, if this machine could lock it nevertheless."""


class RunError(UserError):
    """A run folder cannot be used as requested; the message names the key or file and says what to do."""


class WaitStoppedError(RunError):
    """This launch was asked to stop while it waited for the lock."""

    exit_code = STOPPED


class RunLock:
    """The lock of one run folder, seen from rank 0 of a launch.

    Args:
        folder: the run folder, which exists.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / LOCK_FILE
        self.own = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "boot": boot_id(),
            "pid": os.getpid(),
            "since": now(),
            "job": os.environ.get("SLURM_JOB_ID"),
            "restart": _restarts(),
        }
        self._file: IO[str] | None = None
        self._released = threading.Event()

    def acquire(
        self,
        wait_seconds: float = 0.0,
        stopped: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Take the lock.

        Args:
            wait_seconds: how long to wait for an earlier attempt of the same Slurm job.
            stopped: whether this launch is asked to stop, which ends the wait.
            say: prints a line.

        Raises:
            RunError: another process trains in the folder.
            OSError: it cannot be written.
        """
        begun = time.monotonic()
        patient_until, claimed = begun + SHORT_WAIT_SECONDS, False
        try:
            while (holder := self._try(stopped)) is not None:
                moment = time.monotonic()
                is_earlier = self._is_earlier_attempt(holder)
                if is_earlier and not claimed:
                    claimed = True
                    replace_text(self.folder / CLAIM_FILE, json.dumps(self.own))
                    who = f"{_describe(holder)}, an earlier attempt of this job"
                    say(f"waiting up to {wait_seconds:g} seconds for {who}")
                if is_earlier:
                    patient_until = moment + SHORT_WAIT_SECONDS  # it clears its record before it releases the lock
                if moment >= (begun + wait_seconds if is_earlier else patient_until):
                    self._refuse(holder, moment - begun if is_earlier else None)
                if stopped():
                    raise WaitStoppedError(f"{self.folder}: stopped while {_describe(holder)} was training there")
                time.sleep(POLL_SECONDS)
        finally:
            if claimed:
                (self.folder / CLAIM_FILE).unlink(missing_ok=True)
        self._write(self.own)
        self._released.clear()
        # A daemon: a file system that does not answer must not keep the process alive.
        threading.Thread(target=self._keep_touching, name="run-lock", daemon=True).start()

    def release(self) -> None:
        """Give the lock back, as far as its disk is still there: the lock ends with the open file in any case."""
        self._released.set()
        if self._file is not None:
            with contextlib.suppress(OSError), self._file:
                if self._holder() == self.own:
                    self._write({})
            self._file = None

    def check(self) -> None:
        """Make sure that no other launch has replaced this one.

        Raises:
            RunError: one has.
        """
        if self._file is None:
            return
        holder = self._holder()
        if holder and holder["token"] != self.own["token"]:
            who = _describe(holder)
            raise RunError(f"{self.folder}: {who} has taken over this run folder; this launch ends without saving")

    def claimant(self) -> str | None:
        """Describe the later attempt of the same Slurm job that waits for this one; None if there is none."""
        claim = _read(self.folder / CLAIM_FILE)
        if claim and self.own["job"] and claim["job"] == self.own["job"] and claim["restart"] > self.own["restart"]:
            return _describe(claim)
        return None

    def _keep_touching(self) -> None:
        """Touch the lock until it is released, or for as long as it is this launch's."""
        while not self._released.wait(BEAT_SECONDS):
            holder = self._holder()
            if holder and holder["token"] != self.own["token"]:
                return  # a sign of life would now be that of another launch
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _try(self, stopped: Callable[[], bool]) -> dict[str, Any] | None:
        """Try to take the lock; return who holds it or, if `stopped`, may hold it, or None when it is taken."""
        file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), self.path.stat()) and not self._may_be_held_elsewhere(stopped):
                self._file = file
                return None
        except BlockingIOError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()
        return self._holder() or {}

    def _may_be_held_elsewhere(self, stopped: Callable[[], bool]) -> bool:
        """Whether another machine holds the lock, which this one cannot see, and has touched it lately.

        If `stopped`, it is not waited for, and may be held.
        """
        holder = self._holder()
        if not holder or (holder["host"], holder["boot"]) == (self.own["host"], self.own["boot"]):
            return False
        touched, end = self._touched(), time.monotonic() + SILENCE_SECONDS
        while time.monotonic() < end:
            if self._touched() != touched or stopped():
                return True
            time.sleep(POLL_SECONDS)
        return False

    def _touched(self) -> int:
        """When the lock was touched. It is opened for this: NFS answers `stat` from memory for up to a minute."""
        with self.path.open() as file:
            return os.fstat(file.fileno()).st_mtime_ns

    def _is_earlier_attempt(self, holder: dict[str, Any]) -> bool:
        return bool(
            holder and self.own["job"] and holder["job"] == self.own["job"] and holder["restart"] < self.own["restart"]
        )

    def _refuse(self, holder: dict[str, Any], waited: float | None) -> None:
        who = f" ({_describe(holder)})" if holder else ""
        what = "end it" if waited is not None else "wait for it"
        after = "" if waited is None else f"; it has not stopped within {waited:.0f} seconds (run.lock_wait_seconds)"
        raise RunError(
            f"{self.folder}: another process is training in this run folder{who}{after}; {what} or change run.name"
        )

    def _holder(self) -> dict[str, Any] | None:
        return _read(self.path)

    def _write(self, record: dict[str, Any]) -> None:
        """In place: a new file in its place would not be the one that is locked."""
        if self._file is not None:
            self._file.seek(0)
            self._file.write((json.dumps(record) if record else "").ljust(RECORD_BYTES))
            self._file.flush()
            self._file.truncate()


def is_locked(folder: Path) -> bool:
    """Return whether a process is training in the folder; locks of other machines may not be visible."""
    try:
        with (folder / LOCK_FILE).open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        return False


def _read(file: Path) -> dict[str, Any] | None:
    """A record like `RunLock.own`; None if there is none, as in an older version's empty file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    expected = {"token": str, "host": str, "boot": str, "pid": int, "since": str, "restart": int}
    if not isinstance(found, dict) or not all(isinstance(found.get(key), kind) for key, kind in expected.items()):
        return None
    return {**found, "job": found.get("job")}


def _describe(record: dict[str, Any]) -> str:
    job = f", Slurm job {record['job']} restart {record['restart']}" if record["job"] else ""
    return f"process {record['pid']} on {record['host']} since {record['since']}{job}"


def _restarts() -> int:
    given = os.environ.get("SLURM_RESTART_COUNT", "")
    return int(given) if given.isdecimal() else 0
