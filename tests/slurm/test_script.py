"""The batch scripts without Slurm: what they refuse, and what reaches each node."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pretrain.processes.torchrun import free_port
from tests.processes.launching import write_config

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "slurm/pretrain.sbatch"
HOSTILE = "run.root=a b; $(touch hacked) `touch hacked` 'x' \"y\" * \\ $HOME"
# What the shell, or torch in this process, may have set.
FOREIGN = ("SLURM_", "AURORA_", "OMP_", "TORCHINDUCTOR_", "TRITON_", "CUDA_")

# Takes off srun's own options and becomes the second of the job's nodes.
SRUN = """#!/bin/bash
printf '%s\\n' "$@" >srun-arguments
while [[ "$1" = --* ]]; do shift; done
SLURMD_NODENAME=gpu07 SLURM_NODEID=${NODE:-1} exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$*" = "show hostnames gpu07" ]; then echo gpu07; exit; fi
[ "$*" = "show hostnames gpu[07-09]" ] || exit 1
printf '%s\\n' gpu07 gpu08 gpu09
"""
# In place of the environment's interpreter: as the batch step it starts what it is given (tests/slurm/test_job.py has
# the real one); on a node it notes its arguments and ends with the code it is told.
PYTHON = """#!/bin/bash
if [ "$2" = pretrain.cli.slurm_job ]; then
    echo "$3 $4" >ranks
    env >batch-environment
    while [ "$1" != -- ]; do shift; done
    shift
    exec "$@"
fi
printf '%s\\0' "$@" >arguments
env >environment
exit "${CODE:-0}"
"""


class Nodes:
    """A folder to submit from, with stand-ins for srun, scontrol and the interpreter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in {"bin/srun": SRUN, "bin/scontrol": SCONTROL, ".venv/bin/python": PYTHON}.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
            file.chmod(0o755)
        (folder / "my config.yaml").write_text("$(touch hacked)\n")

    def run(self, *arguments: str, script: Path = SCRIPT, **environment: str) -> subprocess.CompletedProcess[str]:
        ours = {name: value for name, value in os.environ.items() if not name.startswith(FOREIGN)}
        job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "gpu[07-09]"}
        path = {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(self.folder)}
        path["AURORA_LOCAL"] = str(self.folder / "local")
        return subprocess.run(
            ["bash", str(script), *arguments],
            cwd=self.folder,
            env=ours | job | path | environment,
            capture_output=True,
            text=True,
            timeout=240,
        )

    def arguments(self) -> list[str]:
        """What the interpreter on the node was given."""
        return (self.folder / "arguments").read_text().split("\0")[:-1]

    def option(self, name: str) -> str:
        """The value of one of torchrun's options."""
        given = self.arguments()
        return given[given.index(name) + 1]

    def environment(self, of: str = "environment") -> dict[str, str]:
        lines = (self.folder / of).read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    return Nodes(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        ((), {}, "no config given"),
        (("missing.yaml",), {}, "missing.yaml: no such file"),
        (("my config.yaml",), {"SLURM_JOB_ID": ""}, "not in a Slurm job"),
        (("my config.yaml",), {"AURORA_VENV": "/nowhere"}, "/nowhere: no virtual environment"),
        (("my config.yaml",), {"AURORA_PROCESSES_PER_NODE": "a[$(touch hacked)]"}, "AURORA_PROCESSES_PER_NODE"),
        (("my config.yaml",), {"AURORA_PROCESSES_PER_NODE": "0"}, "AURORA_PROCESSES_PER_NODE"),
    ],
)
def test_bad_input_is_refused_with_one_message_and_starts_nothing(
    nodes: Nodes, arguments: tuple[str, ...], environment: dict[str, str], message: str
) -> None:
    done = nodes.run(*arguments, **environment)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (nodes.folder / "srun-arguments").exists()
    assert not (nodes.folder / "hacked").exists()


def test_arguments_arrive_as_they_were_given_and_nothing_is_evaluated(nodes: Nodes) -> None:
    done = nodes.run("my config.yaml", "--stop-at", "30", HOSTILE, "")
    assert done.returncode == 0, done.stderr
    given = nodes.arguments()
    assert given[:2] == ["-m", "pretrain.processes"]
    assert given[given.index("--tee") :] == [
        *("--tee", "3", "-m", "pretrain", "train", "my config.yaml", "--stop-at", "30", HOSTILE, "")
    ]
    assert not (nodes.folder / "hacked").exists()


