"""A Slurm cluster whose nodes are all this machine, on loopback, everything of it in one folder."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pretrain.processes.torchrun import free_port

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")
WAIT_SECONDS = 60
ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}

# NoInAddrAny: without it the daemons listen on every address, whatever address a node has.
CONFIG = """
ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
MpiDefault=none
ReturnToService=2
JobRequeue=1
SlurmdTimeout=15
KillWait=30
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL State=UP PriorityTier=9 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory={memory}\n"


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"not run: {', '.join(absent)} missing (apt-get install slurm-wlm munge)"
    return "not run: Slurm's daemons need root" if os.geteuid() != 0 else None


@dataclass(frozen=True)
class Job:
    """A job: its number, state, exit code, what it wrote, and how often it was requeued."""

    number: int
    state: str
    exit_code: int
    output: str
    restarts: int


class Cluster:
    """munged, slurmctld and a slurmd for each node, between `start` and `stop`.

    Args:
        folder: of configuration, state, sockets and logs.
        nodes: how many there are.
        memory: of each node, in MB.
    """

    def __init__(self, folder: Path, nodes: int = 2, memory: int = 2000) -> None:
        self.folder = folder
        self.nodes = [f"n{index}" for index in range(nodes)]
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        # Slurm looks for itself under the name without the domain.
        host, file = socket.gethostname().partition(".")[0], folder / "slurm.conf"
        text = CONFIG.format(host=host, folder=folder, port=free_port())
        text += "".join(NODE.format(name=n, host=host, port=free_port(), memory=memory) for n in self.nodes)
        for name in ("state", "munge", *(f"spool-{node}" for node in self.nodes)):
            (folder / name).mkdir(parents=True)
        file.write_text(text)
        key = folder / "munge/key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        self._environment = os.environ | {"SLURM_CONF": str(file)}

    def start(self) -> None:
        """Start the daemons; returns when all nodes take jobs."""
        munge = self.folder / "munge"
        files = {"socket": "socket", "key-file": "key", "log-file": "log", "pid-file": "pid", "seed-file": "seed"}
        places = [f"--{option}={munge / file}" for option, file in files.items()]
        # Forced, since it wants a socket that every user reaches, and this folder is root's alone.
        self._start("munged", "munged", "--foreground", "--force", *places)
        self.wait((munge / "socket").exists, "munged opens its socket")
        # The configuration is named with its absolute path: slurmctld changes its directory.
        self._start("slurmctld", "slurmctld", "-D", "-f", self._environment["SLURM_CONF"])
        for node in self.nodes:
            self.start_node(node)
        self.wait(self.idle, "all nodes are idle")

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._start(node, "slurmd", "-D", "-f", self._environment["SLURM_CONF"], "-N", node)

    def kill_node(self, node: str) -> None:
        """Kill the daemon of a node; what it has started keeps running."""
        daemon = self._daemons.pop(node)
        daemon.kill()
        daemon.wait()

    def _start(self, name: str, *command: str) -> None:
        # A daemon starts jobs: they must not inherit the terminal, nor the signals of one.
        with open(self.folder / f"daemon-{name}.log", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )

    def wait(self, condition: Callable[[], bool], what: str, seconds: float = WAIT_SECONDS) -> None:
        """Wait until a condition holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            logs = sorted(self.folder.glob("daemon-*.log"))
            said = "\n".join(f"{log.name}:\n{log.read_text()[-2000:]}" for log in logs)
            assert all(daemon.poll() is None for daemon in self._daemons.values()), f"a daemon ended\n{said}"
            assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{said}"
            time.sleep(0.2)

    def idle(self) -> bool:
        """Whether all nodes take jobs."""
        shown = self.command("scontrol", "--oneliner", "show", "nodes", check=False)
        return len(re.findall(r"\bState=IDLE\s", shown)) == len(self.nodes)

    def stop(self) -> None:
        """Cancel what still runs, then end the daemons, the last started first."""
        try:
            if len(self._daemons) == 2 + len(self.nodes):
                self.command("scancel", "--user=root", check=False)
                self.wait(lambda: not self.command("squeue", "--noheader"), "no job is left")
        finally:
            for daemon in reversed(self._daemons.values()):
                daemon.terminate()
                try:
                    daemon.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            self._daemons.clear()

    def command(
        self,
        *command: str,
        check: bool = True,
        directory: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> str:
        """Output of one of Slurm's commands."""
        full = self._environment | dict(environment or {})
        done = subprocess.run(command, capture_output=True, text=True, cwd=directory, env=full, timeout=60)
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, *arguments: str, directory: Path, environment: Mapping[str, str]) -> int:
        """Submit ``sbatch ARGUMENTS`` from `directory`; return the job's number."""
        command = ("sbatch", "--parsable", f"--output={self.log(None)}", *arguments)
        return int(self.command(*command, directory=directory, environment=environment))

    def log(self, number: int | None) -> Path:
        """What a job writes."""
        return self.folder / f"job-{'%j' if number is None else number}.log"

    def job(self, number: int) -> Job:
        """A job as it is now."""
        shown = self.command("scontrol", "--oneliner", "show", "job", str(number))
        found = re.search(r" JobState=(\w+) .* Restarts=(\d+) .* ExitCode=(\d+):(\d+)", shown)
        assert found, shown
        log = self.log(number)
        return Job(number, found[1], int(found[3]), log.read_text() if log.exists() else "", int(found[2]))

    def finish(self, number: int, timeout_seconds: float) -> Job:
        """Wait until a job has ended; one that was requeued does not wait for its time."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            job = self.job(number)
            if job.state in ENDED:
                return job
            if job.state == "PENDING":
                self.command("scontrol", "update", f"JobId={number}", "StartTime=now", check=False)
            assert time.monotonic() < deadline, f"job {number} is {job.state} after {timeout_seconds} s\n{job.output}"
            time.sleep(0.5)

    def run(self, *arguments: str, directory: Path, environment: Mapping[str, str], timeout_seconds: float) -> Job:
        """Submit ``sbatch ARGUMENTS`` from `directory` and wait until the job has ended."""
        return self.finish(self.submit(*arguments, directory=directory, environment=environment), timeout_seconds)
