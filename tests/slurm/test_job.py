"""The batch step of a job, with stand-ins for scontrol and srun: what is started, stopped, requeued and excluded."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.cli import slurm_job
from pretrain.cli.sweep import read_sweep
from pretrain.launch.time_budget import time_budget
from pretrain.run.folder import RunFolder
from pretrain.slurm import controller
from pretrain.slurm.attempts import Attempts
from pretrain.slurm.controller import SlurmError, job_status
from pretrain.slurm.supervisor import Job, JobError, Supervisor, Work
from pretrain.sweep import plan_jobs
from tests.processes.launching import write_config

STATUS = (
    "JobId=42 JobName=my JobState=x UserId=me(1) JobState={state} Reason={reason} Dependency=(null) Restarts=0 "
    "EndTime=2030-01-02T03:04:05 Deadline=N/A {preempt} ReqNodeList=(null) ExcNodeList={excluded} NodeList=gpu[07-09]\n"
)
# Notes what it is asked; `refusal` is what it says to anything but questions.
SCONTROL = """#!/bin/bash
echo "$*" >>asked
case "$*" in
"show hostnames "*) if [ -e no-names ]; then echo "Invalid hostlist" >&2; exit 1; fi; cat hostnames ;;
"--oneliner show job "*) cat status ;;
*) if [ -e refusal ]; then cat refusal >&2; exit 1; fi ;;
esac
"""
# Runs a check once for every node, and anything else once; returns the highest code, as the real one does.
SRUN = """#!/bin/bash
while [[ "$1" = --* ]]; do shift; done
if [[ "$*" != *pretrain.slurm.health* ]]; then exec "$@"; fi
id=0 code=0 tasks=()
for node in $(cat hostnames); do
    [ -e "silent-$node" ] || SLURM_NODEID=$id SLURMD_NODENAME=$node "$@" &
    tasks+=($!) id=$((id + 1))
done
[ ! -e signal-the-check ] || kill -s "$(cat signal-the-check)" "${tasks[@]}"
for task in "${tasks[@]}"; do
    wait "$task" || { ended=$?; [ "$ended" -le "$code" ] || code=$ended; }
done
exit "$code"
"""
SAVED = "runs/checkpoints"


class Cluster:
    """A folder with stand-ins, and a job in it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.said = folder, list[str]()
        for name, text in {"scontrol": SCONTROL, "srun": SRUN}.items():
            file = folder / "bin" / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
            file.chmod(0o755)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        self.set_status()
        (folder / "hostnames").write_text("gpu07\ngpu08\ngpu09\n")
        with socket.socket() as taken:  # a job whose port of the check is free
            taken.bind(("127.0.0.1", 0))
            number = taken.getsockname()[1] % 10000
        self.environment = {
            "SLURM_JOB_ID": str(number),
            "SLURM_JOB_NODELIST": "gpu[07-09]",
            "SLURM_JOB_NUM_NODES": "3",
            "AURORA_LOGS": str(folder / "logs"),
            "AURORA_COMPILE_CACHE": str(folder / "aurora-cache"),
            "AURORA_RENDEZVOUS_HOST": "127.0.0.1",
            "AURORA_CHECK_SECONDS": "0",
        }
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        self.step = 0

    def set_status(
        self, state: str = "RUNNING", reason: str = "None", preempt: str = "", excluded: str = "(null)"
    ) -> None:
        text = STATUS.format(state=state, reason=reason, preempt=preempt, excluded=excluded)
        (self.folder / "status").write_text(text)

    def run(self, work: str, restart: int = 0, **environment: str) -> int:
        """Run a start of the job, whose work is a line of bash."""
        self.said.clear()
        (self.folder / "asked").unlink(missing_ok=True)
        job = Job.from_environment(self.environment | {"SLURM_RESTART_COUNT": str(restart)} | environment)
        doing = Work("tiny", self.last_step, (self.folder / "near-limit").exists)
        return Supervisor(job, doing, self.said.append).run(["srun", "--n=3", "bash", "-c", work])

    def last_step(self) -> int:
        file = self.folder / "step"
        return int(file.read_text()) if file.exists() else 0

    @property
    def asked(self) -> list[str]:
        file = self.folder / "asked"
        return file.read_text().splitlines() if file.exists() else []

    @property
    def requeued(self) -> bool:
        return f"requeue {self.environment['SLURM_JOB_ID']}" in self.asked


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("code", "status", "requeued"),
    [
        (0, {}, False),
        (1, {}, True),
        (2, {}, False),
        (69, {}, True),
        (75, {}, False),  # --stop-at, a STOP file, scancel --signal=TERM
        (75, {"preempt": "PreemptTime=2030-01-01T00:00:00"}, True),
        (75, {"preempt": "PreemptTime=None"}, False),
        (75, {"state": "COMPLETING", "reason": "TimeLimit"}, True),
        (75, {"state": "COMPLETING"}, False),  # scancel
        (1, {"state": "COMPLETING"}, False),
        (143, {"state": "PENDING"}, False),  # scontrol requeue, preemption without grace: Slurm has done it
        (137, {}, True),
        (143, {}, False),  # scancel --signal=TERM, twice
        (130, {}, False),
        (143, {"preempt": "PreemptTime=2030-01-01T00:00:00"}, True),  # asked, and killed before it had saved
        (143, {"reason": "TimeLimit"}, True),
        (128 + signal.SIGSEGV, {}, True),
    ],
)
def test_a_job_is_requeued_unless_it_is_done_or_someone_ended_it(
    cluster: Cluster, code: int, status: dict[str, str], requeued: bool
) -> None:
    cluster.set_status(**status)
    assert cluster.run(f"exit {code}") == code
    assert cluster.requeued == requeued, cluster.said