@pytest.mark.parametrize("script", ["pretrain", "eval", "sweep"])
def test_the_cache_of_evaluations_is_not_that_of_what_is_compiled(nodes: Nodes, script: str) -> None:
    """The folder of what is compiled is deleted with the job; $AURORA_CACHE holds items and scores of evaluations."""
    file, kept = REPOSITORY / f"slurm/{script}.sbatch", f"{nodes.folder}/my shared; folder"
    done = nodes.run("my config.yaml", script=file, AURORA_CACHE=kept, SLURM_JOB_NUM_NODES="1")
    assert done.returncode == 0, done.stderr
    own = f"{nodes.folder}/local/aurora-{os.getuid()}-123456"
    for found in (nodes.environment("batch-environment"), nodes.environment()):
        assert found["AURORA_CACHE"] == kept
        assert found["AURORA_COMPILE_CACHE"] == own  # which is deleted at the end
        assert found["TRITON_CACHE_DIR"] == f"{own}/triton"


def test_nodes_meet_at_the_first_one_on_a_port_of_the_job(nodes: Nodes) -> None:
    ports = set()
    for job in ("1", "123456", "123457", "67043327"):
        assert nodes.run("my config.yaml", SLURM_JOB_ID=job).returncode == 0
        host, port = nodes.option("--rdzv-endpoint").split(":")
        assert host == "gpu07"
        assert 1024 <= int(port) < 32768  # neither root's nor one of outgoing connections
        ports.add(port)
        assert nodes.option("--rdzv-id") == job
        assert nodes.option("--nnodes") == "3"
        assert nodes.option("--log-dir") == f"{nodes.folder}/logs/slurm/{job}/node-1"
    assert len(ports) == 4
    for node in (0, 1):
        nodes.run("my config.yaml", NODE=str(node), AURORA_RENDEZVOUS_HOST="10.0.0.1")
        assert nodes.option("--rdzv-endpoint").startswith("10.0.0.1:")
        settings = dict(pair.split("=") for pair in nodes.option("--rdzv-conf").split(","))
        assert settings["is_host"] == str(1 - node)
        # A silence, or a difference of clocks, of less than ten minutes does not make torchrun give up a node.
        assert int(settings["keep_alive_max_attempt"]) * 5 >= 600


@pytest.mark.parametrize(
    ("environment", "processes", "threads"),
    [
        ({}, "1", "1"),
        ({"SLURM_CPUS_ON_NODE": "96"}, "1", "96"),
        ({"SLURM_CPUS_ON_NODE": "96", "SLURM_GPUS_ON_NODE": "8"}, "8", "12"),
        ({"SLURM_CPUS_ON_NODE": "4", "SLURM_GPUS_ON_NODE": "8"}, "8", "1"),
        ({"SLURM_CPUS_ON_NODE": "96", "SLURM_GPUS_ON_NODE": "8", "OMP_NUM_THREADS": "3"}, "8", "3"),
        ({"SLURM_GPUS_ON_NODE": "8", "AURORA_PROCESSES_PER_NODE": "2"}, "2", "1"),
    ],
)
def test_a_process_for_each_gpu_and_threads_that_share_the_cores(
    nodes: Nodes, environment: dict[str, str], processes: str, threads: str
) -> None:
    nodes.run("my config.yaml", **environment)
    assert nodes.option("--nproc-per-node") == processes
    assert nodes.environment()["OMP_NUM_THREADS"] == threads
    assert nodes.environment()["NCCL_DEBUG"] == "WARN"


def test_what_is_compiled_goes_to_a_folder_of_the_job_on_the_local_disk(nodes: Nodes) -> None:
    assert nodes.run("my config.yaml", CUDA_CACHE_PATH="/elsewhere").returncode == 0
    cache = nodes.folder / f"local/aurora-{os.getuid()}-123456"
    assert cache.stat().st_mode & 0o777 == 0o700
    seen = nodes.environment()
    assert seen["TRITON_CACHE_DIR"] == f"{cache}/triton"
    assert seen["TORCHINDUCTOR_CACHE_DIR"] == f"{cache}/inductor"
    assert seen["CUDA_CACHE_PATH"] == "/elsewhere"


