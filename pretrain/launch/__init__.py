"""From a config to a finished run: look at the inputs, choose a checkpoint, build everything, train."""

from __future__ import annotations

import contextlib
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from pretrain.config import Config
from pretrain.data import DamagedFileError
from pretrain.data.sources.retries import stopping
from pretrain.engine import make_engine
from pretrain.launch.building import build_trainer
from pretrain.launch.follower import FinishScores, following
from pretrain.launch.records import fetch_copy
from pretrain.launch.setup import Setup, set_up
from pretrain.launch.start import Start, choose_start
from pretrain.launch.stops import Stops
from pretrain.launch.time_budget import time_budget
from pretrain.launch.watch import watching
from pretrain.model.cost import parameter_count
from pretrain.processes.environment import settled
from pretrain.processes.exit_codes import DONE, STOPPED
from pretrain.processes.failures import report
from pretrain.processes.output import output_may_fail
from pretrain.processes.parent import launched_before
from pretrain.processes.signals import NOTICE, StopRequests, stop_requests
from pretrain.run.folder import RunError
from pretrain.training.dry_run import dry_run, wants_dry_run
from pretrain.training.epochs import packing_lines
from pretrain.training.start_validation import StartValidation
from pretrain.training.trainer import Trainer

CHECKPOINT_BYTES = 12
"""Of one parameter in a checkpoint, for a first estimate: its value and two moments in fp32."""


def train(
    config: Config,
    resume: str = "auto",
    stop_at: int | None = None,
    *,
    extend: bool = False,
    profile: tuple[int, int] | None = None,
    requests: StopRequests | None = None,
) -> int:
    """Train the run that `config` describes, from its newest checkpoint on if there is one.

    Args:
        config: validated.
        resume: ``auto``, ``never``, or a checkpoint's folder.
        stop_at: save and stop after this step.
        extend: the run must exist, and `config` may only make it longer.
        profile: the first and the last step of a trace by torch's profiler.
        requests: the caller's, which handles signals itself; None: signals ask for a stop while steps are taken, if
            this is the main thread.

    Returns:
        The exit code: 0 done, 75 stopped with a checkpoint saved.

    Raises:
        UserError: bad input (`ConfigError`, `RunError`, `CheckpointError`, `DataError`), before any training.
        PeerError: another rank failed, and has raised its own error.
        TrainingError, OSError: training failed; saved checkpoints are untouched.
    """
    if is_ours := requests is None:
        requests = StopRequests()
    requests.seconds = config.run.stop_seconds
    with (
        output_may_fail("training"),
        settled(config.engine.kind, on_gpu=torch.cuda.is_available()),
        stopping(lambda: bool(requests)),
    ):
        engine = make_engine(config)
        scratch = tempfile.TemporaryDirectory(prefix="aurora-")
        try:
            setup = replace(set_up(config, engine, Path(scratch.name)), profile=profile)
            code = _train(setup, resume, stop_at, extend, requests, is_ours)
            requests.saved = code == STOPPED  # and everything that had to be waited for is closed
            engine.ranks.gather(None)  # together: a launcher stops the other processes when the first one ends
            return code
        except BaseException as error:
            if engine.world_size > 1:
                report(error)  # before this rank leaves the group: what fails because of that fails later
            raise
        finally:
            scratch.cleanup()
            engine.close()


def _train(
    setup: Setup, resume: str, stop_at: int | None, extend: bool, requests: StopRequests, handle_signals: bool
) -> int:
    """Choose where to start, and train from there in the locked run folder."""
    config, folder, display, ranks = setup.config, setup.folder, setup.display, setup.engine.ranks
    age = launched_before(time.monotonic() - requests.started)
    size = parameter_count(config.model)["total"] * CHECKPOINT_BYTES
    stops = Stops(requests, setup, time_budget(config.run.max_seconds, age, size, display.warn))
    ranks.on_rank_0(
        lambda: folder.lock(config.run.lock_wait_seconds, lambda: bool(requests), display.say),
        long=True,  # it may wait for an earlier attempt of the same Slurm job
    )
    try:
        ranks.on_rank_0(folder.check_checkpoints)
        ranks.on_rank_0(lambda: fetch_copy(setup, resume), long=True)
        start = choose_start(setup, resume, extend=extend)
        step = start.step
        if step >= config.total_steps:
            longer = "; to extend it, raise train.total_tokens" if extend else ""
            display.say(f"{folder.path}: already complete at step {step}{longer}")
            if start.is_resume:
                _note_end(setup, step)
            return DONE
        if stop_at is not None and step >= stop_at and not start.is_resume:
            raise RunError(
                f"{folder.path}: --stop-at: expected a step after {step}, where the run starts, got {stop_at}"
            )
        if stop_at is not None and step >= stop_at:
            display.say(f"{folder.path}: already at step {step}, asked to stop at {stop_at}")
            return STOPPED
        if stops.agreed():
            display.say(f"not started because of {requests.reason}; start the same command again to continue")
            return STOPPED
        return _fit(setup, start, stop_at, stops, handle_signals)
    finally:
        try:
            stops.acknowledge()
        except OSError as error:
            display.warn(
                f"{error.filename}: cannot be deleted ({error.strerror}) and will stop the next launch as well"
            )
        folder.unlock()


