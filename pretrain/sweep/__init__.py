"""Sweeps: one base config, axes of changes to it, and the list of runs that follows.

definition  the sweep file, validated
jobs        the jobs that follow from it, each a run config; which of the tuned values is chosen
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
