"""How far each job of a sweep is."""

from __future__ import annotations

from pretrain.processes.exit_codes import DONE, STOPPED
from pretrain.sweep.definition import Sweep
from pretrain.sweep.jobs import Job, final_loss, plan_jobs, steps_taken


def format_status(sweep: Sweep) -> list[str]:
    """A line for each job: its index, how far it is, its validation loss, its labels and its run folder."""
    jobs = plan_jobs(sweep)
    rows = [("job", "state", "loss", "", "labels", "run")]
    for index, job in enumerate(jobs):
        loss = final_loss(job.run) if job.config else None
        mark = "chosen" if job.is_trial and job.chosen else ""
        run = str(job.run.path) if job.config else ""
        rows.append((str(index), _state(sweep, job), "" if loss is None else f"{loss:.4f}", mark, str(job), run))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    done = sum(job.config is not None and job.run.finished for job in jobs)
    lines.append(f"{done} of {len(jobs)} jobs complete")
    trials = sum(job.is_trial for job in jobs)
    if 0 < trials < len(jobs):
        lines.append(f"the jobs 0 to {trials - 1} choose values for the others: in a job array run them first")
    return lines


def _state(sweep: Sweep, job: Job) -> str:
    if job.config is None:
        return "waits for its values"
    if job.run.finished:
        return "complete"
    steps = f"step {steps_taken(job.run)} of {job.config.total_steps}"
    if job.run.is_locked():
        return f"running, {steps}"
    exit_file = sweep.folder / "jobs" / f"{job.config.run.name}.exit"
    code = exit_file.read_text().strip() if exit_file.exists() else str(STOPPED)
    if code not in (str(DONE), str(STOPPED)):
        return f"failed (exit {code}), {steps}"
    return f"stopped, {steps}" if job.run.path.exists() else "not started"
