"""The batch step of a job: it checks the nodes, starts the work on them, passes on signals, and requeues the job.

Slurm starts this once, on the first node. With ``--signal=B:USR1@SECONDS`` it sends SIGUSR1 to this process alone when
the time limit is near; SIGTERM it sends to every process of the job when it ends the job itself.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pretrain.processes.errors import UserError
from pretrain.processes.exit_codes import BAD_INPUT, FAILED, STOPPED
from pretrain.processes.signals import ASKING
from pretrain.slurm.attempts import Attempts, Verdict, judge, may_restart, stopped
from pretrain.slurm.controller import JobStatus, SlurmError, exclude, job_status, node_names, rename, requeue
from pretrain.slurm.health import CANNOT_REPORT, unwritable
from pretrain.slurm.heard import Heard
from pretrain.slurm.listener import Listener
from pretrain.slurm.verdict import Findings, examine, read_reports

T = TypeVar("T")

DEFAULT_NAME = "aurora"
"""The job's name in the batch scripts, by which squeue would show every run."""
CLEAN_SECONDS = 60.0
START_SECONDS = 60.0
"""How long it may take until the tasks of the work exist, and receive signals themselves."""
LOOK_SECONDS = 1.0
SRUN = ("srun", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=0")
"""How a command is started once on each node; one that fails ends none of the others."""


class JobError(UserError):
    """The environment of a job is not as the batch scripts leave it."""


@dataclass(frozen=True)
class Job:
    """This job, as Slurm and the batch script describe it in the environment.

    Attributes:
        number: by which scontrol knows it. For a task of an array, SLURM_JOB_ID could mean the whole array.
        port: where the first node listens during the check.
        restart: how often it was requeued.
        node_list: as Slurm writes it.
        name: as squeue shows it.
        logs: the folder of its logs, which all nodes see.
        limit: how many restarts in a row may save no newer checkpoint.
        check_seconds: how long nodes wait for each other in the check before the start; 0: no check.
        host: a name or address of the first node.
        gpus: GPUs on each node.
        cache: the folder of the compile caches, on each node's own disk.
    """

    number: str
    port: int
    restart: int
    node_list: str
    name: str
    logs: Path
    limit: int
    check_seconds: int
    host: str
    gpus: int
    cache: Path

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Job:
        """Read it.

        Raises:
            JobError: this is not a job, or a variable is not a number.
        """

        def number(name: str, default: str) -> int:
            value = environment.get(name) or default
            if not re.fullmatch(r"[0-9]{1,10}", value):
                raise JobError(f"{name}: expected a whole number of at most 10 digits, got {value!r}")
            return int(value)

        needed = ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "AURORA_LOGS", "AURORA_COMPILE_CACHE", "AURORA_RENDEZVOUS_HOST")
        missing = [name for name in needed if not environment.get(name)]
        if missing:
            raise JobError(f"{', '.join(missing)} not set: submit one of the scripts in slurm/ with sbatch")
        array, task = (environment.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
        return cls(
            number=f"{array}_{task}" if array and task else environment["SLURM_JOB_ID"],
            port=10000 + number("SLURM_JOB_ID", "") % 10000,
            restart=number("SLURM_RESTART_COUNT", "0"),
            node_list=environment["SLURM_JOB_NODELIST"],
            name=environment.get("SLURM_JOB_NAME", ""),
            logs=Path(environment["AURORA_LOGS"]),
            limit=number("AURORA_REQUEUES", "5"),
            check_seconds=number("AURORA_CHECK_SECONDS", "300"),
            host=environment["AURORA_RENDEZVOUS_HOST"],
            gpus=number("SLURM_GPUS_ON_NODE", "0"),
            cache=Path(environment["AURORA_COMPILE_CACHE"]),
        )


class Work(NamedTuple):
    """What a job does."""

    name: str
    """What squeue shows instead of the scripts' own name."""
    last_step: Callable[[], int]
    """Returns the step of the newest checkpoint."""
    near_limit: Callable[[], bool] = lambda: False
    """Returns whether the work has stopped by itself because the job's time limit was near."""


class Supervisor:
    """Runs the work of a job, from the check of the nodes to the decision about a requeue.

    Args:
        job: this job.
        work: what it does.
        say: prints a line.
        heard: the signals that this process has received so far.
    """

    def __init__(self, job: Job, work: Work, say: Callable[[str], None], heard: Heard | None = None) -> None:
        self.job, self.work, self.say = job, work, say
        self.attempts = Attempts(job.logs / "attempts.json")
        self.heard, self.listener = heard or Heard(), Listener()
        self._step = 0
        self._passed_on = False
        self._started: subprocess.Popen[bytes] | None = None

    def run(self, command: Sequence[str]) -> int:
        """Run `command`, an srun that starts the work on all nodes; return the exit code of the job."""
        job = self.job
        with self.heard.listening(), self.listener.listening():
            if job.name == DEFAULT_NAME:
                self._try(lambda: rename(job.number, self.work.name))
            step = self._last_step()
            self.attempts.begin(job.restart, job.node_list, step)
            self.heard.react = self._react
            self._react()  # to what came before
            self.say(f"job {job.number}, start {job.restart + 1} on {job.node_list}, newest checkpoint: step {step}")
            # Slurm itself requeues after a lost node, without asking how often.
            earlier = may_restart("nodes were lost", self.attempts.stalled(step) - 1, job.limit)
            if earlier.gave_up:
                return self._finish(FAILED, step, earlier, None)
            try:
                findings = self._check_nodes()
                code = FAILED if findings.bad or findings.problem else self._work_on(command)
            except SlurmError as error:
                findings = Findings(problem=str(error))
            if findings.problem:
                self.say(f"error: {findings.problem}")
            if findings.hopeless:
                return self._finish(BAD_INPUT, step, Verdict(False, findings.problem), None)
            if findings.bad or findings.problem:
                for node, texts in findings.bad.items():
                    self.say(f"error: node {node} is bad: {'; '.join(texts)}")
                reason = f"bad nodes: {', '.join(findings.bad)}" if findings.bad else findings.problem
                return self._decide(
                    FAILED, lambda _: may_restart(reason, self.attempts.stalled(step), job.limit), list(findings.bad)
                )
            return self._decide(code, lambda status: self._judge(code, status))

    def _judge(self, code: int, status: JobStatus | None) -> Verdict:
        preempted = status is not None and status.preempted
        by_slurm = self.heard.asked or preempted or (status is not None and status.timed_out)
        by_slurm = by_slurm or (code == STOPPED and self._asking(self.work.near_limit, False))
        outside = preempted and stopped(code)
        stalled = self.attempts.stalled(self._last_step()) - outside
        return judge(code, by_slurm=by_slurm, stalled=stalled, limit=self.job.limit)._replace(outside=outside)

    def _work_on(self, command: Sequence[str]) -> int:
        """Run the work; return its exit code."""
        environment = dict(os.environ)
        status = self._try(lambda: job_status(self.job.number))
        if status is not None and status.ends is not None:
            # Newer versions of Slurm set it themselves. A run that knows it can save before Slurm ends it.
            environment.setdefault("SLURM_JOB_END_TIME", str(int(status.ends)))
        if self._is_told():  # during the check, or since
            return STOPPED
        self._started = _start(command, environment)
        if self.heard:  # while it was being started: it may have missed it
            self._ask()
        code = self._await(self._started)
        return 128 - code if code < 0 else code

    def _await(self, work: subprocess.Popen[bytes]) -> int:
        """Wait for the work; return its exit code. While its tasks do not exist, only the listener hears a SIGTERM."""
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until and self.listener.heard() != signal.SIGTERM:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return work.wait(LOOK_SECONDS)
        if self.listener.heard() == signal.SIGTERM and self._is_told():
            self._ask()
        self.listener.stop()
        return work.wait()

    def _is_told(self) -> bool:
        """Whether this process or the listener has received a signal."""
        if self.listener.heard() is not None:
            self.heard.told = True
            self._react()
        return bool(self.heard)

    def _react(self) -> None:
        """In a signal handler, or after one: record what was heard, and pass on what only this process receives."""
        if self.heard.told:
            self.attempts.note_told()
        if self.heard.asked:
            self._ask()

    def _ask(self) -> None:
        """Ask the work to stop, once: a second notice would end it without a checkpoint. One that follows or precedes
        Slurm's SIGTERM does not (`pretrain.processes.signals.SignalCount`)."""
        if self._started is not None and not self._passed_on:
            self._passed_on = True
            self._started.send_signal(signal.SIGUSR1)  # srun sends it to all tasks

    def _decide(self, code: int, verdict_of: Callable[[JobStatus | None], Verdict], bad: Sequence[str] = ()) -> int:
        """Requeue the job or not, unless Slurm is ending it already; return the exit code."""
        status = self._try(lambda: job_status(self.job.number))
        if status is not None and status.state != "RUNNING" and not status.timed_out:
            why = f"exit code {code}, while Slurm is ending or requeueing the job"
            verdict = Verdict(False, why, outside=stopped(code))
        else:
            verdict = verdict_of(status)
        return self._finish(code, self._last_step(), verdict, status, bad)

    def _finish(self, code: int, step: int, verdict: Verdict, status: JobStatus | None, bad: Sequence[str] = ()) -> int:
        job = self.job
        self.attempts.end(code, step, verdict)
        if self.attempts.problem is not None and verdict.requeue and self.attempts.stalled(step):
            why = (
                f"{verdict.why}; {self.attempts.path} cannot be written ({self.attempts.problem.strerror}), so restarts"
            )
            verdict = Verdict(False, f"{why} without a newer checkpoint cannot be counted: not requeued")
        self.say(
            f"{'requeueing ' if verdict.requeue else ''}job {job.number}: {verdict.why}; newest checkpoint: step {step}"
        )
        if not verdict.requeue:
            self._clean()
            return code
        try:
            requeue(job.number)
        except SlurmError as error:
            self.say(f"error: the job could not be requeued; submit it again to continue: {error}")
            return code
        # Slurm has sent SIGTERM to this process by now. It leaves enough time for this.
        if bad:
            try:
                exclude(job.number, status.excluded if status else "", bad)
                self.say(f"job {job.number} will not run on {', '.join(bad)} again")
            except SlurmError as error:
                self.say(f"error: {', '.join(bad)} could not be excluded: {error}")
        return code

    def _check_nodes(self) -> Findings:
        """Test every node, and wait for the reports."""
        job = self.job
        if job.check_seconds == 0 or self._is_told():
            return Findings()
        folder = job.logs / f"check-{job.restart}"
        shutil.rmtree(folder, ignore_errors=True)
        if problem := unwritable(folder):
            return Findings(problem=problem)
        began = time.monotonic()
        command = [
            *(*SRUN, f"--wait={job.check_seconds}", sys.executable),
            *("-m", "pretrain.slurm.health", "--folder", str(folder), "--gpus", str(job.gpus)),
            *("--host", job.host, "--port", str(job.port), "--disk", str(job.cache)),
            *("--seconds", str(job.check_seconds)),
        ]
        self._started = _start(command)
        try:
            # Twice: torch takes a while to be loaded from a network file system.
            self._started.wait(timeout=2 * job.check_seconds)
        except subprocess.TimeoutExpired:
            self._started.kill()
            self._started.wait()
        # `scancel --signal=TERM` reaches the tasks of the check and not this process. srun returns the highest code.
        code = self._started.returncode
        self.heard.told = self.heard.told or code - 128 in ASKING
        self._started = None
        if self._is_told():
            return Findings()
        nodes = node_names(job.node_list)
        problem = unwritable(folder, was_full=code == CANNOT_REPORT)
        findings = examine(read_reports(folder), nodes, job.check_seconds, problem)
        if not findings.bad and not findings.problem:
            self.say(f"checked {len(nodes)} nodes in {time.monotonic() - began:.0f} s: all good")
        return findings

    def _clean(self) -> None:
        """Delete the compile caches on all nodes; a job that is requeued may still use them."""
        if self.job.cache.name.startswith("aurora-"):
            with contextlib.suppress(subprocess.TimeoutExpired, OSError):
                command = [*SRUN, "rm", "-rf", "--", str(self.job.cache)]
                subprocess.run(command, timeout=CLEAN_SECONDS, check=False, stderr=subprocess.DEVNULL)

    def _last_step(self) -> int:
        """The step of the newest checkpoint; the last one known if it cannot be read now."""
        self._step = self._asking(self.work.last_step, self._step)
        return self._step

    def _asking(self, ask: Callable[[], T], otherwise: T) -> T:
        """Ask about the work; if its files cannot be read, say so: that does not decide about the job."""
        try:
            return ask()
        except (OSError, UserError) as error:
            self.say(f"warning: {error}")
            return otherwise

    def _try(self, ask: Callable[[], Any]) -> Any:
        """Ask Slurm; on an error print it and return None."""
        try:
            return ask()
        except SlurmError as error:
            self.say(f"warning: {error}")
            return None


def _start(command: Sequence[str], environment: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start a step of the job.

    Raises:
        SlurmError: srun is not there, or this node cannot start another process.
    """
    try:
        return subprocess.Popen(command, env=environment)
    except OSError as error:
        raise SlurmError(f"{command[0]} cannot be started: {error.strerror}") from None
