"""The training loop.

`pretrain.launch` is responsible for set-up, the choice of a checkpoint, signals and errors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from optimizers import Aurora
from pretrain.config import Config
from pretrain.data import BatchShare, DataError, TokenBatch
from pretrain.data.masks import attention_inputs
from pretrain.data.prefetch import Prefetcher, PreparedBatch
from pretrain.engine.base import Engine
from pretrain.model.cost import flops_per_token
from pretrain.model.loss import IGNORED
from pretrain.planning.devices import peak_flops
from pretrain.processes.errors import PeerError
from pretrain.processes.exit_codes import BAD_INPUT, STOPPED, UNAVAILABLE
from pretrain.training.hooks import Hook, StepContext
from pretrain.training.schedule import lr_factor
from pretrain.training.timing import PhaseClock


class TrainingError(RuntimeError):
    """Training cannot continue; the last checkpoint is unaffected."""


@dataclass
class TrainState:
    """The counters of the loop.

    A checkpoint contains these, the weights, the optimizer state, the position of the data stream, the random
    generators, and the state of the hooks; nothing else is needed to resume.
    """

    step: int = 0
    """Optimizer steps, including skipped ones."""
    tokens: int = 0
    """Tokens trained on, as the schedule counts them: `global_batch_tokens` per step."""
    skipped_steps: int = 0
    """Steps skipped because of non-finite gradients."""
    skipped_in_a_row: int = 0
    """Steps skipped since the last step that was taken."""
    train_seconds: float = 0.0
    """Time spent in steps, without validation, saving and set-up."""
    train_loss: float | None = None
    """Loss of the last step that was taken."""
    validation_loss: float | None = None
    """Last validation loss, in nats per token."""
    bits_per_byte: float | None = None
    """Last validation bits per byte."""


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
        log: called on every rank with each step's record.
        save: called on every rank to save a checkpoint of the current state.
        stop_requested: called on every rank after each step; if it returns True on any rank, all ranks stop.
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
        log: Callable[[dict[str, Any]], None] = lambda record: None,
        save: Callable[[Trainer], None] = lambda trainer: None,
        stop_requested: Callable[[], bool] = lambda: False,
        enter: Callable[[str, int], None] = lambda phase, step: None,
    ) -> None:
        self.config, self.engine, self.optimizer, self.batches = config, engine, optimizer, batches
        self.eos_id = eos_id
        self.state = state or TrainState()
        self.hooks, self.log, self.save, self.stop_requested = hooks, log, save, stop_requested
        self.enter = enter
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
            DataError: the data cannot be used, or a server of data does not answer, on this rank.
            TrainingError: too many consecutive steps had non-finite gradients.
            OSError: a record could not be written on this rank.
            PeerError: one of these happened on another rank.
        """
        config, state = self.config, self.state
        while state.step < config.total_steps:
            self.enter("data", state.step + 1)
            clock = PhaseClock(self.engine.device)
            with self.saved_if_data_fails():
                batch = self.batches.next_batch()
            clock.mark("data")
            lrs = self.set_learning_rates()
            loss = self.forward_backward(batch.share)
            clock.mark("forward_backward")
            context = self.context(state.step + 1)
            self.enter("optimizer", context.step)
            for hook in self.hooks:
                hook.before_step(context)
            grad_norm = self.engine.step(self.optimizer)
            clock.mark("optimizer")

            self.enter("records", context.step)
            state.step += 1
            state.tokens += config.train.global_batch_tokens
            record, stop = self.measure(loss, grad_norm)  # the one host sync of the step
            record |= lrs | self.throughput(clock)
            record["batch_sha256"] = batch.sha256
            self.check_ranks(batch)

            stop |= stop_at is not None and state.step >= stop_at
            with self.saved_if_data_fails():
                self.report(record, context)  # validation reads data
            if context.last or stop or state.step % config.checkpoint.save_every_steps == 0:
                self.save_now()
                self.raise_failure()
            self.check_health()
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
            if of_data and self.state.step > self._saved_step:
                self.save_now()
            raise

    def save_now(self) -> None:
        """Save the current state."""
        self.enter("save", self.state.step)
        self._saved_step = self.state.step
        self.save(self)
        self.enter("records", self.state.step)

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
        tokens = rows.tokens.to(self.engine.device, torch.int64)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        lengths = rows.lengths.to(self.engine.device)
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
        train = self.config.train
        factor = lr_factor(self.config.schedule, self.state.tokens, train.global_batch_tokens, train.total_tokens)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        groups = self.optimizer.param_groups
        lrs = {"lr": next((group for group in groups if group["role"] == "hidden"), groups[0])["lr"]}
        own = self.config.optimizer.adamw.lrs()
        for group in groups:
            if group["kind"] == "adamw":
                lrs[f"{group['role']}_lr" if group["role"] in own else "adamw_lr"] = group["lr"]
        return lrs

    def measure(self, loss: Tensor, grad_norm: Tensor) -> tuple[dict[str, Any], bool]:
        """Count the step; return its record, and whether a stop was requested on any rank.

        Raises:
            OSError: the record of an earlier step could not be written on this rank.
            PeerError: it could not be written on another rank.
        """
        flags = torch.tensor([self.stop_requested(), self._failure is not None], dtype=loss.dtype, device=loss.device)
        loss_sum, stops, failures = self.engine.sum_over_ranks(torch.cat([loss[None], flags])).unbind()
        optimizer = self.optimizer
        reports = (grad_norm, optimizer.last_step_finite, optimizer.last_step_fallbacks, optimizer.last_step_retries)
        values = torch.stack(
            [loss_sum, stops, failures, *(report.to(loss.device, torch.float32) for report in reports)]
        )
        mean, stopping, failed, norm, taken, fallbacks, retries = values.tolist()
        if failed:
            self.raise_failure()
        state = self.state
        if taken:
            state.skipped_in_a_row, state.train_loss = 0, mean
        else:
            state.skipped_in_a_row += 1
            state.skipped_steps += 1
        record = {"step": state.step, "tokens": state.tokens, "loss": mean, "grad_norm": norm}
        record |= {"balance_fallbacks": int(fallbacks), "cholesky_retries": int(retries)}
        if not taken:
            record["skipped"] = True
        return record, stopping > 0

    def report(self, record: dict[str, Any], context: StepContext) -> None:
        """Run the hooks that are due, and hand the step's record to `log`."""
        try:
            for hook in self.hooks:
                if hook.due(context.step, context.last):
                    self.enter(hook.phase, context.step)
                    record |= hook.run(context)
        finally:
            self.enter("records", context.step)
            self.state.validation_loss = record.get("validation_loss", self.state.validation_loss)
            self.state.bits_per_byte = record.get("validation_bits_per_byte", self.state.bits_per_byte)
            self.attempt(lambda: self.log(record))

    def attempt(self, work: Callable[[], object]) -> None:
        """Do what may fail on one rank alone, such as writing a file; `work` must not communicate.

        An error is kept as the failure of this rank. The other ranks learn of it with the next step's host sync, or
        when the checkpoint has been saved.
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
        """Return the throughput and timings of the last step; `mfu` only if the device's peak is known."""
        seconds = clock.total()
        self.state.train_seconds += seconds
        per_second = self.config.train.global_batch_tokens / seconds
        record = {
            "tokens_per_second": round(per_second, 1),
            "train_seconds": round(self.state.train_seconds, 3),
            "step_seconds": round(seconds, 6),
            **clock.seconds(),
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

    def check_health(self) -> None:
        """Raise a TrainingError if too many consecutive steps were skipped."""
        if self.state.skipped_in_a_row >= self.config.train.max_skipped_steps:
            raise TrainingError(
                f"step {self.state.step}: gradients were not finite for {self.state.skipped_in_a_row} steps in a "
                "row (train.max_skipped_steps); the weights are those before these steps. Lower the learning "
                "rates or check the data"
            )
