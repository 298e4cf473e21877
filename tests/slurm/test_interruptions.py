"""Jobs that are preempted, requeued or cancelled in their first seconds, and a shared folder that is full."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pretrain.cli import slurm_job, slurm_work
from pretrain.run.folder import RunError
from pretrain.slurm import health, supervisor
from pretrain.slurm.attempts import Attempts
from pretrain.slurm.verdict import Findings, examine
from tests.processes.launching import write_config
from tests.slurm.test_health import BROKEN, NODES, reports
from tests.slurm.test_job import SCONTROL, SRUN, Cluster

PREEMPTED = {"preempt": "PreemptTime=2030-01-01T00:00:00"}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    return Cluster(tmp_path, monkeypatch)


def fail_until_given_up(cluster: Cluster, restart: int) -> None:
    """Two restarts without progress are allowed, whatever was before."""
    cluster.set_status()
    for expected in (True, True, False):
        assert cluster.run("exit 1", restart, AURORA_REQUEUES="2") == 1
        assert cluster.requeued == expected, cluster.said
        restart += 1


@pytest.mark.parametrize(
    ("status", "code", "requeued"),
    [
        (PREEMPTED, 75, True),  # with a grace period: by us
        (PREEMPTED, 143, True),  # before the ranks could handle the signal
        ({"state": "PENDING"}, 143, False),  # scontrol requeue, or preemption without grace: Slurm has done it
    ],
)
def test_preemptions_before_the_first_checkpoint_do_not_use_up_the_restarts(
    cluster: Cluster, status: dict[str, str], code: int, requeued: bool
) -> None:
    for restart in range(3):
        cluster.set_status(**status)
        assert cluster.run(f"touch worked-{restart}; exit {code}", restart, AURORA_REQUEUES="2") == code
        assert (cluster.folder / f"worked-{restart}").exists()
        assert cluster.requeued == requeued, cluster.said
    fail_until_given_up(cluster, 3)


def test_a_preemption_after_failures_does_not_end_the_job(cluster: Cluster) -> None:
    """It is not one failure too many."""
    for restart in range(2):
        assert cluster.run("exit 1", restart, AURORA_REQUEUES="2") == 1
    cluster.set_status(**PREEMPTED)
    assert cluster.run("exit 75", 2, AURORA_REQUEUES="2") == 75
    assert cluster.requeued
    cluster.set_status()
    assert cluster.run("exit 1", 3, AURORA_REQUEUES="2") == 1
    assert not cluster.requeued


def test_failures_while_slurm_ends_the_job_count(cluster: Cluster) -> None:
    """As when a node is lost: the ranks fail, and Slurm requeues the job, for ever if nobody counts."""
    for restart in range(3):
        cluster.set_status(state="PENDING")
        assert cluster.run("exit 1", restart, AURORA_REQUEUES="2") == 1
    cluster.set_status()
    assert cluster.run("touch worked", 3, AURORA_REQUEUES="2") == 1
    assert not (cluster.folder / "worked").exists()


def test_starts_that_were_told_to_end_and_killed_before_they_had_do_not_count(cluster: Cluster) -> None:
    attempts = Attempts(cluster.folder / "logs/attempts.json")
    for restart in range(5):
        attempts.begin(restart, "gpu[07-09]", 0)
        attempts.note_told()
    assert cluster.run("touch worked; exit 1", 5, AURORA_REQUEUES="2") == 1
    assert (cluster.folder / "worked").exists()
    assert cluster.requeued


def test_that_a_start_is_told_to_end_is_recorded_immediately(cluster: Cluster) -> None:
    """Slurm leaves it KillWait seconds, in which the ranks may not have ended."""
    (cluster.folder / "pid").write_text(str(os.getpid()))
    seen = "kill -TERM $(cat pid); for i in {1..100}; do grep -q told logs/attempts.json && break; sleep 0.1; done"
    cluster.set_status(state="PENDING")
    assert cluster.run(f"{seen}; cp logs/attempts.json seen; exit 75") == 75
    (attempt,) = json.loads((cluster.folder / "seen").read_text())
    assert "told" in attempt
    assert "ended" not in attempt
    (attempt,) = json.loads((cluster.folder / "logs/attempts.json").read_text())
    assert attempt["outside"]


@pytest.mark.parametrize(("status", "requeued"), [({}, False), (PREEMPTED, True)])
def test_a_signal_between_the_check_and_the_work_keeps_it_from_starting(
    cluster: Cluster, status: dict[str, str], requeued: bool
) -> None:
    """Slurm is asked for the end of the job there, and may take minutes to answer."""
    cluster.set_status(**status)
    signals = "[ -e signalled ] || { touch signalled; kill -TERM $PPID; sleep 0.2; }"
    script = SCONTROL.replace('"--oneliner show job "*)', f'"--oneliner show job "*) {signals}\n')
    (cluster.folder / "bin/scontrol").write_text(script)
    assert cluster.run("touch worked") == 75
    assert (cluster.folder / "signalled").exists()
    assert not (cluster.folder / "worked").exists()
    assert cluster.requeued == requeued


# The step that hears what the steps of the job are sent says which process it is.
HEARD_BY = "[[ \"$*\" != *'sleep infinity'* ]] || echo $$ >listener\n"
SENT_TO_STEPS = "kill -TERM $(cat listener); sleep 0.2"


@pytest.mark.parametrize("after_the_check", [False, True])
def test_a_signal_to_the_steps_while_there_is_none_but_the_listener(cluster: Cluster, after_the_check: bool) -> None:
    """`scancel --signal=TERM` does not reach the batch script."""
    (cluster.folder / "bin/srun").write_text(SRUN.replace("#!/bin/bash\n", f"#!/bin/bash\n{HEARD_BY}"))
    asked = '"--oneliner show job "*)' if after_the_check else '"update JobId="*)'
    sends = f"{asked} [ -e sent ] || {{ touch sent; {SENT_TO_STEPS}; }};;&"
    script = SCONTROL.replace('case "$*" in', f'case "$*" in\n{sends}')
    (cluster.folder / "bin/scontrol").write_text(script)
    assert cluster.run("touch worked", AURORA_CHECK_SECONDS="5", SLURM_JOB_NAME="aurora") == 75
    assert (cluster.folder / "sent").exists()
    assert (cluster.folder / "logs/check-0").exists() == after_the_check
    assert not (cluster.folder / "worked").exists()
    assert not cluster.requeued


def test_a_signal_to_the_steps_before_those_of_the_work_exist_is_passed_on(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "LOOK_SECONDS", 0.05)
    (cluster.folder / "bin/srun").write_text(SRUN.replace("#!/bin/bash\n", f"#!/bin/bash\n{HEARD_BY}"))
    assert cluster.run(f"trap 'exit 75' USR1; {SENT_TO_STEPS}; for i in {{1..100}}; do sleep 0.1; done; exit 3") == 75
    assert not cluster.requeued


def test_the_listener_ends_with_the_job_and_its_absence_changes_nothing(cluster: Cluster) -> None:
    (cluster.folder / "bin/srun").write_text(SRUN.replace("#!/bin/bash\n", f"#!/bin/bash\n{HEARD_BY}"))
    assert cluster.run("exit 0") == 0
    assert not Path(f"/proc/{(cluster.folder / 'listener').read_text().strip()}").exists()
    refused = "[[ \"$*\" != *--overlap* ]] || { echo 'srun: unrecognized option --overlap' >&2; exit 1; }\n"
    (cluster.folder / "bin/srun").write_text(SRUN.replace("#!/bin/bash\n", f"#!/bin/bash\n{refused}"))
    assert cluster.run("sleep 0.2; exit 69") == 69
    assert cluster.requeued


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_while_the_work_is_started_is_passed_on(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Nobody knows whether the work has it."""
    start = subprocess.Popen

    def starts(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        process = start(command, **options)
        if "touch started" in command[-1]:
            while not Path("started").exists():
                time.sleep(0.02)
            os.kill(os.getpid(), number)
        return process

    monkeypatch.setattr(supervisor.subprocess, "Popen", starts)
    work = "trap 'exit 75' USR1; touch started; for i in {1..100}; do sleep 0.1; done; exit 3"
    assert cluster.run(work) == 75


@pytest.mark.parametrize(("status", "requeued"), [({}, False), (PREEMPTED, True)])
def test_a_signal_while_the_config_is_loaded_is_not_lost(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, status: dict[str, str], requeued: bool
) -> None:
    cluster.set_status(**status)
    write_config(cluster.folder)
    load = slurm_work.load_config

    def loads(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return load(*arguments)

    monkeypatch.setattr(slurm_work, "load_config", loads)
    work = ["srun", "bash", "-c", "touch worked", "x", "-m", "pretrain", "train", "config.yaml"]
    assert slurm_job.main(["--", *work]) == 75
    assert not (cluster.folder / "worked").exists()
    assert cluster.requeued == requeued


def test_a_full_shared_folder_is_not_a_matter_of_nodes(cluster: Cluster) -> None:
    (cluster.folder / "logs").write_text("in the way")
    assert cluster.run("touch worked", AURORA_CHECK_SECONDS="5") == 1
    assert not (cluster.folder / "worked").exists()
    errors = [line for line in cluster.said if line.startswith("error: ")]
    folder = cluster.folder / "logs/check-0"
    assert errors == [
        f"error: {folder}: the nodes cannot leave their reports there: Not a directory. No node is to blame"
    ]
    assert not cluster.requeued
    assert not any("ExcNodeList" in line for line in cluster.asked)


def test_a_folder_that_fills_up_during_the_check_is_not_a_matter_of_nodes(cluster: Cluster) -> None:
    """Some nodes have left their reports before; there is room again afterwards."""
    for code, blamed in ((health.CANNOT_REPORT, False), (1, True)):
        silent = f'if [[ "$*" = *pretrain.slurm.health* ]]; then exit {code}; fi'
        (cluster.folder / "bin/srun").write_text(SRUN.replace("#!/bin/bash\n", f"#!/bin/bash\n{silent}\n"))
        assert cluster.run("touch worked", AURORA_CHECK_SECONDS="5") == 1
        assert any("No node is to blame" in line for line in cluster.said) is not blamed
        assert not (cluster.folder / "worked").exists()
        assert cluster.requeued


def test_a_node_without_room_for_its_report_says_so_by_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "gpu07")
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    command = [*("--folder", str(tmp_path / "check"), "--gpus", "0", "--host", "127.0.0.1", "--port", "1")]
    command += ["--disk", str(tmp_path / "disk"), "--seconds", "5"]
    assert health.main(command) == 0
    for number, code in ((errno.ENOSPC, 73), (errno.EDQUOT, 73), (errno.EROFS, 1)):

        def fails(path: Path, text: str, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(health, "replace_text", fails)
        assert health.main(command) == code
        # One line for all nodes, or one that names the node on which the folder is read-only.
        line = f"error: node gpu07: {tmp_path / 'check'}: Read-only file system\n"
        assert capsys.readouterr().err == (line if code == 1 else "")
        assert os.strerror(number) in health.unwritable(tmp_path / "check")


def test_silence_is_not_held_against_nodes_that_cannot_report() -> None:
    found = reports({"n1": BROKEN})
    del found["n0"], found["n3"]
    assert examine(found, NODES, 60, "full") == Findings({"n1": [BROKEN[0][1]]}, "full")
    # All have reported: that the folder is full by now does not matter.
    assert examine(reports({}), NODES, 60, "full") == Findings()


@pytest.mark.parametrize(
    "error", [OSError(errno.ESTALE, "Stale file handle"), RunError("manifest.json: cannot be read")]
)
def test_checkpoints_that_cannot_be_read_for_a_moment_do_not_decide_about_the_job(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """A job that fails here is not requeued by anyone."""
    steps = iter((4, error, error, error))

    def last_step() -> int:
        if isinstance(step := next(steps), int):
            return step
        raise step

    monkeypatch.setattr(cluster, "last_step", last_step)
    assert cluster.run("exit 1") == 1
    assert cluster.requeued
    assert f"warning: {error}" in cluster.said
    assert cluster.said[-1].endswith("newest checkpoint: step 4")


def test_a_log_on_a_full_disk_ends_no_job(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(cluster.folder)
    work = ["srun", "bash", "-c", "touch worked; exit 69", "x", "-m", "pretrain", "train", "config.yaml"]
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert slurm_job.main(["--", *work]) == 69
    assert (cluster.folder / "worked").exists()
    assert cluster.requeued
