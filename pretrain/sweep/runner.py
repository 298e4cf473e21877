"""Run the jobs of a sweep, several at a time, each in its own training process.

All state is in the run folders. On a restart, finished jobs are skipped, stopped jobs resume from their checkpoints,
and tuned values are chosen again. A sweep may therefore be killed and restarted at any time. Several processes may run
the same sweep at the same time: each waits for runs that another process is training.

A disk that is full or away for a while ends nothing here: what cannot be written is tried again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from pretrain.files import replace_text
from pretrain.processes.exit_codes import DONE, FAILED, STOPPED
from pretrain.processes.output import output_may_fail
from pretrain.processes.parent import PARENT_VARIABLE
from pretrain.processes.signals import PASSED_ON, StopRequests, stop_requests
from pretrain.run.folder import RunError
from pretrain.run.reader import job_file
from pretrain.sweep.definition import Sweep
from pretrain.sweep.jobs import PLAN_FILE, Job, plan_jobs, write_plan

POLL_SECONDS = 0.5
LOCKED_POLL_SECONDS = 5.0  # how often to check whether a run that another process trains has ended
START_TRIES = 12
"""How many looks in a row, `LOCKED_POLL_SECONDS` apart, may fail to start a job while no other one is running."""


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    started: float
    gpu: str | None = None
    """The GPU reserved for it, as named in CUDA_VISIBLE_DEVICES; None if there are no GPUs."""
    asked: int = 0
    """Number of stop requests sent to it."""


def visible_gpus() -> list[str]:
    """Return the GPUs that jobs may use, as named in CUDA_VISIBLE_DEVICES."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [name for name in named.split(",") if name][:count] if named else [str(index) for index in range(count)]


def default_at_once() -> int:
    """Return the default number of parallel jobs: one per GPU, or one per CPU core if there are no GPUs."""
    return len(visible_gpus()) or len(os.sched_getaffinity(0))


def run_sweep(sweep: Sweep, at_once: int | None = None) -> int:
    """Run every job that is not done; return the exit code.

    Args:
        sweep: the validated sweep.
        at_once: number of parallel training processes; each gets a GPU of its own, or one CPU thread if there is none
            left. None means `default_at_once()`.

    Returns:
        0 if all jobs are done, 1 if some failed (the others are done), 75 if stopped on request.
    """
    with output_may_fail("the sweep"):
        return _Runner(sweep, at_once or default_at_once()).run()


def run_job(sweep: Sweep, index: int) -> int:
    """Run a single job, for use in a job array; return its exit code.

    Raises:
        RunError: there is no such job, or it waits for others.
    """
    jobs = plan_jobs(sweep)
    if not 0 <= index < len(jobs):
        raise RunError(f"--index: expected a job from 0 to {len(jobs) - 1}, got {index}")
    if jobs[index].config is None:
        last = sum(job.is_trial for job in jobs) - 1
        raise RunError(f"--index: job {index} waits for jobs 0 to {last}, which choose its values; run them first")
    with output_may_fail("the job"):
        return _Runner(sweep, 1, only=jobs[index].run.path).run()