def test_a_cache_of_another_user_is_not_used(nodes: Nodes) -> None:
    """Its files would be run as code."""
    cache = nodes.folder / f"local/aurora-{os.getuid()}-123456"
    cache.mkdir(parents=True)
    if os.getuid() != 0:
        pytest.skip("not run: giving a folder away needs root")
    os.chown(cache, 65534, 65534)
    assert nodes.run("my config.yaml").returncode == 1
    assert not (nodes.folder / "arguments").exists()


def test_the_batch_step_knows_the_job(nodes: Nodes) -> None:
    nodes.run("my config.yaml", SLURM_GPUS_ON_NODE="8")
    assert (nodes.folder / "ranks").read_text() == "--ranks 24\n"
    seen = nodes.environment("batch-environment")
    assert seen["AURORA_RENDEZVOUS_HOST"] == "gpu07"
    assert seen["AURORA_LOGS"] == f"{nodes.folder}/logs/slurm/123456"


@pytest.mark.parametrize("code", [1, 2, 69, 75])
def test_the_exit_code_is_the_one_of_the_nodes(nodes: Nodes, code: int) -> None:
    assert nodes.run("my config.yaml", CODE=str(code)).returncode == code


@pytest.mark.parametrize(
    ("script", "arguments", "environment", "message"),
    [
        ("eval", (), {}, "no model given"),
        ("eval", ("MODEL",), {"SLURM_JOB_ID": ""}, "not in a Slurm job"),
        ("eval", ("MODEL",), {"AURORA_VENV": "/nowhere"}, "/nowhere: no virtual environment"),
        ("sweep", (), {}, "no sweep given"),
        ("sweep", ("missing.yaml",), {}, "missing.yaml: no such file"),
        ("sweep", ("my config.yaml",), {"SLURM_JOB_ID": ""}, "not in a Slurm job"),
        ("sweep", ("my config.yaml",), {"AURORA_VENV": "/nowhere"}, "/nowhere: no virtual environment"),
        ("sweep", ("my config.yaml",), {"SLURM_JOB_NUM_NODES": "2"}, "--array"),
    ],
)
def test_the_other_scripts_refuse_bad_input(
    nodes: Nodes, script: str, arguments: tuple[str, ...], environment: dict[str, str], message: str
) -> None:
    one = {"SLURM_JOB_NUM_NODES": "1"} | environment
    done = nodes.run(*arguments, script=REPOSITORY / f"slurm/{script}.sbatch", **one)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (nodes.folder / "srun-arguments").exists()


@pytest.mark.parametrize(
    ("script", "environment", "verb", "more"),
    [
        ("eval", {}, ["eval"], []),
        ("sweep", {}, ["sweep", "run"], []),
        ("sweep", {"SLURM_ARRAY_TASK_ID": "7"}, ["sweep", "run"], ["--index", "7"]),
    ],
)
def test_the_other_scripts_start_their_verb_once(
    nodes: Nodes, script: str, environment: dict[str, str], verb: list[str], more: list[str]
) -> None:
    one = {"SLURM_JOB_NUM_NODES": "1"} | environment
    done = nodes.run("my config.yaml", HOSTILE, script=REPOSITORY / f"slurm/{script}.sbatch", CODE="3", **one)
    assert done.returncode == 3, done.stderr
    assert nodes.arguments() == ["-m", "pretrain", *verb, "my config.yaml", HOSTILE, *more]
    assert nodes.environment()["TRITON_CACHE_DIR"] == f"{nodes.folder}/local/aurora-{os.getuid()}-123456/triton"
    assert not (nodes.folder / "hacked").exists()


def test_an_evaluation_keeps_items_and_scores_over_jobs_and_its_compile_caches_on_the_node(nodes: Nodes) -> None:
    script, shared = REPOSITORY / "slurm/eval.sbatch", str(nodes.folder / "my shared; folder")
    arguments = ("my run", "--every-checkpoint", "--follow")
    assert nodes.run(*arguments, script=script, SLURM_JOB_NUM_NODES="1", AURORA_CACHE=shared).returncode == 0
    own = f"{nodes.folder}/local/aurora-{os.getuid()}-123456"
    assert nodes.environment("batch-environment")["AURORA_COMPILE_CACHE"] == own  # which is deleted at the end
    assert nodes.environment()["AURORA_CACHE"] == shared
    assert nodes.environment()["TRITON_CACHE_DIR"] == f"{own}/triton"
    assert nodes.arguments() == ["-m", "pretrain", "eval", *arguments]


