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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from pretrain.processes.errors import UserError
from pretrain.processes.exit_codes import BAD_INPUT, FAILED, STOPPED
from pretrain.processes.signals import SIGNALS
from pretrain.slurm.attempts import Attempts, Verdict, judge, may_restart
from pretrain.slurm.controller import JobStatus, SlurmError, exclude, job_status, node_names, rename, requeue
from pretrain.slurm.verdict import Findings, examine, read_reports

DEFAULT_NAME = "aurora"
"""The job's name in the batch scripts, by which squeue would show every run."""
CLEAN_SECONDS = 60.0
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
    """

    def __init__(self, job: Job, work: Work, say: Callable[[str], None]) -> None:
        self.job, self.work, self.say = job, work, say
        self.attempts = Attempts(job.logs / "attempts.json")
        self.asked = False
        """Whether SIGUSR1 came: the work shall stop, and the job be requeued."""
        self.told = False
        """Whether another signal came to this process or to the check: the work has it as well if it has started, and
        shall not start otherwise."""
        self._passed_on = False
        self._started: subprocess.Popen[bytes] | None = None

    def run(self, command: Sequence[str]) -> int:
        """Run `command`, an srun that starts the work on all nodes; return the exit code of the job."""
        job = self.job
        with self._catching_signals():
            if job.name == DEFAULT_NAME:
                self._try(lambda: rename(job.number, self.work.name))
            step = self.work.last_step()
            self.attempts.begin(job.restart, job.node_list, step)
            self.say(f"job {job.number}, start {job.restart + 1} on {job.node_list}, newest checkpoint: step {step}")
            # Slurm itself requeues after a lost node, without asking how often.
            earlier = may_restart("nodes were lost", self.attempts.stalled(step) - 1, job.limit)
            if earlier.gave_up:
                return self._finish(FAILED, step, earlier, None)
            findings = self._check_nodes()
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
            code = self._work_on(command)
            return self._decide(code, lambda status: self._judge(code, status))

    def _judge(self, code: int, status: JobStatus | None) -> Verdict:
        by_slurm = self.asked or (status is not None and (status.preempted or status.timed_out))
        by_slurm = by_slurm or (code == STOPPED and self.work.near_limit())
        return judge(
            code, by_slurm=by_slurm, stalled=self.attempts.stalled(self.work.last_step()), limit=self.job.limit
        )

    def _work_on(self, command: Sequence[str]) -> int:
        """Run the work; return its exit code."""
        if self.asked or self.told:  # during the check
            return STOPPED
        environment = dict(os.environ)
        status = self._try(lambda: job_status(self.job.number))
        if status is not None and status.ends is not None:
            # Newer versions of Slurm set it themselves. A run that knows it can save before Slurm ends it.
            environment.setdefault("SLURM_JOB_END_TIME", str(int(status.ends)))
        self._started = subprocess.Popen(command, env=environment)
        self._pass_on()  # what came before there was anything to pass it on to
        code = self._started.wait()
        return 128 - code if code < 0 else code

    def _pass_on(self) -> None:
        """Ask the work to stop, once: a second request would end it without a checkpoint."""
        if self.asked and self._started is not None and not self._passed_on:
            self._passed_on = True
            self._started.send_signal(signal.SIGUSR1)  # srun sends it to all tasks

    def _decide(self, code: int, verdict_of: Callable[[JobStatus | None], Verdict], bad: Sequence[str] = ()) -> int:
        """Requeue the job or not, unless Slurm is ending it already; return the exit code."""
        status = self._try(lambda: job_status(self.job.number))
        if status is not None and status.state != "RUNNING" and not status.timed_out:
            verdict = Verdict(False, f"exit code {code}, while Slurm is ending or requeueing the job")
        else:
            verdict = verdict_of(status)
        return self._finish(code, self.work.last_step(), verdict, status, bad)

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
        if job.check_seconds == 0 or self.asked or self.told:
            return Findings()
        folder = job.logs / f"check-{job.restart}"
        shutil.rmtree(folder, ignore_errors=True)
        began = time.monotonic()
        command = [
            *(*SRUN, f"--wait={job.check_seconds}", sys.executable),
            *("-m", "pretrain.slurm.health", "--folder", str(folder), "--gpus", str(job.gpus)),
            *("--host", job.host, "--port", str(job.port), "--disk", str(job.cache)),
            *("--seconds", str(job.check_seconds)),
        ]
        self._started = subprocess.Popen(command)
        try:
            # Twice: torch takes a while to be loaded from a network file system.
            self._started.wait(timeout=2 * job.check_seconds)
        except subprocess.TimeoutExpired:
            self._started.kill()
            self._started.wait()
        # `scancel --signal=TERM` reaches the tasks of the check and not this process. srun returns the highest code.
        self.told = self.told or self._started.returncode - 128 in SIGNALS
        self._started = None
        if self.asked or self.told:
            return Findings()
        nodes = node_names(job.node_list)
        findings = examine(read_reports(folder), nodes, job.check_seconds)
        if not findings.bad and not findings.problem:
            self.say(f"checked {len(nodes)} nodes in {time.monotonic() - began:.0f} s: all good")
        return findings

    def _clean(self) -> None:
        """Delete the compile caches on all nodes; a job that is requeued may still use them."""
        if self.job.cache.name.startswith("aurora-"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                command = [*SRUN, "rm", "-rf", "--", str(self.job.cache)]
                subprocess.run(command, timeout=CLEAN_SECONDS, check=False, stderr=subprocess.DEVNULL)

    def _try(self, ask: Callable[[], Any]) -> Any:
        """Ask Slurm; on an error print it and return None."""
        try:
            return ask()
        except SlurmError as error:
            self.say(f"warning: {error}")
            return None

    @contextlib.contextmanager
    def _catching_signals(self) -> Iterator[None]:
        """Survive signals until the work has ended; pass SIGUSR1 on to it."""

        def notice(number: int, frame: FrameType | None) -> None:
            self.asked = True
            self._pass_on()

        def note(number: int, frame: FrameType | None) -> None:
            self.told = True

        handlers = dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGHUP), note)
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, notice)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
