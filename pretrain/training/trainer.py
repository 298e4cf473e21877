"""The training loop.

Set-up, the choice of a checkpoint, signals and errors are one level up, in `pretrain.launch`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from optimizers import Aurora
from pretrain.config import Config
from pretrain.data import TokenBatch, TokenStream
from pretrain.data.masks import attention_inputs
from pretrain.engine.base import Engine
from pretrain.model.cost import flops_per_token
from pretrain.model.loss import IGNORED
from pretrain.planning.devices import peak_flops
from pretrain.training.hooks import Hook, StepContext
from pretrain.training.schedule import lr_factor
from pretrain.training.timing import PhaseClock


class TrainingError(RuntimeError):
    """Training cannot continue; the last checkpoint is untouched."""


@dataclass
class TrainState:
    """The counters that the loop owns.

    A checkpoint holds these, the weights, the optimizer's state, the position of the data stream, the random
    generators, and what hooks keep; nothing else is needed to continue.
    """

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    tokens: int = 0
    """Tokens of the batches trained on, as the schedule counts them: `global_batch_tokens` a step."""
    skipped_steps: int = 0
    """Steps skipped for non-finite gradients."""
    skipped_in_a_row: int = 0
    """Of these, the ones since the last step that was taken."""
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
        config: the run.
        engine: prepared with the model.
        optimizer: over the engine's parameters.
        stream: training batches, positioned where `state` says.
        eos_id: the token that separates documents.
        state: counters, fresh or restored.
        hooks: periodic work.
        log: called on every rank with each step's record.
        save: called on every rank to save a checkpoint of the current state.
        stop_requested: called on every rank after each step; if any of them returns True, all stop.
    """

    def __init__(
        self,
        config: Config,
        engine: Engine,
        optimizer: Aurora,
        stream: TokenStream,
        *,
        eos_id: int,
        state: TrainState | None = None,
        hooks: Sequence[Hook] = (),
        log: Callable[[dict[str, Any]], None] = lambda record: None,
        save: Callable[[Trainer], None] = lambda trainer: None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> None:
        self.config, self.engine, self.optimizer, self.stream = config, engine, optimizer, stream
        self.eos_id = eos_id
        self.state = state or TrainState()
        self.hooks, self.log, self.save, self.stop_requested = hooks, log, save, stop_requested
        self.micro_batches = config.accumulation(engine.world_size)
        self.flops_per_token = flops_per_token(config.model, config.sequence_length)
        self.peak_flops = peak_flops(engine.device, engine.precision.is_bf16, config.train.peak_tflops)
        self._checked = False
        self._failure: Exception | None = None

    def fit(self, stop_at: int | None = None) -> Literal["done", "stopped"]:
        """Train to the end, to `stop_at` (a step number), or until a stop is requested.

        The last state is saved in each case, once.

        Raises:
            TrainingError: too many steps in a row had non-finite gradients.
            OSError: a record could not be written here.
            PeerError: it could not be written on another rank.
        """
        config, state = self.config, self.state
        while state.step < config.total_steps:
            clock = PhaseClock(self.engine.device)
            batch = self.stream.next_batch(config.global_batch_sequences)
            clock.mark("data")
            lrs = self.set_learning_rates()
            loss = self.forward_backward(batch)
            clock.mark("forward_backward")
            context = self.context(state.step + 1)
            for hook in self.hooks:
                hook.before_step(context)
            grad_norm = self.engine.step(self.optimizer)
            clock.mark("optimizer")

            state.step += 1
            state.tokens += config.train.global_batch_tokens
            record, stop = self.measure(loss, grad_norm)  # the one host sync of the step
            record |= lrs | self.throughput(clock)
            record["batch_sha256"] = batch.sha256()
            self.check_ranks(record["batch_sha256"])

            stop |= stop_at is not None and state.step >= stop_at
            self.report(record, context)
            if context.last or stop or state.step % config.checkpoint.save_every_steps == 0:
                self.save(self)
                self.raise_failure()
            self.check_health()
            if stop and not context.last:
                return "stopped"
        return "done"

    def context(self, step: int) -> StepContext:
        """What the hooks see of a step."""
        return StepContext(
            step=step,
            last=step == self.config.total_steps,
            engine=self.engine,
            loss_sum=self.loss_sum,
            taken=lambda: bool(self.optimizer.last_step_finite),
        )

    def forward_backward(self, batch: TokenBatch) -> Tensor:
        """Gradients of the mean loss over the whole global batch; returns this rank's share of that mean."""
        targets = batch.num_targets
        total = torch.zeros((), device=self.engine.device)
        own = self.own_rows()
        for index, rows in enumerate(own):
            with self.engine.accumulate(last=index == len(own) - 1):
                loss = self.loss_sum(batch.slice(rows)) / targets
                self.engine.backward(loss)
            total += loss.detach()
        return total

    def own_rows(self) -> list[slice]:
        """This rank's rows of the global batch, one slice a micro-batch."""
        size = self.config.train.micro_batch_sequences
        first = self.engine.rank * self.micro_batches
        return [slice((first + i) * size, (first + i + 1) * size) for i in range(self.micro_batches)]

    def loss_sum(self, rows: TokenBatch, module: Callable[..., Tensor] | None = None) -> Tensor:
        """Cross-entropy summed over the targets of `rows`, under the engine's precision.

        `module` is what to call instead of the engine's wrapped model.
        """
        tokens = rows.tokens.to(self.engine.device, torch.int64)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        lengths = rows.lengths.to(self.engine.device)
        valid = torch.arange(labels.shape[1], device=self.engine.device) < lengths[:, None]
        data = self.config.data
        mask, positions = attention_inputs(
            inputs, self.eos_id, document_mask=data.document_mask, reset_positions=data.reset_positions
        )
        with self.engine.autocast():
            return (module or self.engine.model)(inputs, labels.where(valid, IGNORED), mask, positions)

    def set_learning_rates(self) -> dict[str, float]:
        """Set every group's rate for this step; returns what is logged."""
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
        """The step's loss and norm, whether it was skipped, and whether any rank wants to stop.

        Raises:
            OSError: the record of an earlier step could not be written here.
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
        """Run the hooks that are due and hand the step's record to `log`.

        A file that cannot be written, which mostly happens on rank 0 alone, is kept as the failure of this rank: the
        other ranks learn of it with the next step's host sync, or when the checkpoint has been saved.
        """
        try:
            for hook in self.hooks:
                if hook.due(context.step, context.last):
                    record |= hook.run(context)
            self.state.validation_loss = record.get("validation_loss", self.state.validation_loss)
            self.state.bits_per_byte = record.get("validation_bits_per_byte", self.state.bits_per_byte)
            self.log(record)
        except OSError as error:
            self._failure = error

    def raise_failure(self) -> None:
        """Raise what `report` could not write, if anything, on every rank; a collective."""

        def check() -> None:
            if self._failure is not None:
                raise self._failure

        self.engine.ranks.together(check)

    def throughput(self, clock: PhaseClock) -> dict[str, float]:
        """Throughput and timings of the step just taken; `mfu` only where the device's peak is known."""
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

    def check_ranks(self, batch: str) -> None:
        """Once per launch: the ranks have equal weights although they trained on different rows."""
        if not self._checked:
            rows = self.own_rows()
            self.engine.check_in_step(batch, range(rows[0].start, rows[-1].stop))
            self._checked = True

    def check_health(self) -> None:
        """Give up when the gradients stay non-finite."""
        if self.state.skipped_in_a_row >= self.config.train.max_skipped_steps:
            raise TrainingError(
                f"step {self.state.step}: gradients were not finite for {self.state.skipped_in_a_row} steps in a "
                "row (train.max_skipped_steps); the weights are those before these steps. Lower the learning "
                "rates or look at the data"
            )
