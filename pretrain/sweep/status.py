"""The state of each job of a sweep."""

from __future__ import annotations

from pretrain.run.folder import RunError
from pretrain.run.reader import read_exit_code, read_run
from pretrain.sweep.definition import Sweep
from pretrain.sweep.jobs import Job, plan_jobs
from pretrain.text_tables import aligned


def format_status(sweep: Sweep) -> list[str]:
    """Return a line per job: index, state and step, validation loss if done, labels, run folder."""
    jobs = plan_jobs(sweep)
    rows = [("job", "state", "loss", "", "labels", "run")]
    done = 0
    for index, job in enumerate(jobs):
        state, loss = _state_and_loss(sweep, job)
        done += state == "done"
        mark = "chosen" if job.is_trial and job.chosen else ""
        run = str(job.run.path) if job.config else ""
        rows.append((str(index), state, "" if loss is None else f"{loss:.4f}", mark, str(job), run))
    lines = aligned(rows)
    lines.append(f"{done} of {len(jobs)} jobs done")
    trials = sum(job.is_trial for job in jobs)
    if 0 < trials < len(jobs):
        lines.append(f"jobs 0 to {trials - 1} choose values for the other jobs: in a job array, run them first")
    return lines


def _state_and_loss(sweep: Sweep, job: Job) -> tuple[str, float | None]:
    """Return a job's state (see `pretrain.run.reader.STATES`) with its step, and its loss if it is done."""
    if job.config is None:
        return "pending, waiting for its values", None
    code = read_exit_code(sweep.folder, job.config.run.name)
    failed = "failed" if code is None else f"failed (exit {code})"
    try:
        run = read_run(job.run.path, code)
        if run.state in ("done", "pending"):
            return run.state, run.final_loss
        state = failed if run.state == "failed" else run.state
        return f"{state}, step {run.last_step} of {job.config.total_steps}", None
    except RunError as error:
        return f"{failed}: {error}", None
