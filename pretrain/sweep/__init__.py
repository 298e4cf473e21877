"""Sweeps: one base config, axes of changes to it, and the resulting list of runs.

definition  the sweep file and its validation
jobs        the jobs of a sweep, each a run config, and the choice among tuned values
runner      runs several jobs at a time, each in its own training process
status      the state of each job
"""

from pretrain.sweep.definition import Sweep, is_sweep_file, load_sweep
from pretrain.sweep.jobs import Job, plan_jobs, write_plan
from pretrain.sweep.runner import run_job, run_sweep
from pretrain.sweep.status import format_status

__all__ = [
    "Job",
    "Sweep",
    "format_status",
    "is_sweep_file",
    "load_sweep",
    "plan_jobs",
    "run_job",
    "run_sweep",
    "write_plan",
]
