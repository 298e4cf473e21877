"""The training loop.

`pretrain.launch` is responsible for set-up, the choice of a checkpoint, signals and errors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from optimizers import Aurora
from pretrain.config import Config
from pretrain.data import BatchShare, DataError, StreamPosition, TokenBatch
from pretrain.data.masks import attention_inputs
from pretrain.data.prefetch import Prefetcher, PreparedBatch
from pretrain.engine.base import Engine
from pretrain.model.cost import flops_per_token
from pretrain.model.loss import IGNORED
from pretrain.planning.devices import peak_flops
from pretrain.processes.errors import PeerError, noted
from pretrain.processes.exit_codes import BAD_INPUT, STOPPED, UNAVAILABLE
from pretrain.training.bad_batches import BadBatches
from pretrain.training.garbage import GarbageCollector
from pretrain.training.guards import Guards, TrainingError
from pretrain.training.hooks import Hook, StepContext
from pretrain.training.records import LateRecords, LaunchedStep, OnTheWay
from pretrain.training.schedule import set_learning_rates
from pretrain.training.state import TrainState
from pretrain.training.timing import PhaseClock

__all__ = ["TrainState", "Trainer", "TrainingError"]


class Trainer:
    """Owns the loop and its counters.

    Args:
        config: the run's config.
        engine: the engine, prepared with the model.
        optimizer: the optimizer of the engine's parameters.
        batches: this rank's shares of the training batches, positioned according to `state`.
        eos_id: the token that separates documents.
        state: the counters, new or restored.
        hooks: periodic work.
        log: called on every rank with each step's record, and the position of the stream after its batch.
        save: called on every rank to save a checkpoint of the current state.
        settle: called on every rank before `fit` ends in any way, to wait for a save that is still being written.
        last_checkpoint: called on every rank to find the checkpoint to roll back to; returns what restores everything
            but the data stream from it and returns its counters, or None if there is no checkpoint.
        stop_requested: called on every rank after each step; if it returns True on any rank, all ranks stop.
        warn: prints a warning on rank 0.
        enter: called with the name of each phase of a step when it begins, and the number of the step.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        optimizer: Aurora,
        batches: Prefetcher,
        *,
        eos_id: int,
        state: TrainState | None = None,
        hooks: Sequence[Hook] = (),
        log: Callable[[dict[str, Any], StreamPosition], None] = lambda record, position: None,
        save: Callable[[Trainer], None] = lambda trainer: None,
        settle: Callable[[], None] = lambda: None,
        last_checkpoint: Callable[[], Callable[[], TrainState] | None] = lambda: None,
        stop_requested: Callable[[], bool] = lambda: False,
        warn: Callable[[str], None] = lambda text: None,
        enter: Callable[[str, int], None] = lambda phase, step: None,
    ) -> None:
        self.config, self.engine, self.optimizer, self.batches = config, engine, optimizer, batches
        self.eos_id = eos_id
        self.state = state or TrainState()
        self.hooks, self.log, self.save, self.settle = hooks, log, save, settle
        self.last_checkpoint, self.stop_requested, self.warn, self.enter = last_checkpoint, stop_requested, warn, enter
        self.guards = Guards(config, self.state, engine.device)
        self.garbage = GarbageCollector(config.guards.gc_every_steps)
        self.bad_batches = BadBatches(config, engine.rank, warn)
        self.late = LateRecords()
        self.flops_per_token = flops_per_token(config.model, config.sequence_length)
        self.peak_flops = peak_flops(engine.device, engine.precision.is_bf16, config.train.peak_tflops)
        self._checked = False
        self._failure: Exception | None = None
        self._saved_step = self.state.step  # a run begins with nothing to save, or from a checkpoint

    def fit(self, stop_at: int | None = None) -> Literal["done", "stopped"]:
        """Train to the end, to step `stop_at`, or until a stop is requested.

        In each case the final state is saved exactly once. If the data fails, the state after the last complete step is
        saved as well, so that nothing is lost once the data is back.

        Raises:
            DataError: the data cannot be used, or a data server does not answer, on this rank.
            TrainingError: too many consecutive steps were skipped, the run was rolled back too often, or the weights
                differ between ranks.
            OSError: a record, or the last checkpoint, could not be written on this rank.
            PeerError: one of these happened on another rank.
        """
        try:
            with self.garbage.in_charge():
                outcome = self.train(stop_at)
        except Exception as error:
            # What can still be written is: each of these may fail for the same reason.
            with noted(error):
                self.flush(self.late.take(all_of_them=True, arrived_only=True))
            with noted(error):
                self.enter("save", self.state.step)
            with noted(error):
                self.settle()
            raise
        self.enter("save", self.state.step)
        self.settle()
        return outcome

    def train(self, stop_at: int | None) -> Literal["done", "stopped"]:
        """The loop of `fit`. What the device computes in a step is read after the next one has been launched."""
        while self.state.step < self.config.total_steps:
            self.enter("data", self.state.step + 1)
            clock = PhaseClock(self.engine.device)
            before = self.batches.position
            with self.saved_if_data_fails():
                batch = self.batches.next_batch()
            clock.mark("data")
            context = self.context(self.state.step + 1)
            launched = self.launch(batch, before, context, clock)
            self.enter("records", context.step)
            self.late.add(launched)
            self.check_ranks(batch)

            stop = self.stop_is_agreed() or (stop_at is not None and context.step >= stop_at)
            saves = context.last or stop or context.step % self.config.checkpoint.save_every_steps == 0
            due = any(hook.due(context.step, context.last) for hook in self.hooks)
            read = self.late.take(all_of_them=saves or due or self.guards.must_know(self.state, len(self.late)))
            launched.record |= self.throughput(clock)
            if not self.finish(read, launched):
                continue
            if saves:
                self.save_state()
                self.raise_failure()
            else:
                self.guards.compare_weights(self.engine, self.state.step)
            self.guards.check(self.state)
            self.garbage.after_step()
            if stop and not context.last:
                return "stopped"
        return "done"

    @contextlib.contextmanager
    def saved_if_data_fails(self) -> Iterator[None]:
        """Save the state before an error of the data is raised, which all ranks learn of together; a collective."""
        try:
            yield
        except (DataError, PeerError) as error:
            of_data = isinstance(error, DataError) or error.exit_code in (BAD_INPUT, STOPPED, UNAVAILABLE)
            sound = self.flush(self.late.take(all_of_them=True))
            if of_data and self.state.step > self._saved_step and (sound or self.last_checkpoint() is None):
                self.save_state()
            raise

    def flush(self, read: Sequence[tuple[LaunchedStep, dict[str, float]]]) -> bool:
        """Log steps before an error is raised; return whether none of them has to be undone."""
        for step, values in read:
            if "step_seconds" in step.record:  # the error did not interrupt it
                self.conclude(step, values)
                self.log_step(step)
        return not self._saved_step or not any(self.guards.rolls_back(values) for _, values in read)

    def context(self, step: int) -> StepContext:
        """Return the context of a step for the hooks."""
        return StepContext(
            step=step,
            last=step == self.config.total_steps,
            engine=self.engine,
            loss_sum=self.loss_sum,
            taken=lambda: bool(self.optimizer.last_step_finite),
            write=self.attempt,
        )

    def launch(
        self, batch: PreparedBatch, before: StreamPosition, context: StepContext, clock: PhaseClock
    ) -> LaunchedStep:
        """Hand all the work of a step to the device, without waiting for it, and count the step.

        `before` is the position of the stream before the batch, and `clock` times the phases of the step.
        """
        state, optimizer = self.state, self.optimizer
        rates = self.set_learning_rates()
        part = self.forward_backward(batch.share)
        clock.mark("forward_backward")
        self.enter("optimizer", context.step)
        for hook in self.hooks:
            hook.before_step(context)
        loss = self.engine.sum_over_ranks(part)
        optimizer.permitted, spike = self.guards.judge(loss)
        grad_norm = self.engine.step(optimizer)
        clock.mark("optimizer")
        state.step += 1
        state.tokens += self.config.train.global_batch_tokens
        record = {"step": state.step, "tokens": state.tokens, **rates, "batch_sha256": batch.sha256}
        return LaunchedStep(context, batch, before, clock, self.measure(loss, grad_norm, spike), record)

    def measure(self, loss: Tensor, grad_norm: Tensor, spike: Tensor) -> OnTheWay:
        """Send what the device finds out about a step to the host, without waiting for it."""
        optimizer = self.optimizer
        values = {
            "loss": loss,
            "grad_norm": grad_norm,
            "spike": spike,
            "taken": optimizer.last_step_finite,
            "balance_fallbacks": optimizer.last_step_fallbacks,
            "cholesky_retries": optimizer.last_step_retries,
        }
        return OnTheWay({name: value.to(loss.device) for name, value in values.items()})

    def forward_backward(self, share: BatchShare) -> Tensor:
        """Compute the gradients of the mean loss over the global batch; return this rank's part of that mean."""
        total = torch.zeros((), device=self.engine.device)
        micro_batches = self.micro_batches(share)
        for index, rows in enumerate(micro_batches):
            with self.engine.accumulate(last=index == len(micro_batches) - 1):
                self.enter("forward", self.state.step + 1)
                loss = self.loss_sum(rows) / share.global_targets
                self.enter("backward", self.state.step + 1)
                self.engine.backward(loss)
            total += loss.detach()
        return total

    def micro_batches(self, share: BatchShare) -> list[TokenBatch]:
        """Return the rows of this rank in parts of `micro_batch_sequences`."""
        size = self.config.train.micro_batch_sequences
        return [share.slice(slice(first, first + size)) for first in range(0, len(share.rows), size)]

    def loss_sum(self, rows: TokenBatch, module: Callable[..., Tensor] | None = None) -> Tensor:
        """Return the cross-entropy summed over the targets of `rows`, in the engine's precision.

        `module` is called instead of the engine's wrapped model, if given.
        """
        tokens = self.engine.to_device(rows.tokens).long()
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        lengths = self.engine.to_device(rows.lengths)
        valid = torch.arange(labels.shape[1], device=self.engine.device) < lengths[:, None]
        data = self.config.data
        mask, positions = attention_inputs(
            rows.tokens[:, :-1],
            self.eos_id,
            document_mask=data.document_mask,
            reset_positions=data.reset_positions,
            kernel=self.engine.document_kernel.kernel,
            lengths=rows.lengths,
            device=self.engine.device,
        )
        with self.engine.autocast():
            return (module or self.engine.model)(inputs, labels.where(valid, IGNORED), mask, positions)

    def set_learning_rates(self) -> dict[str, float]:
        """Set every group's learning rate for this step; return the rates to be logged."""
        return set_learning_rates(self.optimizer.param_groups, self.config, self.state.tokens)

    def stop_is_agreed(self) -> bool:
        """Return whether a stop was requested on any rank; a collective of the hosts, not of the devices.

        Raises:
            OSError: the record of an earlier step could not be written on this rank.
            PeerError: it could not be written on another rank.
        """
        stopping, failed = self.engine.ranks.any(self.stop_requested(), self._failure is not None)
        if failed:
            self.raise_failure()
        return stopping

    def finish(self, read: Sequence[tuple[LaunchedStep, dict[str, float]]], launched: LaunchedStep) -> bool:
        """Report steps whose values are known; return False if one of them was undone, all later ones too.

        `launched` is the step that was launched last.
        """
        for step, values in read:
            self.conclude(step, values)
            if self.guards.rolls_back(values) and self.roll_back(step, values["loss"], launched):
                return False
            with self.saved_if_data_fails():  # validation reads data
                self.report(step, step.context)
        return True

    def conclude(self, step: LaunchedStep, values: dict[str, float]) -> None:
        """Count a step whose values have been read, and complete its record except for what hooks add."""
        record = step.record
        counts = {name: int(values[name]) for name in ("balance_fallbacks", "cholesky_retries")}
        known = {"step": record["step"], "tokens": record["tokens"], "loss": values["loss"]}
        known |= {"grad_norm": values["grad_norm"], **counts, **self.guards.count(values, self.state)}
        step.record = known | record | step.clock.seconds()
        if values["spike"] or not values["taken"]:
            self.bad_batches.keep(step)

    def report(self, step: LaunchedStep, context: StepContext) -> None:
        """Run the hooks that are due after a step, and log its record."""
        record, state = step.record, self.state
        try:
            for hook in self.hooks:
                if hook.due(context.step, context.last):
                    self.enter(hook.phase, context.step)
                    record |= hook.run(context)
        finally:
            self.enter("records", context.step)
            state.validation_loss = record.get("validation_loss", state.validation_loss)
            state.bits_per_byte = record.get("validation_bits_per_byte", state.bits_per_byte)
            self.log_step(step)

    def log_step(self, step: LaunchedStep) -> None:
        """Hand a step's record to `log`."""
        self.attempt(lambda: self.log(step.record, step.batch.position))

    def roll_back(self, spike: LaunchedStep, loss: float, launched: LaunchedStep) -> bool:
        """Return to the last checkpoint and continue with the batch after that of `spike`; a collective.

        Args:
            spike: the step whose loss is a spike.
            loss: its loss.
            launched: the step that was launched last, whose batch has not been trained on if it is a later one.

        Returns:
            False if there is no checkpoint yet, or if no save has succeeded.
        """
        self.enter("roll back", spike.step)
        restore = self.last_checkpoint() if self._saved_step else None
        if restore is None:
            self.warn(f"step {spike.step}: the loss {loss:.4g} is a spike, but there is no checkpoint to roll back to")
            return False
        self.log_step(spike)
        self.guards.check_rollbacks(spike.step, loss, self.state)
        rollbacks = self.state.rollbacks + 1
        self.state = restore()
        self.state.rollbacks = rollbacks
        self.guards.restart(self.state)
        self.late = LateRecords()
        if launched is not spike:
            self.batches.put_back(launched.batch, spike.batch.position)
        self.batches.extend(spike.step - self.state.step)
        self._saved_step = self.state.step
        self.warn(
            f"step {spike.step}: the loss {loss:.4g} is a spike: rolled back to step {self.state.step} "
            f"({rollbacks} of at most {self.config.guards.max_rollbacks} times); the batches of steps "
            f"{self.state.step + 1} to {spike.step} are left out"
        )
        return True

    def save_state(self) -> None:
        """Save a checkpoint; all launched steps must have been concluded. A collective."""
        self.enter("save", self.state.step)
        self.guards.compare_weights(self.engine, self.state.step, before_save=True)
        self.state.loss_history = self.guards.history()
        self._saved_step = self.state.step
        self.save(self)
        self.enter("records", self.state.step)

    def attempt(self, work: Callable[[], object]) -> None:
        """Do what may fail on one rank alone, such as writing a file; `work` must not communicate.

        An error is kept as the failure of this rank. The other ranks learn of it at the end of the next step, or when
        the checkpoint has been saved.
        """
        try:
            work()
        except Exception as error:
            self._failure = self._failure or error

    def raise_failure(self) -> None:
        """Raise an error on every rank if `report` could not write a file on any of them; a collective."""

        def check() -> None:
            if self._failure is not None:
                raise self._failure

        self.engine.ranks.together(check)

    def throughput(self, clock: PhaseClock) -> dict[str, float]:
        """End a step; return its throughput and timings, with `mfu` only if the device's peak is known."""
        seconds = clock.stop()
        self.state.train_seconds += seconds
        per_second = self.config.train.global_batch_tokens / seconds
        record = {
            "tokens_per_second": round(per_second, 1),
            "train_seconds": round(self.state.train_seconds, 3),
            "step_seconds": round(seconds, 6),
        }
        if self.peak_flops:
            peak = self.peak_flops * self.engine.world_size
            record["mfu"] = round(per_second * self.flops_per_token / peak, 5)
        return record

    def check_ranks(self, batch: PreparedBatch) -> None:
        """Check once per launch that the ranks have equal weights after training on different rows."""
        if not self._checked:
            self.engine.check_in_step(batch.sha256, batch.share.rows)
            self._checked = True
