"""The command with which a config is submitted, and the submission."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pretrain.processes.errors import UserError

SUBMIT_SECONDS = 120.0


class SubmissionError(UserError):
    """The job could not be submitted; the message says why."""


@dataclass(frozen=True)
class Submission:
    """What is submitted.

    Attributes:
        script: the batch script.
        arguments: of `aurora train`.
        name: what squeue shows.
        nodes: number of nodes.
        gpus_per_node: GPUs on each; 0: one process per node, without GPUs.
        time: the time limit as sbatch takes it; None: that of the partition.
        options: further options of sbatch.
        environment: variables that the script needs, besides those that are set already.
    """

    script: Path
    arguments: Sequence[str]
    name: str
    nodes: int
    gpus_per_node: int
    time: str | None = None
    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        """Processes on all nodes together."""
        return self.nodes * max(1, self.gpus_per_node)

    def command(self) -> list[str]:
        """The words of the command."""
        return [
            "sbatch",
            "--parsable",
            f"--job-name={self.name}",
            f"--nodes={self.nodes}",
            f"--gpus-per-node={self.gpus_per_node}",
            *([f"--time={self.time}"] if self.time else []),
            *self.options,
            str(self.script),
            *self.arguments,
        ]

    def submit(self, environment: Mapping[str, str]) -> str:
        """Submit the job from the working directory; return its number.

        Args:
            environment: of this process.

        Raises:
            SubmissionError: Slurm has refused it, or there is no Slurm here.
        """
        try:
            done = subprocess.run(
                self.command(),
                env={**environment, **self.environment},
                capture_output=True,
                text=True,
                timeout=SUBMIT_SECONDS,
                check=False,
            )
        except FileNotFoundError:
            raise SubmissionError(
                "sbatch: not found; run this on a machine from which jobs are submitted, or add --dry-run"
            ) from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SubmissionError(f"sbatch: {error}") from None
        # The number, and after a semicolon the cluster's name if there are several.
        number = re.fullmatch(r"(\d+)(;\S+)?", done.stdout.strip())
        if done.returncode or number is None:
            said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
            raise SubmissionError("\n".join(said) or f"sbatch: ended with code {done.returncode}")
        return number[1]