def test_a_job_that_gets_further_is_requeued_as_often_as_needed_and_others_are_not(cluster: Cluster) -> None:
    restart = 0
    for step in range(1, 8):
        assert cluster.run(f"echo {step} >step; exit 1", restart, AURORA_REQUEUES="2") == 1
        assert cluster.requeued
        restart += 1
    for expected in (True, True, False):  # two restarts in vain are allowed
        assert cluster.run("exit 1", restart, AURORA_REQUEUES="2") == 1
        assert cluster.requeued == expected, cluster.said
        restart += 1
    assert "3 starts in a row have saved no newer checkpoint" in cluster.said[-1]
    # Someone mended it and requeued it by hand: the count begins again.
    assert cluster.run("exit 1", restart, AURORA_REQUEUES="2") == 1
    assert cluster.requeued
    outcomes = [attempt["outcome"] for attempt in json.loads((cluster.folder / "logs/attempts.json").read_text())]
    assert len(outcomes) == 11
    assert sum("not requeued" in outcome for outcome in outcomes) == 1


def test_a_run_that_stopped_before_the_limit_by_itself_is_continued(cluster: Cluster) -> None:
    (cluster.folder / "near-limit").touch()
    assert cluster.run("exit 75") == 75
    assert cluster.requeued


def test_tasks_of_an_array_are_requeued_one_by_one(cluster: Cluster) -> None:
    """The SLURM_JOB_ID of one of them is that of the array, all of which would be requeued."""
    cluster.run("exit 69", SLURM_ARRAY_JOB_ID="70", SLURM_ARRAY_TASK_ID="3")
    assert cluster.asked[-1] == "requeue 70_3"


def test_no_job_is_requeued_if_that_is_switched_off(cluster: Cluster) -> None:
    assert cluster.run("echo 5 >step; exit 69", AURORA_REQUEUES="0") == 69
    assert not cluster.requeued
    assert "AURORA_REQUEUES is 0" in cluster.said[-1]


def test_starts_that_ended_with_the_loss_of_a_node_count(cluster: Cluster) -> None:
    """Slurm repeats them by itself, without an end; it would do so for ever."""
    attempts = Attempts(cluster.folder / "logs/attempts.json")
    for restart in range(3):
        attempts.begin(restart, "gpu[07-09]", 0)
    assert cluster.run("touch worked", 3, AURORA_REQUEUES="2") == 1
    assert not (cluster.folder / "worked").exists()
    assert not cluster.requeued
    assert cluster.run("touch worked", 4, AURORA_REQUEUES="2") == 0
    assert (cluster.folder / "worked").exists()


def test_a_damaged_record_costs_the_count_only(cluster: Cluster) -> None:
    (cluster.folder / "logs").mkdir()
    for text in ("", "{", "[1, {}]", '{"a": 1}', '[{"step": "x"}]', "[" * 100_000):
        (cluster.folder / "logs/attempts.json").write_text(text)
        assert cluster.run("exit 0") == 0


@pytest.mark.parametrize("gets_further", [True, False])
def test_a_record_that_cannot_be_written_ends_no_job_that_gets_further(cluster: Cluster, gets_further: bool) -> None:
    """As with a full quota. Without it nobody counts, so a job that gets nowhere would be requeued for ever."""
    (cluster.folder / "logs").write_text("in the way")
    assert cluster.run(f"{'echo 3 >step; ' if gets_further else ''}exit 1") == 1
    assert cluster.requeued is gets_further
    if not gets_further:
        assert f"{cluster.folder}/logs/attempts.json cannot be written" in cluster.said[-1]


