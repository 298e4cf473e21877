"""From a config to a finished run: look at the inputs, choose a checkpoint, build everything, train."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path

import torch

from pretrain.config import Config
from pretrain.data import DamagedFileError
from pretrain.data.sources.retries import stopping
from pretrain.engine import make_engine
from pretrain.launch.building import build_trainer
from pretrain.launch.setup import Setup, set_up
from pretrain.launch.start import Start, choose_start
from pretrain.launch.watch import watching
from pretrain.processes.environment import settled
from pretrain.processes.exit_codes import DONE, STOPPED
from pretrain.processes.failures import report
from pretrain.processes.signals import StopRequests, stop_requests
from pretrain.run.folder import RunError
from pretrain.training.dry_run import dry_run, wants_dry_run
from pretrain.training.epochs import packing_lines


def train(
    config: Config,
    resume: str = "auto",
    stop_at: int | None = None,
    *,
    extend: bool = False,
    profile: tuple[int, int] | None = None,
) -> int:
    """Train the run that `config` describes, from its newest checkpoint on if there is one.

    Args:
        config: validated.
        resume: ``auto``, ``never``, or a checkpoint's folder.
        stop_at: save and stop after this step.
        extend: the run must exist, and `config` may only make it longer.
        profile: the first and the last step of a trace by torch's profiler.

    Returns:
        The exit code: 0 done, 75 stopped with a checkpoint saved.

    Raises:
        UserError: bad input (`ConfigError`, `RunError`, `CheckpointError`, `DataError`), before any training.
        PeerError: another rank failed, and has raised its own error.
        TrainingError, OSError: training failed; saved checkpoints are untouched.
    """
    with settled(config.engine.kind, on_gpu=torch.cuda.is_available()):
        engine = make_engine(config)
        scratch = tempfile.TemporaryDirectory(prefix="aurora-")
        try:
            code = _train(set_up(config, engine, Path(scratch.name)), resume, stop_at, extend, profile)
            engine.ranks.gather(None)  # together: a launcher stops the other processes when the first one ends
            return code
        except BaseException as error:
            if engine.world_size > 1:
                report(error)  # before this rank leaves the group: what fails because of that fails later
            raise
        finally:
            scratch.cleanup()
            engine.close()


def _train(setup: Setup, resume: str, stop_at: int | None, extend: bool, profile: tuple[int, int] | None) -> int:
    """Choose where to start, and train from there in the locked run folder."""
    folder, display, ranks = setup.folder, setup.display, setup.engine.ranks
    ranks.on_rank_0(folder.lock)
    try:
        start = choose_start(setup, resume, extend=extend)
        step = start.step
        if step >= setup.config.total_steps:
            longer = "; to extend it, raise train.total_tokens" if extend else ""
            display.say(f"{folder.path}: already complete at step {step}{longer}")
            return DONE
        if stop_at is not None and step >= stop_at and not start.is_resume:
            raise RunError(
                f"{folder.path}: --stop-at: expected a step after {step}, where the run starts, got {stop_at}"
            )
        if stop_at is not None and step >= stop_at:
            display.say(f"{folder.path}: already at step {step}, asked to stop at {stop_at}")
            return STOPPED
        return _fit(setup, start, stop_at, profile)
    finally:
        folder.unlock()


def _fit(setup: Setup, start: Start, stop_at: int | None, profile: tuple[int, int] | None) -> int:
    """Build everything, restore it from `start`, and train."""
    config, display = setup.config, setup.display
    notice = "stopping after this step" if setup.engine.rank == 0 else None
    requests = StopRequests()
    with contextlib.ExitStack() as opened, watching(setup, profile) as watch:
        trainer = build_trainer(setup, start, requests, opened, watch)
        state = trainer.state
        if start.weights:
            display.say(str(start))
        display.start(state.step, config.total_steps)
        opened.callback(display.close)
        opened.enter_context(stopping(trainer.stop_requested))
        with stop_requests(requests, notice, first_only=True, warn=display.warn):
            try:
                if wants_dry_run(trainer):
                    watch.enter("dry run", state.step)
                    dry_run(trainer)
                outcome = trainer.fit(stop_at)
            except DamagedFileError as error:
                setup.folder.allow_repair(error.path)
                raise
        watch.alerts.send("stopped" if outcome == "stopped" else "done", f"after step {state.step}", step=state.step)
    for line in packing_lines(trainer.batches.position, config.padded_length):
        display.say(line)
    if outcome == "stopped":
        display.say(f"stopped after step {state.step}; start the same command again to continue")
        return STOPPED
    setup.engine.ranks.on_rank_0(lambda: setup.folder.mark_finished(state.step))
    display.say(
        f"done: {state.step} steps, {state.tokens:,} tokens, {state.train_seconds:,.0f} seconds of training; "
        f"everything is in {setup.folder.path}"
    )
    return DONE
