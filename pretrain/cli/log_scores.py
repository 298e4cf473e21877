"""``aurora eval --log wandb``: results in the Weights & Biases run of the training run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from eval.errors import EvalError
from eval.schema import EvalResult
from pretrain.config import parse_stored_config
from pretrain.processes.errors import UserError
from pretrain.processes.redaction import redact
from pretrain.run.reader import Run, read_run
from pretrain.run.wandb import WandbTracker
from pretrain.run.wandb_scores import MODES, ScoreQueue, score_mode


class ScoreLog:
    """Sends results to the wandb run of a training run, or leaves them to the process that trains it.

    Args:
        run: the run folder.
        say: prints a line.

    Raises:
        EvalError: the run has no wandb run.
    """

    def __init__(self, run: Path, say: Callable[[str], None] = print) -> None:
        self.run, self._say = run, say
        self.mode = _mode_of(read_run(run))
        self.queue = ScoreQueue(run / "wandb")

    def add(self, result: EvalResult) -> None:
        """Queue a result, and send what is queued if no process trains the run.

        Raises:
            EvalError: the result does not say which checkpoint it is of.
            OSError: the queue cannot be written.
        """
        provenance = result["model"].get("provenance")
        if provenance is None:
            raise EvalError("--log wandb: the result is not of a checkpoint of a run")
        self.queue.add(provenance["step"], {"eval/tokens": provenance["tokens"], **values_of(result)})
        self.send()

    def send(self) -> None:
        """Send what is queued, unless the process that trains the run does.

        If wandb cannot be used, a line says so, and what was not sent stays queued.

        Raises:
            UserError: the run's config cannot be read.
        """
        found = read_run(self.run)
        if found.state != "done" and found.folder.is_locked() and found.section("wandb").get("mode") in MODES:
            self._say("wandb: the process that trains the run sends the result")
            return
        opened: list[WandbTracker] = []

        def log(scores: dict[str, float]) -> None:
            if not opened:  # only if there is anything to send
                config, run_id = parse_stored_config(found.config), str(found.manifest["id"])
                opened.append(WandbTracker(config, self.run, run_id, self._say, self.mode))
            opened[0].log_scores(scores)

        try:
            try:
                self.queue.send(log)
            finally:
                for tracker in opened:
                    tracker.close()
        except UserError:
            raise
        except Exception as error:  # of whatever wandb is made of
            first = redact((str(error).splitlines() or [""])[0])
            self._say(
                f"warning: wandb: {type(error).__name__}: {first}; what was not sent stays queued, and the next "
                "evaluation or launch of the run sends it"
            )


_COUNTS = {"num_items", "num_items_in_split", "num_truncated_requests", "num_fewshot", "version"}


def values_of(result: EvalResult) -> dict[str, float]:
    """Return the figures of a result and their standard errors by name.

    They are called ``eval/hellaswag/acc_norm`` for a task, ``eval/mmlu/acc`` for a group of tasks, and
    ``eval/bits_per_byte/NAME`` for a text.
    """
    found: Mapping[str, Any] = result
    values = {
        f"eval/{task}/{name}": float(value)
        for part in ("tasks", "groups")
        for task, figures in found.get(part, {}).items()
        for name, value in figures.items()
        if name not in _COUNTS and isinstance(value, int | float) and not isinstance(value, bool)
    }
    texts = found.get("bits_per_byte", {})
    return values | {f"eval/bits_per_byte/{name}": float(text["bits_per_byte"]) for name, text in texts.items()}


def _mode_of(run: Run) -> str:
    """How the run's results are sent: by WANDB_MODE, or else as its config says."""
    if not run.manifest.get("id") or not run.config:
        raise EvalError(f"{run.path}: --log wandb expects a run folder, whose manifest.json names the wandb run")
    mode = score_mode(str(run.section("wandb").get("mode", "disabled")))
    if mode not in MODES:
        raise EvalError(
            f"{run.path}: wandb is {mode} for this run: leave --log wandb out, or set WANDB_MODE=online or "
            "WANDB_MODE=offline"
        )
    return mode


def run_of(model: Path) -> Path:
    """Return the run folder of a run or one of its checkpoints.

    Raises:
        UserError: it is neither.
    """
    for folder in (model, *model.absolute().parents[1:2]):
        if (folder / "manifest.json").is_file():
            return folder
    raise UserError(f"--log wandb: {model} is neither a run folder nor a checkpoint in one")
