"""The process that scores checkpoints while the run trains (config section `evaluation`).

It is a process of its own, so that nothing that it does can change the training: not its random generators, its memory
or its errors.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TypeAlias

from pretrain.config.evaluation import EvaluationConfig
from pretrain.launch.setup import Setup
from pretrain.processes.environment import LAUNCHER, MPI
from pretrain.processes.parent import parent_of_what_starts
from pretrain.run.wandb_scores import MODES, score_mode

LOG_FILE = "follow.log"
"""What the process prints, in ``eval/`` of the run folder."""
NICENESS = 10
FinishScores: TypeAlias = Callable[[Callable[[], bool]], None]
"""Waits for the last scores, until its argument returns True."""
POLL_SECONDS, KILL_SECONDS = 0.5, 5.0
_OF_THIS_PROCESS = (*LAUNCHER, *MPI, "TORCHELASTIC_", "SLURM_", "AURORA_PARENT", "AURORA_LAUNCHED")
"""Beginnings of the variables by which the new process would take itself for a rank of the run."""


class Follower:
    """A process that runs ``aurora eval RUN --every-checkpoint --follow``.

    Args:
        run: the run folder, with its manifest.
        settings: the section `evaluation`.
        log_scores: whether scores are logged to the run's wandb run.
        say: prints a line.
        warn: prints a warning.

    Raises:
        OSError: the process could not be started.
    """

    def __init__(
        self,
        run: Path,
        settings: EvaluationConfig,
        log_scores: bool,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self.log_path = run / "eval" / LOG_FILE
        self._command, self._say, self._warn = command_of(run, settings, log_scores), say, warn
        self.log_path.parent.mkdir(exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_THIS_PROCESS)}
        with self.log_path.open("ab") as log, parent_of_what_starts():
            environment |= {name: os.environ[name] for name in ("AURORA_PARENT", "AURORA_LAUNCHED")}
            self._process = _start(self._command, environment, log)
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, self._process.pid, NICENESS)
        self._awaited, self._reported = threading.Event(), False
        self._watcher = threading.Thread(target=self._watch, name="evaluation", daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        """Report a failure when it happens, not only after a training of weeks."""
        while not self._awaited.wait(POLL_SECONDS):
            if self._process.poll() is not None:
                self._report(self._process.returncode)
                return

    def _stop_watching(self) -> None:
        self._awaited.set()
        self._watcher.join()

    def _report(self, code: int) -> None:
        if code != 0 and not self._reported:
            self._reported = True
            self._warn(
                f"the evaluation of checkpoints ended with exit code {code}: see {self.log_path}; to score those that "
                f"are left: {self._again()}"
            )

    def _again(self) -> str:
        return f"aurora {shlex.join(self._command[3:])}"

    def finish(self, stopped: Callable[[], bool]) -> None:
        """Wait until the last checkpoint of a finished run has been scored; end the process if `stopped`."""
        self._stop_watching()
        if self._process.poll() is None:
            self._say(f"waiting for the scores of the last checkpoints: see {self.log_path}")
        while not stopped():
            try:
                code = self._process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
            self._report(code)
            return
        self.end()
        self._warn(f"not all checkpoints are scored; to continue: {self._again()}")

    def end(self) -> None:
        """End the process, which leaves complete results only."""
        self._stop_watching()
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(KILL_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def command_of(run: Path, settings: EvaluationConfig, log_scores: bool) -> list[str]:
    """Return the command line of the process."""
    limit = [] if settings.limit is None else ["--limit", str(settings.limit), "--selection", "spread"]
    return [
        *(sys.executable, "-m", "pretrain", "eval", str(run), "--every-checkpoint", "--follow"),
        *("--every-steps", str(settings.every_steps), "--tasks", ",".join(settings.tasks), *limit),
        *("--device", settings.device, *(["--log", "wandb"] if log_scores else [])),
    ]


def _start(command: list[str], environment: dict[str, str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    # In a session of its own: a Ctrl-C at the terminal stops the training, which then ends this process.
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
    )


@contextlib.contextmanager
def following(setup: Setup) -> Iterator[FinishScores]:
    """Score checkpoints alongside training if the config says so; yield a function that waits for the last scores.

    The run folder must have its manifest. However the block ends, the process is ended.
    """
    config, display = setup.config, setup.display
    if config.evaluation.every_steps is None or setup.engine.rank != 0:
        yield lambda stopped: None
        return
    try:
        logs = config.wandb.mode != "disabled" and score_mode(config.wandb.mode) in MODES
        follower = Follower(setup.folder.path, config.evaluation, logs, display.say, display.warn)
    except OSError as error:
        display.warn(f"checkpoints are not scored: the process could not be started: {error}")
        yield lambda stopped: None
        return
    display.say(f"evaluation of checkpoints: {follower.log_path}")
    try:
        yield follower.finish
    finally:
        follower.end()