@pytest.fixture
def when_started() -> Iterator[list[int]]:
    """Signals to send to this process once the work has made the file `started`."""
    numbers: list[int] = []

    def send() -> None:
        deadline = time.monotonic() + 30
        while not Path("started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.05)

    thread = threading.Thread(target=send)
    thread.start()
    yield numbers
    thread.join()


WORK = "trap 'exit 75' USR1; trap 'exit 76' TERM INT HUP; touch started; for i in {1..300}; do sleep 0.1; done"


@pytest.mark.parametrize("notice", [signal.SIGUSR1, signal.SIGUSR2])
def test_the_notice_of_the_time_limit_is_passed_on_and_the_job_requeued(
    cluster: Cluster, when_started: list[int], notice: signal.Signals
) -> None:
    when_started.append(notice)
    before = signal.getsignal(notice)
    assert cluster.run(f"echo 3 >step; {WORK}") == 75
    assert cluster.requeued
    assert signal.getsignal(notice) is before


def test_a_repeated_notice_is_passed_on_once(cluster: Cluster, when_started: list[int]) -> None:
    """A second request would end the ranks without a checkpoint."""
    when_started += [signal.SIGUSR1, signal.SIGUSR1, signal.SIGUSR1]
    counts = "trap 'echo x >>notices' USR1; touch started; for i in {1..10}; do sleep 0.1; done; exit 75"
    assert cluster.run(counts) == 75
    assert (cluster.folder / "notices").read_text() == "x\n"


def test_signals_that_slurm_sends_to_all_processes_are_not_sent_twice(
    cluster: Cluster, when_started: list[int]
) -> None:
    """A second one would end the ranks without a checkpoint."""
    when_started += [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
    assert cluster.run("touch started; sleep 1; exit 75") == 75
    assert not cluster.requeued


def test_a_notice_before_the_work_starts_is_not_lost(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def last_step() -> int:
        os.kill(os.getpid(), signal.SIGUSR1)
        return 0

    monkeypatch.setattr(cluster, "last_step", last_step)
    assert cluster.run("touch worked") == 75
    assert not (cluster.folder / "worked").exists()
    assert cluster.requeued


@pytest.mark.parametrize("name", ["TERM", "HUP", "USR1", "USR2"])  # the shell that starts them has SIGINT ignored
def test_a_signal_to_the_check_of_the_nodes_ends_the_job(cluster: Cluster, name: str) -> None:
    """`scancel --signal` without --batch sends it to the tasks of the check, and the nodes report nothing."""
    (cluster.folder / "signal-the-check").write_text(name)
    assert cluster.run("touch worked", AURORA_CHECK_SECONDS="5") == 75
    assert not (cluster.folder / "worked").exists()
    assert not cluster.requeued
    assert not any("is bad" in line for line in cluster.said)


@pytest.mark.parametrize(("status", "requeued"), [({}, False), ({"preempt": "PreemptTime=2030-01-01T00:00:00"}, True)])
def test_a_signal_to_the_batch_step_before_the_work_keeps_it_from_starting(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, status: dict[str, str], requeued: bool
) -> None:
    cluster.set_status(**status)

    def last_step() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return 0

    monkeypatch.setattr(cluster, "last_step", last_step)
    assert cluster.run("touch worked") == 75
    assert not (cluster.folder / "worked").exists()
    assert cluster.requeued == requeued


def test_bad_nodes_are_named_and_excluded(cluster: Cluster) -> None:
    cluster.set_status(excluded="gpu03")
    (cluster.folder / "silent-gpu08").touch()
    assert cluster.run("touch worked", AURORA_CHECK_SECONDS="3") == 1
    assert not (cluster.folder / "worked").exists()
    assert "error: node gpu08 is bad: did not report within 3 s" in cluster.said
    number = cluster.environment["SLURM_JOB_ID"]
    assert cluster.asked[-2:] == [f"requeue {number}", f"update JobId={number} ExcNodeList=gpu03,gpu08"]


def test_good_nodes_start_the_work(cluster: Cluster) -> None:
    assert cluster.run("touch worked", AURORA_CHECK_SECONDS="20") == 0
    assert (cluster.folder / "worked").exists()
    assert any(re.fullmatch(r"checked 3 nodes in \d+ s: all good", line) for line in cluster.said)
    reports = [json.loads(path.read_text()) for path in sorted((cluster.folder / "logs/check-0").iterdir())]
    assert [report["node"] for report in reports] == ["gpu07", "gpu08", "gpu09"]
    assert [report["network_mbytes"] is not None for report in reports] == [False, True, True]
    assert not (cluster.folder / "aurora-cache").exists()  # deleted with the job's end


def test_a_name_that_nothing_resolves_ends_the_job_with_a_hint(cluster: Cluster) -> None:
    name = "no-such-host.invalid"
    assert cluster.run("touch worked", AURORA_CHECK_SECONDS="2", AURORA_RENDEZVOUS_HOST=name) == 2
    assert f"{name}, the first node, cannot be resolved" in cluster.said[1]
    assert "AURORA_RENDEZVOUS_HOST" in cluster.said[1]
    assert not cluster.requeued


@pytest.mark.parametrize(("fails", "check_seconds"), [("scontrol", "20"), ("srun", "20"), ("srun", "0")])
def test_a_command_of_slurm_that_fails_is_a_failure_of_the_job(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, fails: str, check_seconds: str
) -> None:
    """One line, the end of the start recorded, and a requeue: neither the work nor its input is to blame."""
    command, problem = "srun", "scontrol show hostnames gpu[07-09]: Invalid hostlist"
    if fails == "srun":
        command, problem = "no-srun", "no-srun cannot be started: No such file or directory"
        monkeypatch.setattr("pretrain.slurm.supervisor.SRUN", (command,))
    else:
        (cluster.folder / "no-names").touch()
    job = Job.from_environment(cluster.environment | {"AURORA_CHECK_SECONDS": check_seconds})
    assert Supervisor(job, Work("tiny", lambda: 0), cluster.said.append).run([command, "touch", "worked"]) == 1
    assert cluster.requeued
    assert not (cluster.folder / "worked").exists()
    assert [line for line in cluster.said if "error" in line] == [f"error: {problem}"]
    (attempt,) = json.loads((cluster.folder / "logs/attempts.json").read_text())
    assert (attempt["exit_code"], attempt["outcome"]) == (1, problem)


def test_the_caches_stay_while_the_job_goes_on(cluster: Cluster) -> None:
    (cluster.folder / "aurora-cache").mkdir()
    cluster.run("exit 1")
    assert cluster.requeued
    assert (cluster.folder / "aurora-cache").exists()
    cluster.run("exit 0", 1)
    assert not (cluster.folder / "aurora-cache").exists()


def test_no_folder_of_another_name_is_deleted(cluster: Cluster) -> None:
    (cluster.folder / "home").mkdir()
    cluster.run("exit 0", AURORA_COMPILE_CACHE=str(cluster.folder / "home"))
    assert (cluster.folder / "home").exists()


def test_squeue_shows_the_run_and_the_work_knows_when_the_job_ends(cluster: Cluster) -> None:
    cluster.run("echo $SLURM_JOB_END_TIME >end", SLURM_JOB_NAME="aurora")
    assert f"update JobId={cluster.environment['SLURM_JOB_ID']} JobName=tiny" in cluster.asked
    assert int((cluster.folder / "end").read_text()) == int(time.mktime((2030, 1, 2, 3, 4, 5, 0, 0, -1)))
    cluster.run("exit 0", SLURM_JOB_NAME="mine")
    assert not any("JobName" in line for line in cluster.asked)


def test_a_job_that_cannot_be_requeued_says_so(cluster: Cluster) -> None:
    (cluster.folder / "refusal").write_text("Requested operation is presently disabled\n")
    assert cluster.run("exit 69") == 69
    assert "could not be requeued" in cluster.said[-1]
    assert "presently disabled" in cluster.said[-1]


def test_a_controller_that_is_restarted_is_asked_again(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(controller, "RETRY_SECONDS", 0.01)
    fails = "n=$(cat n 2>/dev/null || echo 0); echo $((n + 1)) >n\n"
    fails += "[ $n -ge 2 ] || { echo 'Unable to contact slurm controller' >&2; exit 1; }\n"
    (cluster.folder / "bin/scontrol").write_text(SCONTROL.replace("#!/bin/bash\n", f"#!/bin/bash\n{fails}"))
    assert job_status("42").state == "RUNNING"
    assert (cluster.folder / "n").read_text() == "3\n"


def test_a_controller_that_stays_away_or_knows_no_job_is_an_error(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(controller, "RETRY_SECONDS", 0.01)
    (cluster.folder / "status").write_text("nothing\n")
    with pytest.raises(SlurmError, match="expected a job"):
        job_status("42")
    (cluster.folder / "bin/scontrol").write_text("#!/bin/bash\necho 'Unable to contact' >&2\nexit 1\n")
    with pytest.raises(SlurmError, match="Unable to contact"):
        job_status("42")
    # The work is done all the same, and its result counts.
    assert cluster.run("exit 0") == 0


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"AURORA_REQUEUES": "many"}, "AURORA_REQUEUES: expected a whole number"),
        ({"AURORA_CHECK_SECONDS": "-1"}, "AURORA_CHECK_SECONDS: expected a whole number"),
        ({"AURORA_CHECK_SECONDS": "a[$(touch hacked)]"}, "AURORA_CHECK_SECONDS: expected a whole number"),
        ({"SLURM_JOB_ID": ""}, "SLURM_JOB_ID not set"),
        ({"AURORA_LOGS": ""}, "AURORA_LOGS not set"),
    ],
)
def test_a_bad_environment_is_refused(cluster: Cluster, environment: dict[str, str], message: str) -> None:
    with pytest.raises(JobError, match=re.escape(message)):
        cluster.run("touch worked", **environment)
    assert not (cluster.folder / "worked").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "config.yaml"], "5 ranks"),
        (["train", "config.yaml", "optimizer.lr=-1"], "optimizer.lr"),
        (["train", "config.yaml", "--processes", "2"], "AURORA_PROCESSES_PER_NODE"),
        (["train", "none.yaml"], "none.yaml"),
        (["sweep", "none.yaml"], "none.yaml"),
        ([], "expected a command"),
    ],
)
def test_bad_input_is_refused_on_the_first_node_before_anything_starts(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    write_config(cluster.folder)
    work = ["srun", "bash", "-c", "touch worked", *(["-m", "pretrain"] if arguments else []), *arguments]
    assert slurm_job.main(["--ranks", "5", "--", *work]) == 2
    assert message in capsys.readouterr().err
    assert not (cluster.folder / "worked").exists()
    assert cluster.asked == []


SWEEP = """
name: pair
root: runs
base: config.yaml
axes: {seed: {0: {run.seed: 0}, 1: {run.seed: 1}}}
"""
# Records in the manifest of a run, as training does, that it stopped.
STOPS = """
import sys
from pathlib import Path
from pretrain.run.folder import RunFolder
run = RunFolder(Path(sys.argv[1]))
run.path.mkdir(parents=True, exist_ok=True)
run.mark_stopped(3, sys.argv[2])
sys.exit(75)
"""


@pytest.mark.parametrize("arguments", [["train", "config.yaml"], ["sweep", "run", "sweep.yaml"]])
def test_a_run_that_its_time_budget_stopped_is_requeued(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    """Not one that stopped for another reason: --stop-at, a STOP file, run.max_seconds."""
    write_config(cluster.folder)
    (cluster.folder / "sweep.yaml").write_text(SWEEP)
    one = plan_jobs(read_sweep(Path("sweep.yaml")))[1].config
    folder = str(one.run_folder) if one and "sweep" in arguments else "runs/tiny"
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 60))
    by_limit = time_budget(None, 0.0, 0, print).reason
    for reason, requeued in (("--stop-at", False), ("", False), (by_limit, True), (f"{by_limit} on rank 1", True)):
        work = ["srun", sys.executable, "-c", STOPS, folder, reason, "-m", "pretrain", *arguments]
        (cluster.folder / "asked").unlink(missing_ok=True)
        assert slurm_job.main(["--", *work]) == 75
        assert cluster.requeued == requeued, reason
    assert time_budget(10.0, 0.0, 0, print).reason != by_limit


def test_a_time_limit_of_an_earlier_attempt_requeues_nothing(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The record of the stop is there until the run trains again, which a stop before its first step prevents."""
    write_config(cluster.folder)
    run = RunFolder(cluster.folder / "runs/tiny")
    run.path.mkdir(parents=True)
    work = ["srun", "bash", "-c", "exit 75", "x", "-m", "pretrain", "train", "config.yaml"]
    stopped = {"step": 3, "reason": "the time limit of the Slurm job"}
    # The last one was written by a clock that was set back since.
    future = {**stopped, "time": "2036-01-01T00:00:00+00:00"}
    past = {**stopped, "time": "2026-01-01T00:00:00+00:00"}
    for record in (past, stopped, "the time limit of the Slurm job", future):
        run.write_manifest({"stopped": record})
        assert slurm_job.main(["--", *work]) == 75
        assert not cluster.requeued
