"""Jobs that are requeued, killed, cut short and cancelled: each run ends with the bits of an undisturbed one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from pretrain.checkpoint.store import list_checkpoints
from tests.distributed.scenarios import metrics, newest, tensors
from tests.slurm.cluster import Cluster, Job, missing
from tests.slurm.test_cluster import CHANGES, CONFIG, ENVIRONMENT, REPOSITORY, SCRIPT, STEPS

pytestmark = [pytest.mark.long, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

# A save after each step: a disturbance costs at most one, and the steps take long enough to be disturbed.
SAVING = [*CHANGES, "checkpoint.save_every_steps=1", "checkpoint.keep_last=2"]
SECONDS = 900
COLUMNS = ("step", "loss", "grad_norm", "lr", "batch_sha256")


class Runs:
    """Four nodes, a folder from which jobs on two of them are submitted, and an undisturbed run."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        (folder / "assets").symlink_to(REPOSITORY / "assets")
        whole = self.finish(self.submit("whole"))
        assert (whole.state, whole.exit_code, whole.restarts) == ("COMPLETED", 0, 0), whole.output

    def submit(self, root: str, *options: str, arguments: tuple[str, ...] = (), **environment: str) -> int:
        return self.cluster.submit(
            *("--gpus-per-node=0", "--time=30", "--nodes=2", *options),
            *(str(SCRIPT), str(CONFIG), *SAVING, f"run.root={root}", *arguments),
            directory=self.folder,
            environment={**ENVIRONMENT, "AURORA_LOCAL": str(self.folder / "local"), **environment},
        )

    def finish(self, number: int) -> Job:
        return self.cluster.finish(number, SECONDS)

    def wait(self, condition: Callable[[], bool], number: int) -> None:
        def holds() -> bool:
            job = self.cluster.job(number)
            assert job.state in ("RUNNING", "PENDING", "COMPLETING"), f"{job.state}\n{job.output}"
            return condition()

        self.cluster.wait(holds, f"job {number}", SECONDS)

    def step(self, root: str) -> int:
        """The newest checkpoint of a run; 0 before there is one."""
        found = list_checkpoints(self.folder / root / "tiny/checkpoints")
        return int(found[-1].name.removeprefix("step-")) if found else 0

    def reach(self, step: int, root: str, number: int) -> None:
        """Wait until a run has saved a step, and is not over."""
        self.wait(lambda: self.step(root) >= step, number)
        assert self.step(root) < STEPS - 5, "the run was too fast to be disturbed"

    def crawl(self, condition: Callable[[], bool], root: str, number: int) -> None:
        """Wait while the run takes hardly a step: Slurm looks at its time limits, whole minutes, twice a minute, and
        at its nodes no more often."""
        rank = self.ranks(root)[0]

        def holds() -> bool:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank, signal.SIGSTOP)
                time.sleep(3)
                os.kill(rank, signal.SIGCONT)
            return condition()

        self.wait(holds, number)

    def ranks(self, root: str) -> list[int]:
        """The training processes of a run."""
        found = []
        for process in Path("/proc").iterdir():
            if process.name.isdecimal():
                try:
                    words = (process / "cmdline").read_bytes().decode().split("\0")
                    environment = (process / "environ").read_bytes().decode(errors="replace")
                except OSError:
                    continue
                if f"run.root={root}" in words and "\0RANK=" in environment:
                    found.append(int(process.name))
        return found

    def record(self, number: int) -> list[dict[str, object]]:
        """The record of a job's starts."""
        return json.loads((self.folder / f"logs/slurm/{number}/attempts.json").read_text())

    def assert_undisturbed(self, root: str) -> None:
        """The run is the undisturbed one, bit for bit and line for line."""
        first, second = self.folder / root, self.folder / "whole"
        a, b = tensors(first), tensors(second)
        assert newest(first).index["step"] == newest(second).index["step"] == STEPS
        assert a.keys() == b.keys()
        assert [key for key in a if not torch.equal(a[key], b[key])] == []
        assert metrics(first, *COLUMNS) == metrics(second, *COLUMNS)
        assert not self.ranks(root)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"), nodes=4)
    try:
        cluster.start()
        yield Runs(cluster, tmp_path_factory.mktemp("work"))
    finally:
        cluster.stop()


def test_a_requeue_in_the_middle(runs: Runs) -> None:
    number = runs.submit("requeued")
    runs.reach(10, "requeued", number)
    runs.cluster.command("scontrol", "requeue", str(number))
    job = runs.finish(number)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 1), job.output
    assert job.output.count(f"job {number}, start ") == 2  # the second start has kept the log of the first
    runs.assert_undisturbed("requeued")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank(runs: Runs, victim: int) -> None:
    root = f"killed-{victim}"
    number = runs.submit(root)
    runs.reach(10, root, number)
    os.kill(sorted(runs.ranks(root))[victim], signal.SIGKILL)
    job = runs.finish(number)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 1), job.output
    assert "was killed by signal 9" in job.output
    assert [attempt["exit_code"] for attempt in runs.record(number)] == [1, 0]
    runs.assert_undisturbed(root)


