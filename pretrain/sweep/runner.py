"""Run the jobs of a sweep, several at a time, each in its own training process.

The sweep keeps no state besides the run folders: a job that is done is not run again, a job that was stopped resumes
from its checkpoint, and the chosen values are determined again. A sweep may therefore be killed at any time and started
again, also by several processes at the same time: if another process trains a run, the sweep waits for it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from pretrain.files import replace_text
from pretrain.processes.exit_codes import DONE, FAILED, STOPPED
from pretrain.processes.signals import StopRequests, stop_requests
from pretrain.processes.torchrun import PARENT_VARIABLE
from pretrain.run.folder import RunError
from pretrain.run.reader import job_file
from pretrain.sweep.definition import Sweep
from pretrain.sweep.jobs import Job, plan_jobs, write_plan

POLL_SECONDS = 0.5
LOCKED_POLL_SECONDS = 5.0  # how often to look whether a run that another process trains has ended


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen[bytes]
    log: Path
    started: float
    gpu: str | None = None
    """The GPU that it has to itself, as in CUDA_VISIBLE_DEVICES; None on a machine without."""
    asked: int = 0
    """How often it was asked to stop."""


def visible_gpus() -> list[str]:
    """The GPUs that jobs may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [name for name in named.split(",") if name][:count] if named else [str(index) for index in range(count)]


def default_at_once() -> int:
    """One job a GPU, or without any one a core."""
    return len(visible_gpus()) or len(os.sched_getaffinity(0))


def run_sweep(sweep: Sweep, at_once: int | None = None) -> int:
    """Run every job that is not complete; returns the exit code.

    Args:
        sweep: validated.
        at_once: training processes at a time, each with one thread, or with one GPU as far as there are any; None:
            `default_at_once`.

    Returns:
        0 all jobs are complete, 1 some failed (the others are complete), 75 stopped on request.
    """
    return _Runner(sweep, at_once or default_at_once()).run()


def run_job(sweep: Sweep, index: int) -> int:
    """Run one job of the plan, as a task of a job array does; returns its exit code.

    Raises:
        RunError: there is no such job, or it waits for others.
    """
    jobs = plan_jobs(sweep)
    write_plan(sweep, jobs)
    if not 0 <= index < len(jobs):
        raise RunError(f"--index: the sweep has the jobs 0 to {len(jobs) - 1}, got {index}")
    if jobs[index].config is None:
        last = sum(job.is_trial for job in jobs) - 1
        raise RunError(f"--index: job {index} waits for the jobs 0 to {last}, which choose its values; run them first")
    runner = _Runner(sweep, 1, only=jobs[index].run.path)
    return runner.run()


class _Runner:
    """The loop that keeps jobs running."""

    def __init__(self, sweep: Sweep, at_once: int, only: Path | None = None) -> None:
        self.sweep, self.at_once, self.only = sweep, at_once, only
        self.gpus = visible_gpus()
        self.running: list[_Running] = []
        self.ended: dict[Path, int] = {}
        """Exit codes by run folder of the jobs that ended here."""
        self.minutes: list[float] = []
        """How long the jobs took that were completed here."""
        self.requests = StopRequests()
        """How often this process was asked to stop."""
        self.look_again = 0.0
        """When to look again at runs that another process trains."""

    def run(self) -> int:
        """Until everything that can be done is done."""
        jobs = self.plan()
        done = sum(job.config is not None and job.run.finished for job in jobs)
        print(f"{len(jobs)} jobs, {done} done, {self.at_once} at once; runs in {self.sweep.file.root}", flush=True)
        with stop_requests(self.requests, "stopping the running jobs after their step", warn=print):
            self.start(jobs)
            while self.running or (self.open_jobs(jobs) and not self.requests):
                time.sleep(POLL_SECONDS)
                self.pass_on_requests()
                ended = self.collect()
                if (ended or time.monotonic() > self.look_again) and not self.requests:
                    jobs = self.plan()
                    self.start(jobs)
                    if ended:
                        self.show_progress(jobs)
        return self.outcome(self.plan())

    def plan(self) -> list[Job]:
        """The jobs as they are now."""
        jobs = plan_jobs(self.sweep)
        write_plan(self.sweep, jobs)
        self.look_again = time.monotonic() + LOCKED_POLL_SECONDS
        return jobs if self.only is None else [job for job in jobs if job.config and job.run.path == self.only]

    def open_jobs(self, jobs: list[Job]) -> list[Job]:
        """Those that have a config, are not complete, were not run here, and are not running here."""
        here = {running.job.run.path for running in self.running} | set(self.ended)
        return [job for job in jobs if job.config and not job.run.finished and job.run.path not in here]

    def start(self, jobs: list[Job]) -> None:
        """Fill the free places."""
        for job in self.open_jobs(jobs):
            if len(self.running) >= self.at_once:
                return
            if not job.run.is_locked() and all(r.job.run.path != job.run.path for r in self.running):
                self.running.append(self.launch(job))

    def launch(self, job: Job) -> _Running:
        """Start the training process of a job; it stops by itself, with a checkpoint, should this process vanish."""
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
                start_new_session=True,  # Ctrl-C is for this process, which passes it on as a request to stop
            )
        print(f"{_clock()} started  {job} -> {job.run.path}", flush=True)
        return _Running(job, process, log, time.monotonic(), gpu)

    def pass_on_requests(self) -> None:
        """Ask every training process as often as this one was asked; the second time it ends at once."""
        for running in self.running:
            while running.asked < self.requests.count:
                running.process.send_signal(signal.SIGTERM)
                running.asked += 1

    def collect(self) -> bool:
        """Take note of the jobs that ended; whether there were any."""
        ended = [running for running in self.running if running.process.poll() is not None]
        for running in ended:
            self.running.remove(running)
            code = running.process.returncode
            if self.requests and code < 0:
                code = STOPPED  # it had not come to listen to signals yet, or was not given the time
            self.ended[running.job.run.path] = code
            replace_text(job_file(self.sweep.folder, running.job.run.path.name, ".exit"), f"{code}\n")
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
        """How many jobs are complete, and about how long the others take, as long as those before on average."""
        left = sum(job.config is None or not job.run.finished for job in jobs)
        if left and self.minutes:
            estimate = left * sum(self.minutes) / len(self.minutes) / self.at_once
            print(f"{_clock()} {len(jobs) - left} of {len(jobs)} jobs done, about {estimate:.0f} min left", flush=True)

    def outcome(self, jobs: list[Job]) -> int:
        """The exit code, and a last line."""
        done = sum(job.config is not None and job.run.finished for job in jobs)
        failed = sum(code not in (DONE, STOPPED) for code in self.ended.values())
        print(f"{done} of {len(jobs)} jobs done" + (f", {failed} failed" if failed else ""), flush=True)
        if failed:
            return FAILED
        if done < len(jobs):
            print("start the same command again to continue", flush=True)
            return STOPPED
        print(f"aurora report {self.sweep.folder} shows the result", flush=True)
        return DONE


def _clock() -> str:
    return time.strftime("%H:%M:%S")


def _last_error(log: Path) -> str:
    """The last error line of a job's log, else its last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or ["no output"]
    errors = [line for line in lines if line.startswith("error:")]
    return (errors or lines)[-1]