@pytest.mark.parametrize("script", ["pretrain", "eval", "sweep"])
def test_a_requeued_job_keeps_its_log_and_may_be_requeued(script: str) -> None:
    lines = (REPOSITORY / f"slurm/{script}.sbatch").read_text().splitlines()
    assert {"#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --job-name=aurora"} <= set(lines)
    # An evaluation has nothing to save.
    assert ("#SBATCH --signal=B:USR1@300" in lines) == (script != "eval")


@pytest.mark.parametrize("script", ["pretrain", "eval", "sweep"])
def test_a_preemption_before_the_batch_step_listens_does_not_end_the_script(script: str) -> None:
    """Slurm does not requeue a job whose script has ended."""
    lines = (REPOSITORY / f"slurm/{script}.sbatch").read_text().splitlines()
    assert lines.index("trap '' USR1 USR2 TERM") < lines.index("refuse() {")


def test_signals_to_the_script_leave_it_to_the_batch_step_to_stop(nodes: Nodes) -> None:
    scontrol = nodes.folder / "bin/scontrol"
    scontrol.write_text(
        SCONTROL.replace("#!/bin/bash\n", "#!/bin/bash\nkill -TERM $PPID\nkill -USR1 $PPID\nkill -USR2 $PPID\n")
    )
    assert nodes.run("my config.yaml").returncode == 0


def test_a_failing_scontrol_starts_nothing(nodes: Nodes) -> None:
    assert nodes.run("my config.yaml", SLURM_JOB_NODELIST="other").returncode == 1
    assert not (nodes.folder / "srun-arguments").exists()


def test_a_node_that_does_not_reach_the_first_one_says_so_without_a_traceback() -> None:
    place = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    options = ["--nnodes", "2", *place, "--rdzv-conf", "is_host=0,read_timeout=1"]
    command = [sys.executable, "-m", "pretrain.processes", *options, "-m", "pretrain", "train", "config.yaml"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "error: lost or never reached the other nodes" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
def test_one_node_with_one_process_trains(engine: str, nodes: Nodes) -> None:
    """The script with a stand-in for srun, and everything after it real."""
    config = write_config(nodes.folder, {"engine.kind": engine})
    done = nodes.run(
        *("config.yaml", "--stop-at", "2"),
        **{"NODE": "0", "SLURM_JOB_NUM_NODES": "1", "AURORA_VENV": sys.prefix, "PYTHONPATH": str(REPOSITORY)},
        **{"SLURM_JOB_NODELIST": "gpu07"},
        **{"AURORA_RENDEZVOUS_HOST": "127.0.0.1", "PET_LOCAL_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"},
        # As srun sets them for its one task.
        **{"PMI_SIZE": "1", "PMI_RANK": "0", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    )
    assert config.name == "config.yaml"
    assert done.returncode == 75, done.stderr
    assert ", 1 ranks," in done.stdout
    assert "[rank 0]: stopped after step 2" in done.stdout
    assert "Traceback" not in done.stderr


def test_shellcheck_has_nothing_to_say() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("not run: shellcheck missing (apt-get install shellcheck)")
    scripts = [*sorted(REPOSITORY.glob("slurm/*.sbatch")), *sorted(REPOSITORY.glob("scripts/*.sh"))]
    for file in sorted(REPOSITORY.glob("scripts/*")):
        if file.is_file() and file.read_bytes().startswith(b"#!/usr/bin/env bash\n"):
            scripts.append(file)
    assert {"pretrain.sbatch", "eval.sbatch", "sweep.sbatch", "setup.sh", "test", "quickstart"} <= {
        script.name for script in scripts
    }
    # setup.sh is sourced and names no shell.
    command = ["shellcheck", "--shell=bash", "--external-sources", "--source-path=SCRIPTDIR", *map(str, scripts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