def test_a_time_limit_with_a_notice(runs: Runs) -> None:
    number = runs.submit("limited", "--signal=B:USR1@120")
    runs.reach(10, "limited", number)
    seconds = runs.cluster.command("squeue", "--noheader", "--job", str(number), "--format=%M").strip()
    minutes = int(seconds.split(":")[0]) + 2
    runs.cluster.command("scontrol", "update", f"JobId={number}", f"TimeLimit={minutes}")
    runs.crawl(lambda: "SIGUSR1: stopping" in runs.cluster.log(number).read_text(), "limited", number)
    runs.wait(lambda: runs.cluster.job(number).restarts == 1, number)
    runs.cluster.command("scontrol", "update", f"JobId={number}", "TimeLimit=30")
    job = runs.finish(number)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 1), job.output
    assert [attempt["exit_code"] for attempt in runs.record(number)] == [75, 0]
    runs.assert_undisturbed("limited")


def test_a_time_limit_without_a_notice(runs: Runs) -> None:
    """Slurm sends SIGTERM twice in a row, and leaves the run KillWait seconds: the second is not another request."""
    number = runs.submit("surprised", "--signal=B:CONT@1")
    runs.reach(5, "surprised", number)
    runs.cluster.command("scontrol", "update", f"JobId={number}", "TimeLimit=1")
    runs.crawl(lambda: "SIGTERM: stopping" in runs.cluster.log(number).read_text(), "surprised", number)
    runs.wait(lambda: runs.cluster.job(number).restarts == 1, number)
    runs.cluster.command("scontrol", "update", f"JobId={number}", "TimeLimit=30")
    job = runs.finish(number)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 1), job.output
    assert [attempt["exit_code"] for attempt in runs.record(number)] == [75, 0]
    runs.assert_undisturbed("surprised")


def test_a_request_to_save_and_wait_again(runs: Runs) -> None:
    number = runs.submit("paused")
    runs.reach(10, "paused", number)
    runs.cluster.command("scancel", "--signal=USR1", "--batch", str(number))
    job = runs.finish(number)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 1), job.output
    assert [attempt["exit_code"] for attempt in runs.record(number)] == [75, 0]
    runs.assert_undisturbed("paused")


def test_a_preemption_with_grace(runs: Runs) -> None:
    number = runs.submit("preempted")
    runs.reach(10, "preempted", number)
    urgent = runs.cluster.submit(
        *("--partition=urgent", "--nodes=4", "--time=5", "--wrap=sleep 1"), directory=runs.folder, environment={}
    )
    assert runs.finish(urgent).state == "COMPLETED"
    job = runs.finish(number)
    assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 1), job.output
    assert [attempt["exit_code"] for attempt in runs.record(number)] == [75, 0]
    runs.assert_undisturbed("preempted")


@pytest.mark.parametrize("options", [("--signal=TERM",), ()])
def test_a_cancelled_job_stays_stopped_and_the_same_command_continues_it(runs: Runs, options: tuple[str, ...]) -> None:
    root = f"cancelled-{len(options)}"
    number = runs.submit(root)
    runs.reach(10, root, number)
    runs.cluster.command("scancel", *options, str(number))
    job = runs.finish(number)
    if options:
        assert (job.state, job.exit_code) == ("FAILED", 75), job.output
    else:  # Slurm leaves it KillWait seconds
        assert job.state == "CANCELLED", job.output
    assert 10 <= runs.step(root) < STEPS
    time.sleep(3)
    assert (runs.cluster.job(number).state, job.restarts) == (job.state, 0)
    step = runs.step(root)
    again = runs.finish(runs.submit(root))
    assert (again.state, again.exit_code) == ("COMPLETED", 0), again.output
    assert f"(step {step})" in again.output
    runs.assert_undisturbed(root)


def test_two_jobs_at_a_time_on_the_same_machine(runs: Runs) -> None:
    numbers = [runs.submit(root) for root in ("left", "right")]
    runs.wait(lambda: bool(runs.step("left") and runs.step("right")), numbers[0])
    assert all(runs.cluster.job(number).state == "RUNNING" for number in numbers)
    for number in numbers:
        job = runs.finish(number)
        assert (job.state, job.exit_code, job.restarts) == ("COMPLETED", 0, 0), job.output
    runs.assert_undisturbed("left")
    runs.assert_undisturbed("right")


def test_a_node_whose_daemon_dies_while_its_ranks_train_on(runs: Runs) -> None:
    """Slurm gives the job away after SlurmdTimeout, and starts it again while the ranks of the first start may still
    hold the run folder: two writers must be impossible."""
    number = runs.submit("deserted")
    runs.reach(5, "deserted", number)
    listed = runs.cluster.command("squeue", "--noheader", "--job", str(number), "--format=%N").strip()
    node = runs.cluster.command("scontrol", "show", "hostnames", listed).split()[0]
    runs.cluster.kill_node(node)
    try:
        runs.crawl(lambda: runs.cluster.job(number).restarts == 1, "deserted", number)
        runs.cluster.command("scontrol", "update", f"JobId={number}", "StartTime=now")
        runs.wait(lambda: runs.cluster.job(number).state == "RUNNING", number)  # on other nodes
    finally:
        runs.cluster.start_node(node)
    job = runs.finish(number)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), job.output
    runs.assert_undisturbed("deserted")


def test_a_bad_node_is_left_out(runs: Runs) -> None:
    """The folder of the caches belongs to someone else on one of the nodes: here they share it, so all are bad."""
    number = runs.submit("broken", AURORA_LOCAL="/proc")
    job = runs.finish(number)
    assert (job.state, job.exit_code, job.restarts) == ("FAILED", 2, 0), job.output
    assert "all 2 nodes fail the check" in job.output
    assert re.search(r"/proc/aurora-\d+-\d+", job.output)
