"""The batch step under a real Slurm, with work that trains nothing: signals when there is no step, and requeues."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, Job, missing

pytestmark = [pytest.mark.long, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

REPOSITORY = Path(__file__).parents[2]
# Where the status of the job is asked for, right before the work, it waits for as long as there is a file `wait`.
STEP = """
import functools, os, sys, time
from pathlib import Path
from pretrain.slurm import supervisor
from pretrain.slurm.supervisor import Job, Supervisor, Work

ask = supervisor.job_status
def asks(job):
    Path("asked").touch()
    while Path("wait").exists():
        time.sleep(0.1)
    return ask(job)
supervisor.job_status = asks
job = Job.from_environment(os.environ)
work = ["srun", "--ntasks=1", "--cpu-bind=none", "bash", "-c", sys.argv[1]]
sys.exit(Supervisor(job, Work("nothing", lambda: 0), functools.partial(print, flush=True)).run(work))
"""
SCRIPT = "#!/bin/bash\ntrap '' USR1 TERM\nexec {python} step.py {work}\n"


class Jobs:
    """A cluster, and a folder from which jobs are submitted."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "step.py").write_text(STEP)

    def submit(self, work: str) -> int:
        script = self.folder / "job.sh"
        script.write_text(SCRIPT.format(python=sys.executable, work=f"'{work}'"))
        environment = {
            "PYTHONPATH": str(REPOSITORY),
            "AURORA_LOGS": str(self.folder / "logs"),
            "AURORA_COMPILE_CACHE": str(self.folder / "aurora-cache"),
            "AURORA_RENDEZVOUS_HOST": "127.0.0.1",
            "AURORA_REQUEUES": "1",
        }
        options = ("--time=10", "--requeue", "--open-mode=append")
        return self.cluster.submit(*options, str(script), directory=self.folder, environment=environment)

    def wait(self, name: str, number: int) -> None:
        """Until a job has made a file; a requeued one does not wait for its time."""

        def is_there() -> bool:
            if not (self.folder / name).exists() and self.cluster.job(number).state == "PENDING":
                self.cluster.command("scontrol", "update", f"JobId={number}", "StartTime=now", check=False)
            return (self.folder / name).exists()

        self.cluster.wait(is_there, name, 120)

    def finish(self, number: int) -> Job:
        return self.cluster.finish(number, 180)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), nodes=1)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def jobs(cluster: Cluster, tmp_path: Path) -> Jobs:
    return Jobs(cluster, tmp_path)


def test_work_is_done_beside_the_listener(jobs: Jobs) -> None:
    job = jobs.finish(jobs.submit("squeue --steps --noheader >steps"))
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 0), job.output
    assert "sleep" in (jobs.folder / "steps").read_text()
    assert "checked 1 nodes" in job.output


def test_a_signal_while_there_is_no_step_keeps_the_work_from_starting(jobs: Jobs) -> None:
    (jobs.folder / "wait").touch()
    number = jobs.submit("touch worked")
    jobs.wait("asked", number)
    jobs.cluster.command("scancel", "--signal=TERM", str(number))
    time.sleep(2)
    (jobs.folder / "wait").unlink()
    job = jobs.finish(number)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 75, 0), job.output
    assert not (jobs.folder / "worked").exists()


def test_requeues_before_the_first_checkpoint_do_not_use_up_the_restarts(jobs: Jobs) -> None:
    """One restart in vain is allowed here, and three are asked for."""
    number = jobs.submit("touch worked-$SLURM_RESTART_COUNT; [ -e enough ] || sleep 100")
    for restart in range(3):
        jobs.wait(f"worked-{restart or ''}", number)
        if restart == 2:
            (jobs.folder / "enough").touch()
        jobs.cluster.command("scontrol", "requeue", str(number))
    job = jobs.finish(number)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 3), job.output
    record = json.loads((jobs.folder / "logs/attempts.json").read_text())
    assert [bool(attempt.get("outside") or "ended" not in attempt) for attempt in record] == [True, True, True, False]
    assert (jobs.folder / "worked-3").exists()