def _note_stop(setup: Setup, step: int, reason: str) -> None:
    """Record on rank 0 why the run stopped; the checkpoint is saved, so a failure changes nothing."""
    if setup.engine.rank == 0:
        try:
            setup.folder.mark_stopped(step, reason)
        except (OSError, RunError) as error:
            setup.display.warn(f"the reason for this stop could not be written to the manifest: {error}")


def _note_end(setup: Setup, step: int) -> None:
    """Record on rank 0 that the run is complete; all of it is saved, so a failure is mended by the next launch."""
    folder = setup.folder
    if setup.engine.rank == 0:
        try:
            if not folder.finished and folder.manifest() is not None:
                folder.mark_finished(step)
        except (OSError, RunError) as error:
            setup.display.warn(
                f"the run is complete and saved, but this could not be written to the manifest: {error}; "
                "the same command will do so"
            )


def _fit(setup: Setup, start: Start, stop_at: int | None, stops: Stops, handle_signals: bool) -> int:
    """Train, and wait for the scores of the last checkpoint if the config asks for any."""
    config, display, ranks = setup.config, setup.display, setup.engine.ranks
    with contextlib.ExitStack() as beside:
        trainer, reason, finish_scores = _take_steps(setup, start, stop_at, stops, handle_signals, beside)
        state = trainer.state
        for line in packing_lines(trainer.batches.position, config.padded_length):
            display.say(line)
        if reason is not None:
            display.say(
                f"stopped after step {state.step} because of {reason}; start the same command again to continue"
            )
            return STOPPED
        _note_end(setup, state.step)
        display.say(
            f"done: {state.step} steps, {state.tokens:,} tokens, {state.train_seconds:,.0f} seconds of training; "
            f"everything is in {setup.folder.path}"
        )
        ranks.on_rank_0(lambda: finish_scores(stops.requested), long=True)
    return DONE


def _take_steps(
    setup: Setup,
    start: Start,
    stop_at: int | None,
    stops: Stops,
    handle_signals: bool,
    beside: contextlib.ExitStack,
) -> tuple[Trainer, str | None, FinishScores]:
    """Build everything, restore it from `start`, and take the steps.

    Processes that run alongside training are registered with `beside`. Returns the trainer, the reason why it stopped
    before the end of the run or None, and what waits for the scores.
    """
    config, display = setup.config, setup.display
    with contextlib.ExitStack() as opened, watching(setup) as watch:
        trainer = build_trainer(setup, start, stops, opened, watch)
        finish_scores = beside.enter_context(following(setup))
        state = trainer.state
        if start.weights:
            display.say(str(start))
        display.start(state.step, config.total_steps)
        opened.callback(display.close)
        opened.enter_context(stopping(stops.requested))
        if handle_signals:
            notice = NOTICE if setup.engine.rank == 0 else None
            opened.enter_context(stop_requests(stops.requests, notice, first_only=True, warn=display.warn))
        if wants_dry_run(trainer):
            watch.enter("dry run", state.step)
            dry_run(trainer)
        for hook in trainer.hooks:
            if isinstance(hook, StartValidation):
                watch.enter(hook.phase, state.step)
                hook.measure(trainer.context(state.step))
        stops.budget.step_ended()
        try:
            outcome = "stopped" if stops.agreed() else trainer.fit(stop_at)
        except DamagedFileError as error:
            setup.folder.allow_repair(error.path)
            raise
        state = trainer.state  # another one after a roll back
        reason = (stops.requests.reason if stops.agreed() else None) or "--stop-at"
        if outcome == "stopped":
            _note_stop(setup, state.step, reason)
        if setup.engine.rank == 0:
            event = "stopped" if outcome == "stopped" else "done"
            watch.alerts.send(event, f"after step {state.step}", step=state.step)
    return trainer, reason if outcome == "stopped" else None, finish_scores