class _Runner:
    """The loop that starts jobs and waits for them."""

    def __init__(self, sweep: Sweep, at_once: int, only: Path | None = None) -> None:
        self.sweep, self.at_once, self.only = sweep, at_once, only
        self.gpus = visible_gpus()
        self.running: list[_Running] = []
        self.ended: dict[Path, int] = {}
        """Run folder -> exit code, for the jobs that this process ran."""
        self.minutes: list[float] = []
        """Durations of the jobs that this process completed."""
        self.requests = StopRequests()
        """The stop requests that this process received."""
        self.look_again = 0.0
        """When to check again on runs that other processes train."""
        self.unwritten: dict[Path, Callable[[], object]] = {}
        """The sweep's own files that could not be written -> what writes them, at the next look."""
        self.problem: str | None = None
        """Why no job can be started, if so."""
        self.in_vain = 0
        """How many looks in a row could start no job while none was running."""
        self._warned: set[str] = set()

    def run(self) -> int:
        """Run until no job is left that this process can run; return the exit code.

        Raises:
            RunError: a run cannot be read, or the plan cannot be written at the start.
        """
        jobs = plan_jobs(self.sweep)
        try:
            write_plan(self.sweep, jobs)
        except OSError as error:
            file = self.sweep.folder / PLAN_FILE
            raise RunError(f"{file}: cannot be written: {error.strerror or error}") from None
        jobs = self.own(jobs)
        done = sum(job.config is not None and job.run.finished for job in jobs)
        print(f"{len(jobs)} jobs, {done} done, {self.at_once} at a time; runs in {self.sweep.file.root}", flush=True)
        with stop_requests(self.requests, "stopping the running jobs after their step", warn=print):
            self.start(jobs)
            while self.running or (self.open_jobs(jobs) and not self.requests and self.in_vain < START_TRIES):
                time.sleep(POLL_SECONDS)
                self.pass_on_requests()
                ended = self.collect()
                if (ended or time.monotonic() > self.look_again) and not self.requests:
                    jobs = self.plan_again(jobs)
                    self.start(jobs)
                    if ended:
                        self.show_progress(jobs)
        return self.outcome(self.plan_again(jobs))

    def plan_again(self, jobs: list[Job]) -> list[Job]:
        """Determine the jobs after some have ended; if the runs cannot be read now, they stay as they were."""
        try:
            return self.plan()
        except (OSError, RunError) as error:
            self.look_again = time.monotonic() + LOCKED_POLL_SECONDS
            self.warn(str(error))
            return jobs

    def plan(self) -> list[Job]:
        """Determine the current jobs and write them to sweep.json."""
        jobs = plan_jobs(self.sweep)
        self.write(self.sweep.folder / PLAN_FILE, lambda: write_plan(self.sweep, jobs))
        self.look_again = time.monotonic() + LOCKED_POLL_SECONDS
        return self.own(jobs)

    def own(self, jobs: list[Job]) -> list[Job]:
        """Return the jobs that this process may run."""
        return jobs if self.only is None else [job for job in jobs if job.config and job.run.path == self.only]

    def write(self, file: Path, write: Callable[[], object]) -> None:
        """Write one of the sweep's own files, and those that could not be written before."""
        self.unwritten[file] = write
        for path, again in list(self.unwritten.items()):
            try:
                again()
            except OSError as error:
                self.warn(f"{path}: cannot be written: {error.strerror or error}")
            else:
                del self.unwritten[path]

    def warn(self, problem: str) -> None:
        """Print a problem that another try may mend, once."""
        if problem not in self._warned:
            self._warned.add(problem)
            print(f"{_clock()} warning: {problem}; trying again", flush=True)

    def open_jobs(self, jobs: list[Job]) -> list[Job]:
        """Return the jobs that have a config, are not done, and were not started by this process."""
        here = {running.job.run.path for running in self.running} | set(self.ended)
        return [job for job in jobs if job.config and not job.run.finished and job.run.path not in here]

    def start(self, jobs: list[Job]) -> None:
        """Start jobs until `at_once` are running, or one cannot be started now."""
        self.problem = None
        for job in self.open_jobs(jobs):
            if len(self.running) >= self.at_once:
                break
            if not job.run.is_locked() and all(r.job.run.path != job.run.path for r in self.running):
                try:
                    self.running.append(self.launch(job))
                except OSError as error:  # a full disk or quota, too many processes
                    file = error.filename or job_file(self.sweep.folder, job.run.path.name, ".yaml")
                    self.problem = f"{job} cannot be started: {file}: {error.strerror or error}"
                    self.warn(self.problem)
                    break
        self.in_vain = self.in_vain + 1 if self.problem and not self.running else 0

    def launch(self, job: Job) -> _Running:
        """Start the training process of a job; it saves a checkpoint and stops if this process dies."""
        assert job.config is not None
        config, log = (job_file(self.sweep.folder, job.config.run.name, suffix) for suffix in (".yaml", ".log"))
        config.parent.mkdir(parents=True, exist_ok=True)
        replace_text(config, job.config.to_yaml())
        environment = os.environ | {PARENT_VARIABLE: str(os.getpid())}
        taken = {running.gpu for running in self.running}
        gpu = next((name for name in self.gpus if name not in taken), None)
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        else:
            environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "pretrain", "train", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C must reach only this process, which passes it on as a stop request
            )
        print(f"{_clock()} started  {job} -> {job.run.path}", flush=True)
        return _Running(job, process, log, time.monotonic(), gpu)

    def pass_on_requests(self) -> None:
        """Pass the first stop request on to every training process, and end them at the second one.

        The first one does not count if the process has received one already: Slurm signals all processes of a job.
        """
        for running in self.running:
            while running.asked < self.requests.count:
                running.process.send_signal(signal.SIGKILL if running.asked else PASSED_ON)
                running.asked += 1

    def collect(self) -> bool:
        """Record the jobs that ended; return whether there were any."""
        ended = [running for running in self.running if running.process.poll() is not None]
        for running in ended:
            self.running.remove(running)
            code = running.process.returncode
            if self.requests and code < 0:
                code = STOPPED  # it was killed before it installed its signal handlers, or before it could finish
            self.ended[running.job.run.path] = code
            file = job_file(self.sweep.folder, running.job.run.path.name, ".exit")
            self.write(file, partial(replace_text, file, f"{code}\n"))
            minutes = (time.monotonic() - running.started) / 60
            took = f"{minutes:.1f} min"
            if code == DONE:
                self.minutes.append(minutes)
                print(f"{_clock()} done     {running.job} ({took})", flush=True)
            elif code == STOPPED:
                print(f"{_clock()} stopped  {running.job} ({took})", flush=True)
            else:
                print(f"{_clock()} FAILED   {running.job}: {_last_error(running.log)} (see {running.log})", flush=True)
        return bool(ended)

    def show_progress(self, jobs: list[Job]) -> None:
        """Print how many jobs are done, and the remaining time estimated from the mean duration so far."""
        left = sum(job.config is None or not job.run.finished for job in jobs)
        if left and self.minutes:
            estimate = left * sum(self.minutes) / len(self.minutes) / self.at_once
            print(f"{_clock()} {len(jobs) - left} of {len(jobs)} jobs done, about {estimate:.0f} min left", flush=True)

    def outcome(self, jobs: list[Job]) -> int:
        """Print a summary and return the exit code."""
        done = sum(job.config is not None and job.run.finished for job in jobs)
        failed = sum(code not in (DONE, STOPPED) for code in self.ended.values())
        print(f"{done} of {len(jobs)} jobs done" + (f", {failed} failed" if failed else ""), flush=True)
        problems = [f"{file}: cannot be written" for file in self.unwritten]
        if self.problem and not self.requests:
            problems.append(self.problem)
        for problem in problems:
            print(f"error: {problem}; make room, then run the same command again", file=sys.stderr, flush=True)
        if failed or (problems and not self.requests):
            return FAILED
        if done < len(jobs):
            print("run the same command again to continue", flush=True)
            return STOPPED
        print(f"aurora report {self.sweep.folder} shows the result", flush=True)
        return DONE


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def _last_error(log: Path) -> str:
    """Return the last error line of a job's log, or else its last line."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["no output"]
    except OSError as error:
        return f"its log cannot be read: {error.strerror}"
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines)[-1]
